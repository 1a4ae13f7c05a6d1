"""The kernels of the three looks; ``search_triton.py`` explains them and launches them.

Arguments that they share: tokens ``x`` (N, D) as given; ``high``, ``low``, ``constant``, ``centre`` and ``bounds`` as
:class:`~vqssl.kernels.nearest.prepare_triton.PreparedCodes` has them; ``indices`` (N,), the results; ``rows`` and
``count``, the list of rows to look at and its length; ``open_rows`` and ``open_count``, the list for the next look.
"""

import triton
import triton.language as tl

from vqssl.kernels.nearest.prepare_triton import PIECE, scale_of

__all__ = ["closer_look", "first_look", "last_look"]


@triton.jit
def first_look(
    x, high, low, constant, centre, bounds, indices, open_rows, open_count, N, K, D, stride_n, stride_d,
    EXACT: tl.constexpr, COSINE: tl.constexpr, CHUNKS: tl.constexpr, BITS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write the best code of every row, and list the rows that are not certified; one program a tile of rows."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = row < N
    winner, certified, top, finite = _compare(
        x, high, low, constant, centre, bounds, row, inside, K, D, stride_n, stride_d,
        False, COSINE, CHUNKS, BITS, BLOCK_N, BLOCK_K, BLOCK_D,
    )  # fmt: skip
    if not EXACT:
        certified = (top > -1e38) & (top < float("inf"))
    tl.store(indices + row, tl.where(finite, winner, -1).to(tl.int64), mask=inside)
    _append(row, inside & finite & (certified == 0), open_rows, open_count)


@triton.jit
def closer_look(
    x, high, low, constant, centre, bounds, indices, rows, count, open_rows, open_count, N, K, D, stride_n, stride_d,
    COSINE: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compare the listed rows by split products, and list those that are still not certified."""
    total = tl.load(count)
    for tile in range(tl.program_id(0), tl.cdiv(total, BLOCK_N), tl.num_programs(0)):
        place = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = place < total
        row = tl.load(rows + place, mask=inside, other=0)
        winner, certified, _, _ = _compare(
            x, high, low, constant, centre, bounds, row, inside, K, D, stride_n, stride_d,
            True, COSINE, CHUNKS, 0, BLOCK_N, BLOCK_K, BLOCK_D,
        )  # fmt: skip
        tl.store(indices + row, winner.to(tl.int64), mask=inside & certified)
        _append(row, inside & (certified == 0), open_rows, open_count)


@triton.jit
def last_look(
    x, codes, indices, rows, count, K, D, stride_n, stride_d, code_stride_k, code_stride_d,
    COSINE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compare each listed row with every code in float64, one row at a time."""
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
        tl.store(indices + row, winner.to(tl.int64))


@triton.jit
def _compare(
    x, high, low, constant, centre, bounds, row, inside, K, D, stride_n, stride_d,
    SPLIT: tl.constexpr, COSINE: tl.constexpr, CHUNKS: tl.constexpr, BITS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Return, for a tile of rows: the index of the best score, whether it is certified, the score, and finiteness.

    With BITS > 0, the index of the block replaces the last bits of the score. That saves a sixth of the registers and
    widens the margin; the index is then right only for certified rows.
    """
    dot: tl.constexpr = high.dtype.element_ty
    d = tl.arange(0, BLOCK_D)
    factor, length, error, split_error, finite = _measure(
        x, row, inside, centre, bounds, D, stride_n, stride_d, SPLIT, COSINE, BLOCK_N, dot
    )
    if CHUNKS == 1:
        t = _tokens(x, row, inside, d, centre, factor, D, stride_n, stride_d)
        resident = t.to(dot)
        remainder = (t - resident.to(tl.float32)).to(dot)

    best = tl.full((BLOCK_N, BLOCK_K), -3.4e38, tl.float32)
    second = tl.full((BLOCK_N, BLOCK_K), -3.4e38, tl.float32)
    block = tl.zeros((BLOCK_N, BLOCK_K), tl.int32)
    k = tl.arange(0, BLOCK_K)
    for start in range(0, K, BLOCK_K):
        where = (start + k).to(tl.int64)[None, :] * (CHUNKS * BLOCK_D) + d[:, None]
        scores = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        if not SPLIT:  # the constant starts the accumulator, where the compiler would move it in some cases anyway
            scores += tl.load(constant + start + k)[None, :]
        if CHUNKS == 1:
            c = tl.load(high + where)
            scores = tl.dot(resident, c, scores, input_precision="tf32")
            if SPLIT:
                scores = tl.dot(remainder, c, scores)
                scores = tl.dot(resident, tl.load(low + where), scores)
        else:
            for chunk in range(CHUNKS):
                t = _tokens(x, row, inside, chunk * BLOCK_D + d, centre, factor, D, stride_n, stride_d)
                rounded = t.to(dot)
                c = tl.load(high + where + chunk * BLOCK_D)
                scores = tl.dot(rounded, c, scores, input_precision="tf32")
                if SPLIT:
                    scores = tl.dot((t - rounded.to(tl.float32)).to(dot), c, scores)
                    scores = tl.dot(rounded, tl.load(low + where + chunk * BLOCK_D), scores)
        if SPLIT:
            scores += tl.load(constant + start + k)[None, :]
        # Column by column: the columns of a block are compared with each other only once, after the loop.
        if BITS > 0:
            bits = scores.to(tl.int32, bitcast=True) & (-1 << BITS)
            scores = (bits | (start // BLOCK_K)).to(tl.float32, bitcast=True)
        else:
            # Strictly greater: of equal scores the first block stays.
            block = tl.where(scores > best, start, block)
        second = tl.maximum(second, tl.minimum(best, scores))
        best = tl.maximum(best, scores)

    top = tl.max(best, 1)
    if BITS > 0:
        column = tl.min(tl.where(best == top[:, None], k[None, :], BLOCK_K), 1)
        winner = (top.to(tl.int32, bitcast=True) & ((1 << BITS) - 1)) * BLOCK_K + column
        others = tl.where(k[None, :] == column[:, None], second, best)
    else:
        index = block + k[None, :]
        winner = tl.min(tl.where(best == top[:, None], index, 2147483647), 1)
        others = tl.maximum(second, tl.where(index == winner[:, None], -3.4e38, best))
    runner_up = tl.max(others, 1)

    longest = tl.load(bounds + 1)
    terms = ((3 * D if SPLIT else D) + 16) * (2.0**-23)
    slack = 1.25 * terms * (length + error) * longest + 0.5 * terms * longest * longest
    if COSINE:
        # The lengths of the codes are rounded too.
        slack = slack + terms * length * longest
    if BITS > 0:
        slack = slack + (2.0 ** (BITS - 23)) * ((length + error) * longest + 0.5 * longest * longest)
    if SPLIT:
        rounding = split_error * longest + (length + error) * tl.load(bounds + 3) + error * tl.load(bounds + 2)
    else:
        rounding = error * longest + (length + error) * tl.load(bounds + 2)
    # Numbers that are subnormal in fp16 are aligned as 2^-14.
    SUBNORMAL: tl.constexpr = ((3 if SPLIT else 1) * CHUNKS * BLOCK_D + 16) * (2.0**-51)
    margin = 2.0 * (rounding + slack + SUBNORMAL)
    # NaN, and the difference of two infinities, compare false, so that such a row is not certified. Without a usable
    # code no row is: its best score is then -3e38.
    certified = (top - runner_up > margin) & (top > -1e38) & (margin < float("inf"))
    return winner, certified, top, finite


@triton.jit
def _measure(
    x, row, inside, centre, bounds, D, stride_n, stride_d,
    SPLIT: tl.constexpr, COSINE: tl.constexpr, BLOCK_N: tl.constexpr, dot: tl.constexpr,
):  # fmt: skip
    """Return, for a tile of rows: scale, length, error of the rounded token without and with remainder, finiteness.

    Reads the tokens in narrow pieces, to leave the registers to the loop over the codes.
    """
    WIDTH: tl.constexpr = PIECE
    d = tl.arange(0, WIDTH)
    largest = tl.zeros((BLOCK_N,), tl.float32)
    nonfinite = tl.zeros((BLOCK_N,), tl.int32)
    for start in range(0, D, WIDTH):
        given = tl.abs(_given(x, row, inside, start + d, D, stride_n, stride_d))
        largest = tl.maximum(largest, tl.max(given, 1))
        nonfinite = tl.maximum(nonfinite, tl.max(tl.where(given < float("inf"), 0, 1), 1))
    factor = tl.zeros((BLOCK_N,), tl.float32) + scale_of(bounds, COSINE)
    if COSINE:
        factor = factor / tl.where(largest > 0, largest, 1.0)
    squares = tl.zeros((BLOCK_N,), tl.float32)
    error = tl.zeros((BLOCK_N,), tl.float32)
    split_error = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, D, WIDTH):
        t = _tokens(x, row, inside, start + d, centre, factor, D, stride_n, stride_d)
        rest = t - t.to(dot).to(tl.float32)
        squares += tl.sum(t * t, 1)
        error += tl.sum(rest * rest, 1)
        if SPLIT:
            rest = rest - rest.to(dot).to(tl.float32)
            split_error += tl.sum(rest * rest, 1)
    return factor, tl.sqrt(squares), tl.sqrt(error), tl.sqrt(split_error), nonfinite == 0


@triton.jit
def _tokens(x, row, inside, d, centre, factor, D, stride_n, stride_d):
    """Load ``(BLOCK_N, BLOCK_D)`` tokens, centred and scaled, before rounding."""
    return (_given(x, row, inside, d, D, stride_n, stride_d) - tl.load(centre + d)[None, :]) * factor[:, None]


@triton.jit
def _given(x, row, inside, d, D, stride_n, stride_d):
    """Load ``(BLOCK_N, BLOCK_D)`` tokens as given, as float32, zeros outside."""
    where = x + row[:, None] * stride_n + d.to(tl.int64)[None, :] * stride_d
    return tl.load(where, mask=inside[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _exact_codes(codes, k, d, K, D, stride_k, stride_d):
    """Load ``(BLOCK_K, BLOCK_D)`` codes as given, as float64, zeros outside."""
    where = codes + k.to(tl.int64)[:, None] * stride_k + d.to(tl.int64)[None, :] * stride_d
    return tl.load(where, mask=(k < K)[:, None] & (d < D)[None, :], other=0.0).to(tl.float64)


@triton.jit
def _append(row, still_open, open_rows, open_count):
    """Append rows to the list of the next look."""
    number = still_open.to(tl.int32)
    start = tl.atomic_add(open_count, tl.sum(number, 0).to(tl.int64))
    tl.store(open_rows + start + tl.cumsum(number, 0) - 1, row, mask=still_open)
