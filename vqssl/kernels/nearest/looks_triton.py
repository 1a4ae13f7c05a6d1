"""The kernels of the looks; ``search_triton.py`` explains them and launches them.

Arguments that they share: tokens ``x`` (N, D) as given; ``rounded``, ``constant``, ``centre`` and ``bounds`` as
:class:`~vqssl.kernels.nearest.prepare_triton.PreparedCodes` has them; ``indices`` (N,), the results; ``rivals``
(N, RIVALS), the other codes of each close call, -1 where there are fewer; ``rows`` and ``count``, a list of rows to
look at and its length.
"""

import triton
import triton.language as tl

from vqssl.kernels.nearest.prepare_triton import PIECE, scale_of

__all__ = ["RIVALS", "close_calls", "first_look", "last_look"]

RIVALS = tl.constexpr(3)
"""Codes beside the best one that a close call may have."""


@triton.jit
def first_look(
    x, rounded, constant, centre, bounds, indices, rivals, close_rows, close_count, open_rows, open_count,
    N, K, D, stride_n, stride_d,
    COSINE: tl.constexpr, CHUNKS: tl.constexpr, BITS: tl.constexpr, ASSEMBLY: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write the best code of every row, and list the rows that are not certified; one program a tile of rows.

    BITS is 0 for a rounded precision, which certifies nothing. Otherwise the place of a block, and which half of the
    block, replace the last BITS bits of a score: that saves the registers of a tile of indices, and widens the margin.
    A half of a block is folded onto the other before anything is kept, which saves the same again.
    """
    dot: tl.constexpr = rounded.dtype.element_ty
    HALF: tl.constexpr = BLOCK_K // 2 if BITS > 0 else BLOCK_K
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = row < N
    d = tl.arange(0, BLOCK_D)
    factor, length, error, finite = _measure(
        x, row, inside, centre, bounds, D, stride_n, stride_d, COSINE, BLOCK_N, dot
    )
    if CHUNKS == 1:
        resident = _tokens(x, row, inside, d, centre, factor, D, stride_n, stride_d).to(dot)

    best = tl.full((BLOCK_N, HALF), -3.4e38, tl.float32)
    second = tl.full((BLOCK_N, HALF), -3.4e38, tl.float32)
    block = tl.zeros((BLOCK_N, HALF), tl.int32)
    k = tl.arange(0, BLOCK_K)
    half = tl.arange(0, HALF)
    for start in range(0, K, BLOCK_K):
        where = (start + k).to(tl.int64)[None, :] * (CHUNKS * BLOCK_D) + d[:, None]
        # The constant starts the accumulator, where the compiler would move it in some cases anyway.
        scores = tl.zeros((BLOCK_N, BLOCK_K), tl.float32) + tl.load(constant + start + k)[None, :]
        if CHUNKS == 1:
            scores = tl.dot(resident, tl.load(rounded + where), scores, input_precision="tf32")
        else:
            for chunk in range(CHUNKS):
                t = _tokens(x, row, inside, chunk * BLOCK_D + d, centre, factor, D, stride_n, stride_d)
                scores = tl.dot(t.to(dot), tl.load(rounded + where + chunk * BLOCK_D), scores, input_precision="tf32")
        # Column by column: the columns of a block are compared with each other only once, after the loop.
        if BITS > 0:
            left, right = tl.split(tl.permute(tl.reshape(scores, (BLOCK_N, 2, HALF)), (0, 2, 1)))
            place = start // HALF
            left, right = _marked(left, place, BITS, ASSEMBLY), _marked(right, place + 1, BITS, ASSEMBLY)
            larger, smaller = tl.maximum(left, right), tl.minimum(left, right)
            second = tl.maximum(tl.maximum(second, smaller), tl.minimum(best, larger))
            best = tl.maximum(best, larger)
        else:
            # Strictly greater: of equal scores the first block stays.
            block = tl.where(scores > best, start, block)
            best = tl.maximum(best, scores)

    top = tl.max(best, 1)
    if BITS == 0:
        index = block + k[None, :]
        winner = tl.min(tl.where(best == top[:, None], index, 2147483647), 1)
        near = (top > -1e38) & (top < float("inf")) & _beats_far_codes(length, top, 0.0, bounds, COSINE)
        tl.store(indices + row, tl.where(finite, winner, -1).to(tl.int64), mask=inside)
        _append(row, inside & finite & (near == 0), open_rows, open_count)
    else:
        longest = tl.load(bounds + 1)
        terms = (D + 16) * (2.0**-23)
        # Numbers that are subnormal in fp16 are aligned as 2^-14, also beside a large factor.
        LEAST: tl.constexpr = 2.0**-14
        slack = 1.25 * terms * (length + error + LEAST) * (longest + LEAST) + 0.5 * terms * longest * longest
        if COSINE:
            # The lengths of the codes are rounded too.
            slack = slack + terms * length * longest
        slack = slack + (2.0 ** (BITS - 23)) * ((length + error) * longest + 0.5 * longest * longest)
        rounding = error * longest + (length + error) * tl.load(bounds + 2)
        margin = 2.0 * (rounding + slack)
        # NaN, and the difference of two infinities, compare false, so that such a row is not certified. Without a
        # usable code no row is: its best score is then -3e38.
        usable = finite & (top > -1e38) & (margin < float("inf"))
        usable = usable & _beats_far_codes(length, top, margin, bounds, COSINE)
        column = tl.min(tl.where(best == top[:, None], half[None, :], HALF), 1)
        known = column < HALF
        winner = _code_of(top, column, BITS, BLOCK_K)
        tl.store(indices + row, tl.where(finite, winner, -1).to(tl.int64), mask=inside)
        # Behind the best of a column stands its second, behind that at most its like.
        rest = tl.where(half[None, :] == column[:, None], second, best)
        highest = tl.max(rest, 1)
        certified = usable & known & (top - highest > margin)
        for place in tl.static_range(RIVALS):
            column = tl.min(tl.where(rest == highest[:, None], half[None, :], HALF), 1)
            known = known & (column < HALF)
            rival = tl.where(top - highest > margin, -1, _code_of(highest, column, BITS, BLOCK_K))
            tl.store(rivals + row * RIVALS + place, rival, mask=inside & (certified == 0))
            rest = tl.where(half[None, :] == column[:, None], second, rest)
            highest = tl.max(rest, 1)
        close = usable & known & (certified == 0) & (top - highest > margin)
        _append(row, inside & close, close_rows, close_count)
        _append(row, inside & finite & (certified == 0) & (close == 0), open_rows, open_count)


@triton.jit
def close_calls(
    x, codes, indices, rivals, rows, count, D, stride_n, stride_d, code_stride_k, code_stride_d,
    COSINE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compare the codes of each listed row in float64: the best, and its rivals."""
    total = tl.load(count)
    for tile in range(tl.program_id(0), tl.cdiv(total, BLOCK_N), tl.num_programs(0)):
        place = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = place < total
        row = tl.load(rows + place, mask=inside, other=0)
        winner = tl.load(indices + row, mask=inside, other=0)
        best = _exact_scores(x, codes, row, winner, inside, D, stride_n, stride_d, code_stride_k, code_stride_d,
                             COSINE, BLOCK_N, BLOCK_D)  # fmt: skip
        for number in tl.static_range(RIVALS):
            rival = tl.load(rivals + row * RIVALS + number, mask=inside, other=-1).to(tl.int64)
            there = inside & (rival >= 0)
            if tl.sum(there.to(tl.int32), 0) > 0:
                score = _exact_scores(x, codes, row, rival, there, D, stride_n, stride_d, code_stride_k, code_stride_d,
                                      COSINE, BLOCK_N, BLOCK_D)  # fmt: skip
                better = there & ((score > best) | ((score == best) & (rival < winner)))
                winner = tl.where(better, rival, winner)
                best = tl.where(better, score, best)
        tl.store(indices + row, winner, mask=inside)


@triton.jit
def last_look(
    x, codes, bounds, indices, rows, count, K, D, stride_n, stride_d, code_stride_k, code_stride_d,
    COSINE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, EXACT_D: tl.constexpr,
):  # fmt: skip
    """Compare each listed row with every code in float32, and what is close in float64; one row at a time.

    Of each column of the blocks best and second are kept. Where a second is close too, a third may hide behind it, and
    every code is compared in float64.
    """
    scale = scale_of(bounds, COSINE)
    for place in range(tl.program_id(0), tl.load(count), tl.num_programs(0)):
        row = tl.load(rows + place)
        token = x + row * stride_n
        factor, length = _token_scale(token, D, stride_d, scale, COSINE, BLOCK_D)
        best = tl.full((BLOCK_K,), float("-inf"), tl.float32)
        second = tl.full((BLOCK_K,), float("-inf"), tl.float32)
        block = tl.zeros((BLOCK_K,), tl.int32)
        k = tl.arange(0, BLOCK_K)
        for start in range(0, K, BLOCK_K):
            score = _rough_scores(token, codes, start + k, factor, K, D, stride_d, code_stride_k, code_stride_d,
                                  COSINE, BLOCK_K, BLOCK_D)  # fmt: skip
            block = tl.where(score > best, start, block)
            second = tl.maximum(second, tl.minimum(best, score))
            best = tl.maximum(best, score)
        top = tl.max(best, 0)
        # Each sum is off by less than this share of what it adds up, and by what is flushed to zero.
        roundoff = (D + 16) * (2.0**-23)
        threshold = top + 3.0 * roundoff * tl.where(COSINE, -length, top) - 1e-30
        hidden = tl.sum((second >= threshold).to(tl.int32), 0)
        if (hidden == 0) & (top > float("-inf")) & (top < float("inf")):
            candidate = tl.where(best >= threshold, block + k, K)
            exact = _exact_row(token, codes, candidate, K, D, stride_d, code_stride_k, code_stride_d,
                               COSINE, BLOCK_K, EXACT_D)  # fmt: skip
            highest = tl.max(exact, 0)
            winner = tl.min(tl.where(exact == highest, candidate, 2147483647), 0)
        else:
            highest = tl.full((), float("-inf"), tl.float64)
            winner = tl.full((), -1, tl.int32)
            for start in range(0, K, BLOCK_K):
                exact = _exact_row(token, codes, start + k, K, D, stride_d, code_stride_k, code_stride_d,
                                   COSINE, BLOCK_K, EXACT_D)  # fmt: skip
                here = tl.max(exact, 0)
                first = tl.min(tl.where(exact == here, start + k, 2147483647), 0)
                winner = tl.where(here > highest, first, winner)
                highest = tl.maximum(highest, here)
        tl.store(indices + row, winner.to(tl.int64))


@triton.jit
def _marked(scores, place, BITS: tl.constexpr, ASSEMBLY: tl.constexpr):
    """Return the scores with ``place`` in their last BITS bits."""
    bits = scores.to(tl.int32, bitcast=True)
    if ASSEMBLY:  # (bits & mask) | place in one instruction, where the compiler makes two
        marked = tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, $3, 0xEA;",
            "=r,r,r,r",
            [bits, -1 << BITS, place],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        marked = (bits & (-1 << BITS)) | place
    return marked.to(tl.float32, bitcast=True)


@triton.jit
def _code_of(score, column, BITS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Return the index of the code whose marked score this is."""
    return (score.to(tl.int32, bitcast=True) & ((1 << BITS) - 1)) * (BLOCK_K // 2) + column


@triton.jit
def _beats_far_codes(length, top, margin, bounds, COSINE: tl.constexpr):
    """Return True where the best code is nearer than any of the far codes, which have no score, can be.

    The nearest far code is 1 / bounds[3] away from the centre, so at least that less |x| from the token. The best code
    is at most ``√(|x|² - 2 top + margin)`` from it. One percent is left for the rounding of both.
    """
    near = top == top
    if not COSINE:  # codes of length 1 are never far
        reach = length + tl.sqrt(tl.maximum(length * length - 2.0 * top + margin, 0.0))
        near = reach * tl.load(bounds + 3) < 0.99
    return near


@triton.jit
def _measure(
    x, row, inside, centre, bounds, D, stride_n, stride_d,
    COSINE: tl.constexpr, BLOCK_N: tl.constexpr, dot: tl.constexpr,
):  # fmt: skip
    """Return, for a tile of rows: scale, length, length of the rounding error, and finiteness.

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
    for start in range(0, D, WIDTH):
        t = _tokens(x, row, inside, start + d, centre, factor, D, stride_n, stride_d)
        rest = t - t.to(dot).to(tl.float32)
        squares += tl.sum(t * t, 1)
        error += tl.sum(rest * rest, 1)
    return factor, tl.sqrt(squares), tl.sqrt(error), nonfinite == 0


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
def _codes(codes, k, d, K, D, stride_k, stride_d):
    """Load ``(BLOCK_K, BLOCK_D)`` codes as given, zeros outside."""
    where = codes + k.to(tl.int64)[:, None] * stride_k + d.to(tl.int64)[None, :] * stride_d
    return tl.load(where, mask=(k < K)[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def _token(token, d, D, stride_d):
    """Load ``(BLOCK_D,)`` entries of one token as given, zeros outside."""
    return tl.load(token + d.to(tl.int64) * stride_d, mask=d < D, other=0.0)


@triton.jit
def _token_scale(token, D, stride_d, scale, COSINE: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return the factor of one token, and for cosine its length after that."""
    factor = scale
    squares = tl.zeros((), tl.float32)
    if COSINE:
        largest = tl.zeros((), tl.float32)
        for chunk in range(0, D, BLOCK_D):
            entries = _token(token, chunk + tl.arange(0, BLOCK_D), D, stride_d).to(tl.float32)
            largest = tl.maximum(largest, tl.max(tl.abs(entries), 0))
        factor = scale / tl.where(largest > 0, largest, 1.0)
        for chunk in range(0, D, BLOCK_D):
            entries = _token(token, chunk + tl.arange(0, BLOCK_D), D, stride_d).to(tl.float32) * factor
            squares += tl.sum(entries * entries, 0)
    return factor, tl.sqrt(squares)


@triton.jit
def _rough_scores(
    token, codes, k, factor, K, D, stride_d, code_stride_k, code_stride_d,
    COSINE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Return ``(BLOCK_K,)`` scores of one token in float32: -|x - c|² or cosine, scaled; -inf for unusable codes."""
    usable = k < K
    largest = tl.zeros((BLOCK_K,), tl.float32)
    if COSINE:
        for chunk in range(0, D, BLOCK_D):
            c = _codes(codes, k, chunk + tl.arange(0, BLOCK_D), K, D, code_stride_k, code_stride_d).to(tl.float32)
            largest = tl.maximum(largest, tl.max(tl.abs(c), 1))
        largest = tl.where(largest > 0, largest, 1.0)
    score = tl.zeros((BLOCK_K,), tl.float32)
    squares = tl.zeros((BLOCK_K,), tl.float32)
    for chunk in range(0, D, BLOCK_D):
        d = chunk + tl.arange(0, BLOCK_D)
        entries = _token(token, d, D, stride_d).to(tl.float32)
        c = _codes(codes, k, d, K, D, code_stride_k, code_stride_d).to(tl.float32)
        usable = usable & (tl.max(tl.where(tl.abs(c) < float("inf"), 0, 1), 1) == 0)
        if COSINE:
            c = c / largest[:, None]
            score += tl.sum((entries * factor)[None, :] * c, 1)
            squares += tl.sum(c * c, 1)
        else:
            away = (entries[None, :] - c) * factor
            score -= tl.sum(away * away, 1)
    if COSINE:
        score = score / tl.sqrt(tl.where(squares > 0, squares, 1.0))
        score = tl.where(score == score, score, float("inf"))  # maxima skip NaN
    return tl.where(usable, score, float("-inf"))


@triton.jit
def _exact_row(
    token, codes, k, K, D, stride_d, code_stride_k, code_stride_d,
    COSINE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Return ``(BLOCK_K,)`` scores of one token in float64, from the values as given; -inf for unusable codes."""
    usable = k < K
    length = tl.full((BLOCK_K,), 1.0, tl.float64)
    if COSINE:
        squares = tl.zeros((BLOCK_K,), tl.float64)
        for chunk in range(0, D, BLOCK_D):
            c = _codes(codes, k, chunk + tl.arange(0, BLOCK_D), K, D, code_stride_k, code_stride_d).to(tl.float64)
            squares += tl.sum(c * c, 1)
        length = tl.sqrt(tl.where(squares > 0, squares, 1.0))
    score = tl.zeros((BLOCK_K,), tl.float64)
    for chunk in range(0, D, BLOCK_D):
        d = chunk + tl.arange(0, BLOCK_D)
        entries = _token(token, d, D, stride_d).to(tl.float64)
        c = _codes(codes, k, d, K, D, code_stride_k, code_stride_d).to(tl.float64)
        usable = usable & (tl.max(tl.where(tl.abs(c) < float("inf"), 0, 1), 1) == 0)
        if COSINE:
            score += tl.sum(entries[None, :] * (c / length[:, None]), 1)
        else:
            score -= tl.sum((entries[None, :] - c) * (entries[None, :] - c), 1)
    return tl.where(usable, score, float("-inf"))


@triton.jit
def _exact_scores(
    x, codes, row, code, inside, D, stride_n, stride_d, code_stride_k, code_stride_d,
    COSINE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Return ``(BLOCK_N,)`` scores in float64, of each row with a code of its own; the codes are usable."""
    length = tl.full((BLOCK_N,), 1.0, tl.float64)
    if COSINE:
        squares = tl.zeros((BLOCK_N,), tl.float64)
        for chunk in range(0, D, BLOCK_D):
            d = chunk + tl.arange(0, BLOCK_D)
            c = _given(codes, code, inside, d, D, code_stride_k, code_stride_d).to(tl.float64)
            squares += tl.sum(c * c, 1)
        length = tl.sqrt(tl.where(squares > 0, squares, 1.0))
    score = tl.zeros((BLOCK_N,), tl.float64)
    for chunk in range(0, D, BLOCK_D):
        d = chunk + tl.arange(0, BLOCK_D)
        t = _given(x, row, inside, d, D, stride_n, stride_d).to(tl.float64)
        c = _given(codes, code, inside, d, D, code_stride_k, code_stride_d).to(tl.float64)
        if COSINE:
            score += tl.sum(t * (c / length[:, None]), 1)
        else:
            score -= tl.sum((t - c) * (t - c), 1)
    return score


@triton.jit
def _append(row, listed, rows, count):
    """Append rows to a list."""
    number = listed.to(tl.int32)
    start = tl.atomic_add(count, tl.sum(number, 0).to(tl.int64))
    tl.store(rows + start + tl.cumsum(number, 0) - 1, row, mask=listed)
