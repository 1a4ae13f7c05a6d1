"""Entropic optimal transport between two sets of equal weights (Sinkhorn; arXiv 1306.0895)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


@torch.no_grad()
def transport_plan(cost: Tensor, *, strength: float = 0.05, iterations: int = 30) -> Tensor:
    r"""Return the plan between N and M cells of equal weight, without a gradient.

    .. math:: P = \arg\min_P \langle P, C \rangle - \epsilon H(P), \qquad P 1 = 1/N, \quad P^\top 1 = 1/M

    The iterations run on logarithms, which do not underflow where the cost is many times epsilon.

    Args:
        cost: C, `(B, N, M)`.
        strength: epsilon, of the entropy.
        iterations: of Sinkhorn; the columns' sums are exact after any number, those of the rows in the limit.

    >>> plan = transport_plan(torch.tensor([[[0.0, 1.0], [1.0, 0.0]]]))
    >>> plan.round(decimals=3).tolist()
    [[[0.5, 0.0], [0.0, 0.5]]]
    """
    scaled = -cost / strength
    rows, columns = (-math.log(size) for size in cost.shape[1:])
    u, v = torch.zeros_like(cost[:, :, 0]), torch.zeros_like(cost[:, 0])
    for _ in range(iterations):
        u = rows - (scaled + v[:, None]).logsumexp(2)
        v = columns - (scaled + u[:, :, None]).logsumexp(1)
    return (scaled + u[:, :, None] + v[:, None]).exp()
