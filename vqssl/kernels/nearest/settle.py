"""The last word: candidates of a token compared in float64, from the values as given."""

import torch
from torch import Tensor

from vqssl.kernels.nearest.rule import exact_codes, exact_scores

__all__ = ["settle"]

PAIR_ELEMENTS = 2**18
"""Most float64 numbers that are compared at once: 2 MB."""


def settle(x: Tensor, codes: Tensor, metric: str, row: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows that have candidates, and the nearest candidate of each, the first of equals.

    Args:
        x: tokens ``(N, D)``.
        codes: ``(K, D)``.
        metric: as in :mod:`vqssl.kernels.nearest.rule`.
        row: ``(P,)`` int64, ascending; a row stands once for each of its candidates.
        code: ``(P,)`` int64, the candidates.

    Returns:
        Rows and codes ``(R,)`` int64.
    """
    rows, place = torch.unique_consecutive(row, return_inverse=True)
    step = max(1, PAIR_ELEMENTS // x.shape[1])
    exact = torch.cat(
        [
            exact_scores(x[r].double(), exact_codes(codes[c], metric), metric)
            for r, c in zip(row.split(step), code.split(step), strict=True)
        ]
    )
    best = exact.new_full((len(rows),), -torch.inf).scatter_reduce_(0, place, exact, "amax")
    wins = exact == best[place]
    return rows, code.new_full((len(rows),), len(codes)).scatter_reduce_(0, place[wins], code[wins], "amin")
