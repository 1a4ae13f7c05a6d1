"""Losses that several methods share: of pairs of views, of variance and covariance, of distributions, of a queue."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def over_pairs(loss: Callable[[Tensor, Tensor], Tensor], ours: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Return the mean of `loss(ours[v], targets[w])` over all pairs of different views, v != w.

    Views beyond the last target, such as small local crops, only predict.

    >>> over_pairs(lambda a, b: 10 * a + b, torch.tensor([1.0, 2, 3]), torch.tensor([1.0, 2])).item()
    24.0
    """
    pairs = itertools.product(enumerate(ours), enumerate(targets))
    return torch.stack([loss(a, b) for (v, a), (w, b) in pairs if v != w]).mean()


def variance_loss(z: Tensor) -> Tensor:
    """Return VICReg's hinge on the deviation of each column of `(B, D)`: the mean of max(0, 1 - s), arXiv 2105.04906.

    >>> variance_loss(torch.zeros(4, 2)).item()
    0.9900000095367432
    """
    return F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean()


def covariance_loss(z: Tensor) -> Tensor:
    """Return VICReg's sum of squared covariances between different columns of `(B, D)`, over D.

    >>> covariance_loss(torch.tensor([[1.0, 1.0], [-1.0, -1.0]])).item()
    4.0
    """
    centred = z - z.mean(0)
    covariance = centred.T @ centred / (len(z) - 1)
    return (covariance.square().sum() - covariance.diagonal().square().sum()) / z.shape[1]


def vicreg(a: Tensor, b: Tensor, weights: tuple[float, float, float] = (25.0, 25.0, 1.0)) -> Tensor:
    """Return VICReg's loss of two views `(B, D)`; the weights are those of invariance, variance and covariance."""
    invariance, variance, covariance = weights
    spread = (variance_loss(a) + variance_loss(b)) / 2
    return invariance * F.mse_loss(a, b) + variance * spread + covariance * (covariance_loss(a) + covariance_loss(b))


def distillation(logits: Tensor, target: Tensor, temperature: float = 0.1) -> Tensor:
    """Return DINO's cross-entropy of logits `(*batch, K)` to distributions of that shape, arXiv 2104.14294."""
    return -(target * F.log_softmax(logits / temperature, -1)).sum(-1).mean()


def hidden_cells(logits: Tensor, target: Tensor, hidden: Tensor, temperature: float = 0.1) -> Tensor:
    """Return iBOT's cross-entropy (arXiv 2111.07832): the mean over images of the mean over hidden cells.

    Args:
        logits: `(B, H, W, K)`.
        target: distributions of that shape.
        hidden: `(B, H, W)` booleans; an image without hidden cells counts as 0.
        temperature: of the logits.
    """
    each = -(target * F.log_softmax(logits / temperature, -1)).sum(-1)
    return ((each * hidden).sum((1, 2)) / hidden.sum((1, 2)).clamp_min(1)).mean()


def koleo(x: Tensor) -> Tensor:
    """Return minus the mean log distance of each row of `(B, D)` to its nearest, on the sphere (arXiv 1806.03198)."""
    x = F.normalize(x, dim=-1)
    similarity = (x @ x.T).detach().fill_diagonal_(-2)
    # The distance of a row to itself would have an infinite gradient: the nearest other row is chosen first.
    return -(F.pairwise_distance(x, x[similarity.argmax(1)], eps=1e-8) + 1e-8).log().mean()


def info_nce(query: Tensor, key: Tensor, queue: Tensor, temperature: float = 0.2) -> Tensor:
    """Return MoCo's loss (arXiv 1911.05722): each query `(B, D)` tells its key from all keys `(Q, D)` in the queue.

    Queries and keys are scaled to length 1; those in the queue have it.
    """
    query, key = F.normalize(query, dim=1), F.normalize(key, dim=1)
    logits = torch.cat([(query * key).sum(1, keepdim=True), query @ queue.T], 1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.long, device=query.device))
