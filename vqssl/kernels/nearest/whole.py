"""Scores without rounding: where the entries of tokens and codes are small whole multiples of one power of 2.

Ties between different codes are common there (one-hot codes, grids, images of a few grey levels), and no margin above 0
can tell them from close calls. Where nothing is rounded, none is needed.
"""

import math

import torch
from torch import Tensor

from vqssl.kernels.nearest.rule import exact_codes

__all__ = ["nearest_without_rounding"]

TILE = 2**18
"""Most scores and most entries of tokens that are held in float64 at once: 2 MB."""
TOKEN_BITS = 4
"""Tokens may be up to 2^4 times as large as the codes."""


def nearest_without_rounding(x: Tensor, codes: Tensor, metric: str) -> Tensor:
    """Return the index of the nearest code where float64 computes all scores without rounding, -1 elsewhere.

    If all entries are multiples of q, codes up to ``2^b q`` and tokens up to ``2^(b+4) q``, squared differences are
    multiples of q² up to ``2^(2b+9) q²``, and so are twice the scores ``x·c - |c|²/2`` and every sum on the way. D of
    them fit the 53 bits of float64 if ``2b + 9 + log2(D) <= 53``. The rule rounds nothing then, and neither does a
    product: the first of the best scores is the answer.

    Args:
        x: finite tokens ``(N, D)``.
        codes: finite codes ``(K, D)``.
        metric: as in :mod:`vqssl.kernels.nearest.rule`.
    """
    found = torch.full((len(x),), -1, dtype=torch.int64, device=x.device)
    weight = exact_codes(codes, metric)
    largest = float(weight.abs().amax())
    bits = (53 - 2 * TOKEN_BITS - 1 - math.ceil(math.log2(x.shape[1]))) // 2
    if not 1e-100 < largest < 1e100:  # neither q² nor its multiples leave the range of float64
        return found
    quantum = 2.0 ** (math.ceil(math.log2(largest)) - bits)
    if not _whole(weight / quantum).all():
        return found
    constant = weight.square().sum(1).mul_(-0.5 if metric == "euclidean" else 0.0)
    for part, answer in zip(*(t.split(max(1, TILE // max(codes.shape))) for t in (x, found)), strict=True):
        tokens = part.double()
        exact = _whole(tokens / quantum) & (tokens.abs().amax(1) <= largest * 2**TOKEN_BITS)
        answer.copy_(torch.where(exact, torch.addmm(constant, tokens, weight.T).argmax(1), -1))
    return found


def _whole(x: Tensor) -> Tensor:
    """Return True for each row of whole numbers: ``(N, D) -> (N,)`` bool."""
    return (x == x.round()).all(1)
