"""Nearest-codeword search on CUDA, by the rule at the head of nearest.py: three looks, each at what was left open.

1. *First look*, all rows: a tile of tokens stays on the chip while the codes stream past; scores x.c - |c|^2/2 come
   from tensor cores with both sides rounded to fp16, and only each row's best, second best and index are kept. A row is
   certified where best and second are further apart than rounding can have moved them,

       2 (|x - x'| max|c| + |x'| max|c - c'| + slack),

   x' and c' being the rounded values: |x - x'| is measured, row by row, when the tile is loaded.
2. *Closer look*, the few percent that are left: the same with split products, x'c' + x'c" + x"c', where x" and c" are
   the rounded remainders: some 22 bits.
3. *Last look*, what is still open (ties, above all): every code in float64, by differences, from the values as given.

Rows are handed on through lists in device memory, whose lengths the next kernel reads there: nothing waits for the
device, and a CUDA graph can hold it all. The order of a list depends on the run; no row's answer depends on the order.

Tokens and codes are centred on a mean of the codes and scaled by a power of two (cosine: tokens by their own largest
entry, codes to length 1), which changes no winner; outside of fp16's range a row is left open, and so stays right.

``slack`` is the error of a sum of D products in tensor cores. They align the products of a block to the largest and cut
off what falls below float32's last bit (Fasi, Higham, Mikaitis, Pranesh 2021, doi 10.7717/peerj-cs.330), so that each
of D terms (3 D with split products) may lose 2^-23 of the largest: at most (D + 16) 2^-23 |x'| max|c|, taken times
1.25; and half as many roundings in |c|^2.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqssl.kernels.tuning import Config, choose

__all__ = ["nearest_codeword_triton"]

# Codes whose mean is the centre and whose largest entry sets the scale: any value of both is right.
_SAMPLE = 256
# Codes are padded to a multiple that every block size divides.
_PADDING = 128
# Lengths of tokens are summed, and the centre is made, in pieces of this width.
_PIECE = tl.constexpr(32)
_DOT_DTYPES = {"exact": torch.float16, "fp16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32}


def nearest_codeword_triton(x: Tensor, codebook: Tensor, metric: str, precision: str = "exact") -> Tensor:
    """``(N, D), (K, D) -> (N,)`` int64. float16, bfloat16 or float32, of any strides; not validated here."""
    rows = x.shape[0]
    found = torch.empty(rows, dtype=torch.int64, device=x.device)
    if rows == 0:
        return found
    exact = precision == "exact"
    capability, width = _capability(x), x.shape[1]
    config = choose(capability, width, wide=precision == "tf32")
    codes = _prepare(codebook, metric, _DOT_DTYPES[precision], config)
    cosine = metric == "cosine"
    shape = (rows, *codebook.shape, *x.stride())

    open_rows = torch.empty((2, rows), dtype=torch.int64, device=x.device)
    left = torch.zeros(2, dtype=torch.int64, device=x.device)
    _first_look[(triton.cdiv(rows, config.block_n),)](
        x, *codes.tensors, found, open_rows[0], left, *shape,
        EXACT=exact, COSINE=cosine, CHUNKS=codes.chunks, BITS=block_bits(codebook.shape[0], config) if exact else 0,
        **config.blocks(), **config.launch(),
    )  # fmt: skip
    programs = _programs(x)
    last = 0
    if exact:
        closer = choose(capability, width, split=True)
        _closer_look[(2 * programs,)](
            x, *codes.tensors, found, open_rows[0], left, open_rows[1], left[1:], *shape,
            COSINE=cosine, CHUNKS=codes.chunks * config.block_d // closer.block_d, **closer.blocks(), **closer.launch(),
        )  # fmt: skip
        last = 1
    _last_look[(4 * programs,)](
        x, codebook, found, open_rows[last], left[last:], *codebook.shape, *x.stride(), *codebook.stride(),
        COSINE=cosine, BLOCK_K=32, BLOCK_D=64, num_warps=4,
    )  # fmt: skip
    return found


def block_bits(codes: int, config: Config) -> int:
    """How many bits number the blocks of codes: at least one, by which the kernel knows that it is asked to."""
    return max(1, (triton.cdiv(codes, config.block_k) - 1).bit_length())


def _capability(x: Tensor) -> tuple[int, int]:
    return torch.cuda.get_device_capability(x.device) if x.is_cuda else (9, 0)


def _programs(x: Tensor) -> int:
    """As many as the device runs at once, or a few under the interpreter."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2


class _Prepared:
    """Codes as they are scored: ``tensors`` are high parts and remainders ``(K', D')``, constants ``(K',)``, centre
    ``(D',)`` and bounds ``(4,)``: scale, longest code, and how far the rounded codes are off at most, without and with
    remainder. Padded with zeros, and constants of -3e38, so that no inner loop needs a mask."""

    def __init__(self, tensors: tuple[Tensor, ...], chunks: int) -> None:
        self.tensors = tensors
        self.chunks = chunks


def _prepare(codebook: Tensor, metric: str, dtype: torch.dtype, config: Config) -> _Prepared:
    size, width = codebook.shape
    padded = triton.cdiv(size, _PADDING) * _PADDING
    chunks = triton.cdiv(width, config.block_d)
    wide = chunks * config.block_d
    high = torch.empty((padded, wide), dtype=dtype, device=codebook.device)
    # Only the closer look reads remainders, and only of fp16.
    low = torch.empty_like(high) if dtype == torch.float16 else high
    constant = torch.empty(padded, dtype=torch.float32, device=codebook.device)
    # Read in whole pieces, also where the tokens are narrower than one.
    pieces = triton.cdiv(wide, _PIECE.value)
    centre = torch.empty(pieces * _PIECE.value, dtype=torch.float32, device=codebook.device)
    bounds = torch.zeros(4, dtype=torch.float32, device=codebook.device)
    cosine = metric == "cosine"
    _centre[(pieces,)](
        codebook, centre, bounds, size, width, *codebook.stride(), COSINE=cosine, SAMPLE=_SAMPLE, BLOCK_D=_PIECE.value
    )
    _round_codes[(triton.cdiv(padded, 16),)](
        codebook, high, low, constant, centre, bounds, size, width, padded, *codebook.stride(),
        COSINE=cosine, SPLIT=dtype == torch.float16, CHUNKS=chunks, BLOCK_K=16, BLOCK_D=config.block_d,
    )  # fmt: skip
    return _Prepared((high, low, constant, centre, bounds), chunks)


@triton.jit
def _centre(
    codes, centre, bounds, K, D, stride_k, stride_d,
    COSINE: tl.constexpr, SAMPLE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Mean of a sample of codes, zeros beyond their width, and the largest distance from it; cosine: all zeros."""
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    step = tl.maximum(K // SAMPLE, 1)
    k = tl.arange(0, SAMPLE) * step
    there = (k < K)[:, None] & (d < D)[None, :]
    c = tl.load(codes + k.to(tl.int64)[:, None] * stride_k + d.to(tl.int64)[None, :] * stride_d, mask=there, other=0.0)
    c = c.to(tl.float32)
    sound = there & (tl.abs(c) < float("inf"))
    c = tl.where(sound, c, 0.0)
    mean = tl.sum(c, 0) / tl.maximum(tl.sum(sound.to(tl.float32), 0), 1.0)
    if COSINE:
        mean = mean * 0.0
    mean = tl.where(tl.abs(mean) < float("inf"), mean, 0.0)
    tl.store(centre + d, mean)
    spread = tl.max(tl.max(tl.where(sound, tl.abs(c - mean[None, :]), 0.0), 1), 0)
    tl.atomic_max(bounds, tl.where(spread < float("inf"), spread, 0.0))


@triton.jit
def _scale(bounds, COSINE: tl.constexpr):
    """What brings the sample's largest entry to about 64: far from fp16's largest, and from its smallest."""
    if COSINE:
        return 64.0
    spread = tl.load(bounds)
    # A power of two rounds nothing; within 2^-60 and 2^60, beyond which squares leave float32.
    exponent = tl.minimum(tl.maximum(tl.floor(tl.log2(tl.maximum(spread, 1e-37))), -60.0), 60.0)
    return tl.where(spread > 0, tl.exp2(6.0 - exponent), 1.0)


@triton.jit
def _round_codes(
    codes, high, low, constant, centre, bounds, K, D, padded, stride_k, stride_d,
    COSINE: tl.constexpr, SPLIT: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Centred, scaled and rounded codes with their remainders; the constants; and the bounds, by maxima."""
    scale = _scale(bounds, COSINE)
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    largest = tl.zeros((BLOCK_K,), tl.float32)
    sound = k < K
    for chunk in range(CHUNKS):
        c = _codes(codes, k, chunk * BLOCK_D + tl.arange(0, BLOCK_D), K, D, stride_k, stride_d)
        sound = sound & (tl.max(tl.where(tl.abs(c) < float("inf"), 0, 1), 1) == 0)
        largest = tl.maximum(largest, tl.max(tl.abs(c), 1))
    factor = tl.zeros((BLOCK_K,), tl.float32) + scale
    if COSINE:
        # By the largest entry first: squares of very small or large codes would be lost.
        largest = tl.where((largest > 0) & sound, largest, 1.0)
        squares = tl.zeros((BLOCK_K,), tl.float32)
        for chunk in range(CHUNKS):
            c = _codes(codes, k, chunk * BLOCK_D + tl.arange(0, BLOCK_D), K, D, stride_k, stride_d)
            c = tl.where(sound[:, None], c, 0.0) / largest[:, None]
            squares += tl.sum(c * c, 1)
        factor = scale / tl.sqrt(tl.where(squares > 0, squares, 1.0))
    squares = tl.zeros((BLOCK_K,), tl.float32)
    off = tl.zeros((BLOCK_K,), tl.float32)
    still_off = tl.zeros((BLOCK_K,), tl.float32)
    for chunk in range(CHUNKS):
        d = chunk * BLOCK_D + tl.arange(0, BLOCK_D)
        c = _codes(codes, k, d, K, D, stride_k, stride_d)
        c = tl.where(sound[:, None] & (d < D)[None, :], c, 0.0)
        if COSINE:
            c = c / largest[:, None] * factor[:, None]
        else:
            c = tl.where(sound[:, None], (c - tl.load(centre + d)[None, :]) * scale, 0.0)
        rounded = c.to(high.dtype.element_ty)
        rest = c - rounded.to(tl.float32)
        where = k.to(tl.int64)[:, None] * (CHUNKS * BLOCK_D) + d[None, :]
        inside = (k < padded)[:, None]
        tl.store(high + where, rounded, mask=inside)
        squares += tl.sum(c * c, 1)
        off += tl.sum(rest * rest, 1)
        if SPLIT:
            remainder = rest.to(high.dtype.element_ty)
            tl.store(low + where, remainder, mask=inside)
            rest = rest - remainder.to(tl.float32)
            still_off += tl.sum(rest * rest, 1)
    score = -0.5 * squares
    if COSINE:
        score = score * 0.0
    # Finite, to remain a number with another in its last bits.
    tl.store(constant + k, tl.where(sound, score, -3e38), mask=k < padded)
    tl.atomic_max(bounds + 1, tl.max(_not_nan(tl.sqrt(squares)), 0))
    tl.atomic_max(bounds + 2, tl.max(_not_nan(tl.sqrt(off)), 0))
    tl.atomic_max(bounds + 3, tl.max(_not_nan(tl.sqrt(still_off)), 0))


@triton.jit
def _not_nan(x):
    return tl.where(x == x, x, float("inf"))


@triton.jit
def _codes(codes, k, d, K, D, stride_k, stride_d):
    """``(BLOCK_K, BLOCK_D)`` float32 as given, zeros outside."""
    where = codes + k.to(tl.int64)[:, None] * stride_k + d.to(tl.int64)[None, :] * stride_d
    return tl.load(where, mask=(k < K)[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _given(x, row, there, d, D, stride_n, stride_d):
    """``(BLOCK_N, BLOCK_D)`` float32: tokens as given, zeros outside."""
    where = x + row[:, None] * stride_n + d.to(tl.int64)[None, :] * stride_d
    return tl.load(where, mask=there[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _tokens(x, row, there, d, centre, factor, D, stride_n, stride_d):
    """``(BLOCK_N, BLOCK_D)`` float32: tokens as they are scored, before rounding."""
    return (_given(x, row, there, d, D, stride_n, stride_d) - tl.load(centre + d)[None, :]) * factor[:, None]


@triton.jit
def _lengths(
    x, row, there, centre, bounds, D, stride_n, stride_d,
    SPLIT: tl.constexpr, COSINE: tl.constexpr, BLOCK_N: tl.constexpr, dot: tl.constexpr,
):  # fmt: skip
    """Of a tile of rows: what scales them, their lengths, how far the rounded ones are off, without and with remainder,
    and whether all their entries are finite. In narrow pieces, to leave the registers to the loop over the codes."""
    PIECE: tl.constexpr = _PIECE
    d = tl.arange(0, PIECE)
    largest = tl.zeros((BLOCK_N,), tl.float32)
    junk = tl.zeros((BLOCK_N,), tl.int32)
    for start in range(0, D, PIECE):
        given = tl.abs(_given(x, row, there, start + d, D, stride_n, stride_d))
        largest = tl.maximum(largest, tl.max(given, 1))
        junk = tl.maximum(junk, tl.max(tl.where(given < float("inf"), 0, 1), 1))
    factor = tl.zeros((BLOCK_N,), tl.float32) + _scale(bounds, COSINE)
    if COSINE:
        factor = factor / tl.where(largest > 0, largest, 1.0)
    squares = tl.zeros((BLOCK_N,), tl.float32)
    off = tl.zeros((BLOCK_N,), tl.float32)
    still_off = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, D, PIECE):
        t = _tokens(x, row, there, start + d, centre, factor, D, stride_n, stride_d)
        rest = t - t.to(dot).to(tl.float32)
        squares += tl.sum(t * t, 1)
        off += tl.sum(rest * rest, 1)
        if SPLIT:
            rest = rest - rest.to(dot).to(tl.float32)
            still_off += tl.sum(rest * rest, 1)
    return factor, tl.sqrt(squares), tl.sqrt(off), tl.sqrt(still_off), junk == 0


@triton.jit
def _look(
    x, high, low, constant, centre, bounds, row, there, K, D, stride_n, stride_d,
    SPLIT: tl.constexpr, COSINE: tl.constexpr, CHUNKS: tl.constexpr, BITS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """For a tile of rows: best score, its lowest index, second best score, margin, and whether the row is finite.

    With BITS, the number of the block stands in the last bits of the score instead of a number of its own, which saves
    a sixth of the registers, and widens the margin. The index is then right where the margin is kept.
    """
    dot: tl.constexpr = high.dtype.element_ty
    d = tl.arange(0, BLOCK_D)
    factor, length, off, still_off, finite = _lengths(
        x, row, there, centre, bounds, D, stride_n, stride_d, SPLIT, COSINE, BLOCK_N, dot
    )
    if CHUNKS == 1:
        t = _tokens(x, row, there, d, centre, factor, D, stride_n, stride_d)
        resident = t.to(dot)
        remainder = (t - resident.to(tl.float32)).to(dot)

    best = tl.full((BLOCK_N, BLOCK_K), -3.4e38, tl.float32)
    second = tl.full((BLOCK_N, BLOCK_K), -3.4e38, tl.float32)
    block = tl.zeros((BLOCK_N, BLOCK_K), tl.int32)
    k = tl.arange(0, BLOCK_K)
    for start in range(0, K, BLOCK_K):
        where = (start + k).to(tl.int64)[None, :] * (CHUNKS * BLOCK_D) + d[:, None]
        scores = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        if CHUNKS == 1:
            c = tl.load(high + where)
            scores = tl.dot(resident, c, scores, input_precision="tf32")
            if SPLIT:
                scores = tl.dot(remainder, c, scores)
                scores = tl.dot(resident, tl.load(low + where), scores)
        else:
            for chunk in range(CHUNKS):
                t = _tokens(x, row, there, chunk * BLOCK_D + d, centre, factor, D, stride_n, stride_d)
                rounded = t.to(dot)
                c = tl.load(high + where + chunk * BLOCK_D)
                scores = tl.dot(rounded, c, scores, input_precision="tf32")
                if SPLIT:
                    scores = tl.dot((t - rounded.to(tl.float32)).to(dot), c, scores)
                    scores = tl.dot(rounded, tl.load(low + where + chunk * BLOCK_D), scores)
        scores += tl.load(constant + start + k)[None, :]
        # Elementwise: lanes are compared once, after the loop.
        if BITS > 0:
            bits = scores.to(tl.int32, bitcast=True) & (-1 << BITS)
            scores = (bits | (start // BLOCK_K)).to(tl.float32, bitcast=True)
        else:
            # Strictly greater: of equals the first block stays.
            block = tl.where(scores > best, start, block)
        second = tl.maximum(second, tl.minimum(best, scores))
        best = tl.maximum(best, scores)

    top = tl.max(best, 1)
    if BITS > 0:
        lane = tl.min(tl.where(best == top[:, None], k[None, :], BLOCK_K), 1)
        winner = (top.to(tl.int32, bitcast=True) & ((1 << BITS) - 1)) * BLOCK_K + lane
        others = tl.where(k[None, :] == lane[:, None], second, best)
    else:
        index = block + k[None, :]
        winner = tl.min(tl.where(best == top[:, None], index, 2147483647), 1)
        others = tl.maximum(second, tl.where(index == winner[:, None], -3.4e38, best))
    runner_up = tl.max(others, 1)

    longest = tl.load(bounds + 1)
    terms = ((3 * D if SPLIT else D) + 16) * (2.0**-23)
    slack = 1.25 * terms * (length + off) * longest + 0.5 * terms * longest * longest
    if COSINE:
        # The codes' own lengths are rounded too.
        slack = slack + terms * length * longest
    if BITS > 0:
        slack = slack + (2.0 ** (BITS - 23)) * ((length + off) * longest + 0.5 * longest * longest)
    if SPLIT:
        error = still_off * longest + (length + off) * tl.load(bounds + 3) + off * tl.load(bounds + 2)
    else:
        error = off * longest + (length + off) * tl.load(bounds + 2)
    margin = 2.0 * (error + slack)
    # NaN, and the difference of infinities, compare false: such a row is not sure. Without a usable code none is.
    sure = (top - runner_up > margin) & (top > -1e38) & (margin < float("inf"))
    return winner, sure, top, finite


@triton.jit
def _hand_on(row, still_open, open_rows, left):
    """Append rows to the list of the next look."""
    number = still_open.to(tl.int32)
    start = tl.atomic_add(left, tl.sum(number, 0).to(tl.int64))
    tl.store(open_rows + start + tl.cumsum(number, 0) - 1, row, mask=still_open)


@triton.jit
def _first_look(
    x, high, low, constant, centre, bounds, found, open_rows, left, N, K, D, stride_n, stride_d,
    EXACT: tl.constexpr, COSINE: tl.constexpr, CHUNKS: tl.constexpr, BITS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = row < N
    winner, sure, top, finite = _look(
        x, high, low, constant, centre, bounds, row, there, K, D, stride_n, stride_d,
        False, COSINE, CHUNKS, BITS, BLOCK_N, BLOCK_K, BLOCK_D,
    )  # fmt: skip
    if not EXACT:
        sure = (top > -1e38) & (top < float("inf"))
    tl.store(found + row, tl.where(finite, winner, -1).to(tl.int64), mask=there)
    _hand_on(row, there & finite & (sure == 0), open_rows, left)


@triton.jit
def _closer_look(
    x, high, low, constant, centre, bounds, found, rows, count, open_rows, left, N, K, D, stride_n, stride_d,
    COSINE: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    total = tl.load(count)
    for tile in range(tl.program_id(0), tl.cdiv(total, BLOCK_N), tl.num_programs(0)):
        place = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        there = place < total
        row = tl.load(rows + place, mask=there, other=0)
        winner, sure, _, _ = _look(
            x, high, low, constant, centre, bounds, row, there, K, D, stride_n, stride_d,
            True, COSINE, CHUNKS, 0, BLOCK_N, BLOCK_K, BLOCK_D,
        )  # fmt: skip
        tl.store(found + row, winner.to(tl.int64), mask=there & sure)
        _hand_on(row, there & (sure == 0), open_rows, left)


@triton.jit
def _last_look(
    x, codes, found, rows, count, K, D, stride_n, stride_d, code_stride_k, code_stride_d,
    COSINE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One row at a time, every code in float64."""
    for place in range(tl.program_id(0), tl.load(count), tl.num_programs(0)):
        row = tl.load(rows + place)
        best = tl.full((), float("-inf"), tl.float64)
        winner = tl.full((), -1, tl.int32)
        for start in range(0, K, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            usable = k < K
            length = tl.full((BLOCK_K,), 1.0, tl.float64)
            if COSINE:
                squares = tl.zeros((BLOCK_K,), tl.float64)
                for chunk in range(0, D, BLOCK_D):
                    c = _exact_codes(codes, k, chunk + tl.arange(0, BLOCK_D), K, D, code_stride_k, code_stride_d)
                    squares += tl.sum(c * c, 1)
                length = tl.sqrt(tl.where(squares > 0, squares, 1.0))
            score = tl.zeros((BLOCK_K,), tl.float64)
            for chunk in range(0, D, BLOCK_D):
                d = chunk + tl.arange(0, BLOCK_D)
                token = tl.load(x + row * stride_n + d.to(tl.int64) * stride_d, mask=d < D, other=0.0).to(tl.float64)
                c = _exact_codes(codes, k, d, K, D, code_stride_k, code_stride_d)
                usable = usable & (tl.max(tl.where(tl.abs(c) < float("inf"), 0, 1), 1) == 0)
                if COSINE:
                    score += tl.sum(token[None, :] * (c / length[:, None]), 1)
                else:
                    score -= tl.sum((token[None, :] - c) * (token[None, :] - c), 1)
            score = tl.where(usable, score, float("-inf"))
            top = tl.max(score, 0)
            first = tl.min(tl.where(score == top, k, 2147483647), 0)
            winner = tl.where(top > best, first, winner)
            best = tl.maximum(best, top)
        tl.store(found + row, winner.to(tl.int64))


@triton.jit
def _exact_codes(codes, k, d, K, D, stride_k, stride_d):
    where = codes + k.to(tl.int64)[:, None] * stride_k + d.to(tl.int64)[None, :] * stride_d
    return tl.load(where, mask=(k < K)[:, None] & (d < D)[None, :], other=0.0).to(tl.float64)
