"""Codes as the product takes them: centred, scaled and padded."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from vqssl.kernels.nearest.margin import Bound
from vqssl.kernels.nearest.rule import exact_codes
from vqssl.kernels.workspace import Workspace

__all__ = ["GROUP", "Prepared", "lengths_as_scored", "prepare", "tokens_as_scored"]

GROUP = 64
"""Codes per group of the two-level maximum."""
SAMPLE = 128
"""Codes whose median is the centre."""
PIECE = 2**17
"""Most entries of codes that are held in float64 at once."""


class Prepared(NamedTuple):
    """Codes prepared for scoring."""

    weight: Tensor
    """``(K', D)``: centred and scaled codes, of length 1 for cosine. K' is K rounded up to whole groups."""
    constant: Tensor
    """``(K',)``: -|c|²/2 of each row of the weight, zero for cosine, and -inf beyond K."""
    centre: Tensor | None
    """``(D,)``: what is subtracted from scaled tokens and codes."""
    scale: float
    """The power of 2 that tokens and codes are multiplied by before."""
    bound: Bound
    """The error bound of the scores."""


def prepare(codes: Tensor, metric: str, work: torch.dtype, memory: Workspace) -> Prepared:
    """Prepare finite codes ``(K, D)``, K >= 1, for products in the dtype ``work``."""
    count, width = codes.shape
    weight = memory.empty("weight", work, codes.device, count + -count % GROUP, width)
    weight[count:] = 0.0
    own = weight[:count]
    constant = weight.new_full((len(weight),), -torch.inf)
    if metric == "cosine":
        own.copy_(exact_codes(codes, metric))
        constant[:count] = 0.0
        return Prepared(weight, constant, None, 1.0, Bound.of(width, work, weight.new_tensor(1.001), False))
    # One centre for all features: a large common mean would make all scores, and their rounding, large. The median of
    # a sample instead of the mean of all: a few far codes do not move it.
    sample = codes[torch.linspace(0, count - 1, min(count, SAMPLE), dtype=torch.float64, device=codes.device).long()]
    centre = sample.to(work).median(0).values
    torch.sub(codes, centre, out=own)
    lengths = _lengths(own)
    scale = _scale(lengths, work)
    if scale != 1.0:
        centre = centre * scale
        torch.sub(codes.to(work).mul(scale), centre, out=own)
        lengths = _lengths(own)
    constant[:count] = lengths.square().mul_(-0.5)
    longest = lengths.amax().add_(1e-150).to(work) * (1.0 + torch.finfo(work).eps)  # a square below 1e-300 is lost
    return Prepared(weight, constant, centre, scale, Bound.of(width, work, longest, True))


def tokens_as_scored(x: Tensor, codes: Prepared, memory: Workspace) -> Tensor:
    """Return tokens ``(R, D)`` scaled and centred as the codes, in memory that the next call overwrites."""
    tokens = memory.empty("tokens", codes.weight.dtype, x.device, *x.shape)
    if codes.scale != 1.0:
        x = x.to(tokens.dtype).mul(codes.scale)
    return tokens.copy_(x) if codes.centre is None else torch.sub(x, codes.centre, out=tokens)


def lengths_as_scored(tokens: Tensor) -> Tensor:
    """Return at least the lengths of tokens ``(R, D)``, and at most a rounding more: ``(R,)``.

    Squares may be lost below the smallest normal number, so that what they add up to at most is added.
    """
    lost = 4 * tokens.shape[1] * torch.finfo(tokens.dtype).tiny
    return torch.mv(tokens.square(), tokens.new_ones(tokens.shape[1])).add_(lost).sqrt_()


def _lengths(codes: Tensor) -> Tensor:
    """Return the lengths of codes in float64: ``(K, D) -> (K,)``."""
    # In pieces that stay in the cache, which takes a tenth of the time of all at once.
    return torch.cat([part.double().norm(dim=1) for part in codes.split(max(1, PIECE // codes.shape[1]))])


def _scale(lengths: Tensor, work: torch.dtype) -> float:
    """Return 1, or the power of 2 that brings common lengths near 1 where their squares might leave the dtype."""
    longest, common = float(lengths.amax()), float(lengths[lengths > 0].median())
    room = -math.log2(torch.finfo(work).tiny) / 8
    if not math.isfinite(longest) or math.isnan(common):
        return 1.0
    if abs(math.log2(common)) < room and math.log2(longest) < 3 * room:
        return 1.0
    exponent = min(-math.log2(common), 3 * room - math.log2(longest), 8 * room)
    return 2.0 ** round(max(exponent, -8 * room))
