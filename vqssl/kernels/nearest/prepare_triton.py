"""Codes as the Triton kernels score them: centred, scaled, rounded, with the constants and the error bounds.

Nothing here needs the exact mean or the exact largest entry: any centre and any scale leave the winners as they are.
So both come from a sample of the codes.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqssl.kernels.nearest.tuning import Config

__all__ = ["FAR", "PIECE", "SAMPLE", "PreparedCodes", "prepare", "round_codes", "sample_centre", "scale_of"]

SAMPLE = 256
"""Codes whose mean is the centre and whose largest entry sets the scale."""
PIECE = tl.constexpr(32)
"""Width of the pieces in which the centre is made and the lengths of tokens are summed."""
FAR = tl.constexpr(2048.0)
"""A code with an entry beyond this, after scaling, is far: it gets no score, and does not widen the others' margins."""
# The number of codes is padded to a multiple of this, and of the block size: both are powers of two.
_PADDING = 128


class PreparedCodes(NamedTuple):
    """Codes as they are scored."""

    tensors: tuple[Tensor, Tensor, Tensor, Tensor]
    """Rounded codes ``(K', D')``, constants ``(K',)``, centre ``(D',)`` and bounds ``(4,)``.

    Padded with zeros, and constants of -3e38, so that no inner loop needs a mask. Far codes are padded over too. The
    bounds are: the spread of the sample, which sets the scale; the length of the longest code; the largest error of a
    rounded code; and 1 / length of the nearest far code, 0 if none is far.
    """
    chunks: int
    """How many pieces of the configuration's ``block_d`` the width D' has."""


def prepare(codebook: Tensor, metric: str, dtype: torch.dtype, config: Config) -> PreparedCodes:
    """Round the codes ``(K, D)`` to ``dtype``, for the block sizes of ``config``."""
    size, width = codebook.shape
    padded = triton.cdiv(size, max(_PADDING, config.block_k)) * max(_PADDING, config.block_k)
    chunks = triton.cdiv(width, config.block_d)
    wide = chunks * config.block_d
    rounded = torch.empty((padded, wide), dtype=dtype, device=codebook.device)
    constant = torch.empty(padded, dtype=torch.float32, device=codebook.device)
    # The centre is read in whole pieces, also if the tokens are narrower than one.
    pieces = triton.cdiv(wide, PIECE.value)
    centre = torch.empty(pieces * PIECE.value, dtype=torch.float32, device=codebook.device)
    bounds = torch.zeros(4, dtype=torch.float32, device=codebook.device)
    cosine = metric == "cosine"
    sample_centre[(pieces,)](
        codebook, centre, bounds, size, width, *codebook.stride(), COSINE=cosine, SAMPLE=SAMPLE, BLOCK_D=PIECE.value
    )
    round_codes[(triton.cdiv(padded, 16),)](
        codebook, rounded, constant, centre, bounds, size, width, padded, *codebook.stride(),
        COSINE=cosine, CHUNKS=chunks, BLOCK_K=16, BLOCK_D=config.block_d,
    )  # fmt: skip
    return PreparedCodes((rounded, constant, centre, bounds), chunks)


@triton.jit
def sample_centre(
    codes, centre, bounds, K, D, stride_k, stride_d,
    COSINE: tl.constexpr, SAMPLE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compute the mean of a sample of codes (zeros for cosine, and beyond D) and the largest distance from it."""
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    step = tl.maximum(K // SAMPLE, 1)
    k = tl.arange(0, SAMPLE) * step
    inside = (k < K)[:, None] & (d < D)[None, :]
    c = tl.load(codes + k.to(tl.int64)[:, None] * stride_k + d.to(tl.int64)[None, :] * stride_d, mask=inside, other=0.0)
    c = c.to(tl.float32)
    finite = inside & (tl.abs(c) < float("inf"))
    # A few codes far away would move the mean, and hide the spread of the others: entries far from the first mean, as
    # measured by the mean distance, are left out.
    mean = _column_mean(c, finite)
    distance = tl.abs(c - mean[None, :])
    kept = finite & (distance <= 16.0 * _column_mean(distance, finite)[None, :])
    mean = _column_mean(c, kept)
    if COSINE:
        mean = mean * 0.0
    mean = tl.where(tl.abs(mean) < float("inf"), mean, 0.0)
    tl.store(centre + d, mean)
    spread = tl.max(tl.max(tl.where(kept, tl.abs(c - mean[None, :]), 0.0), 1), 0)
    tl.atomic_max(bounds, tl.where(spread < float("inf"), spread, 0.0))


@triton.jit
def _column_mean(values, counted):
    """Return the mean of what is counted in each column, 0 where nothing is."""
    number = tl.maximum(tl.sum(counted.to(tl.float32), 0), 1.0)
    # Divided first: sums of very large values would leave the range.
    return tl.sum(tl.where(counted, values, 0.0) / number[None, :], 0)


@triton.jit
def scale_of(bounds, COSINE: tl.constexpr):
    """Return the factor that brings the sample's largest entry to about 64, the middle of fp16's range."""
    if COSINE:
        return 64.0
    spread = tl.load(bounds)
    # A power of two rounds nothing. Within 2^-60 and 2^60, because beyond them squares leave the range of float32.
    exponent = tl.minimum(tl.maximum(tl.floor(tl.log2(tl.maximum(spread, 1e-37))), -60.0), 60.0)
    return tl.where(spread > 0, tl.exp2(6.0 - exponent), 1.0)


@triton.jit
def round_codes(
    codes, rounded, constant, centre, bounds, K, D, padded, stride_k, stride_d,
    COSINE: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write centred, scaled and rounded codes and their constants, and raise the bounds to cover them."""
    scale = scale_of(bounds, COSINE)
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    largest = tl.zeros((BLOCK_K,), tl.float32)
    usable = k < K
    for chunk in range(CHUNKS):
        d = chunk * BLOCK_D + tl.arange(0, BLOCK_D)
        c = _codes(codes, k, d, K, D, stride_k, stride_d)
        usable = usable & (tl.max(tl.where(tl.abs(c) < float("inf"), 0, 1), 1) == 0)
        if not COSINE:
            c = tl.where((d < D)[None, :], (c - tl.load(centre + d)[None, :]) * scale, 0.0)
        largest = tl.maximum(largest, tl.max(tl.abs(c), 1))
    far = largest < 0.0
    factor = tl.zeros((BLOCK_K,), tl.float32) + scale
    if COSINE:
        # Divided by the largest entry first: squares of very small or large codes would leave the range.
        largest = tl.where((largest > 0) & usable, largest, 1.0)
        squares = tl.zeros((BLOCK_K,), tl.float32)
        for chunk in range(CHUNKS):
            c = _codes(codes, k, chunk * BLOCK_D + tl.arange(0, BLOCK_D), K, D, stride_k, stride_d)
            c = tl.where(usable[:, None], c, 0.0) / largest[:, None]
            squares += tl.sum(c * c, 1)
        factor = scale / tl.sqrt(tl.where(squares > 0, squares, 1.0))
    else:
        far = usable & (largest > FAR)
    squares = tl.zeros((BLOCK_K,), tl.float32)
    error = tl.zeros((BLOCK_K,), tl.float32)
    for chunk in range(CHUNKS):
        d = chunk * BLOCK_D + tl.arange(0, BLOCK_D)
        c = _codes(codes, k, d, K, D, stride_k, stride_d)
        c = tl.where(usable[:, None] & (d < D)[None, :], c, 0.0)
        if COSINE:
            c = c / largest[:, None] * factor[:, None]
        else:
            c = tl.where(usable[:, None], (c - tl.load(centre + d)[None, :]) * scale, 0.0)
        squares += tl.sum(c * c, 1)
        c = tl.where(far[:, None], 0.0, c)
        written = c.to(rounded.dtype.element_ty)
        rest = c - written.to(tl.float32)
        error += tl.sum(rest * rest, 1)
        where = k.to(tl.int64)[:, None] * (CHUNKS * BLOCK_D) + d[None, :]
        tl.store(rounded + where, written, mask=(k < padded)[:, None])
    score = -0.5 * squares
    if COSINE:
        score = score * 0.0
    # Finite instead of -inf: with a place in its last bits, it must still be a number.
    tl.store(constant + k, tl.where(usable & (far == 0), score, -3e38), mask=k < padded)
    # The square root of what overflowed is at least 1.8e19.
    nearest_far = 1.0 / tl.minimum(tl.sqrt(tl.where(far, squares, 1.0)), 1.8e19)
    tl.atomic_max(bounds + 1, tl.max(_infinity_for_nan(tl.sqrt(tl.where(far, 0.0, squares))), 0))
    tl.atomic_max(bounds + 2, tl.max(_infinity_for_nan(tl.sqrt(error)), 0))
    tl.atomic_max(bounds + 3, tl.max(tl.where(far, nearest_far, 0.0), 0))


@triton.jit
def _infinity_for_nan(x):
    """Replace NaN by infinity: maxima skip NaN, and an infinite bound leaves every row open."""
    return tl.where(x == x, x, float("inf"))


@triton.jit
def _codes(codes, k, d, K, D, stride_k, stride_d):
    """Load ``(BLOCK_K, BLOCK_D)`` codes as given, as float32, zeros outside."""
    where = codes + k.to(tl.int64)[:, None] * stride_k + d.to(tl.int64)[None, :] * stride_d
    return tl.load(where, mask=(k < K)[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
