"""Averages of a loss over the views of a batch."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vqssl.functional.cosine_regression import cosine_regression_loss

__all__ = ["cross_view_loss", "mean_over_pairs", "same_view_loss"]


def cross_view_loss(predictions: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    r"""Average the regression loss over all pairs of a predicting view and another, predicted one.

    .. math:: \frac{1}{W (V - 1)} \sum_{w = 1}^{W} \sum_{v \neq w} L(p^v, t^w)

    Args:
        predictions: V tensors ``(B, D)``, V >= 2.
        targets: W tensors ``(B, D)`` of the first W views, in the same order, 1 <= W <= V. With W < V the other views
            only predict, as small local crops do (multi-crop, SwAV, arXiv 2006.09882).

    Returns:
        Scalar, float32 (float64 for float64 input).

    Raises:
        TypeError: a tensor is not floating.
        ValueError: two shapes differ, or the batch is empty.

    >>> import torch
    >>> right, up = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    >>> cross_view_loss([right, up], [up, right]).item(), cross_view_loss([right, up], [right, up]).item()
    (0.0, 2.0)
    >>> cross_view_loss([up, right, right], [right]).item()
    0.0
    """
    return mean_over_pairs(cosine_regression_loss, predictions, targets)


def mean_over_pairs(
    loss: Callable[[Tensor, Tensor], Tensor], predictions: Sequence[Tensor], targets: Sequence[Tensor]
) -> Tensor:
    """Average a loss over all pairs of a predicting view and another, predicted one.

    Args:
        loss: ``(prediction, target) -> scalar``.
        predictions: of V views.
        targets: of the first W views.

    >>> import torch
    >>> ones, twos = torch.tensor(1.0), torch.tensor(2.0)
    >>> mean_over_pairs(lambda p, t: 10 * p + t, [ones, twos], [ones, twos]).item()  # of 12 and 21
    16.5
    """
    pairs = [(p, t) for v, p in enumerate(predictions) for w, t in enumerate(targets) if v != w]
    return torch.stack([loss(p, t) for p, t in pairs]).mean()


def same_view_loss(predictions: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    r"""Average the regression loss over the views, each against the target of the same view.

    .. math:: \frac{1}{V} \sum_v L(p^v, t^v)

    Args:
        predictions: V tensors ``(B, D)``.
        targets: V tensors ``(B, D)``, in the same order.

    Returns:
        Scalar, float32 (float64 for float64 input).

    Raises:
        TypeError: a tensor is not floating.
        ValueError: the numbers of views or two shapes differ, or the batch is empty.

    >>> import torch
    >>> right, up = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    >>> same_view_loss([right, up], [right, up]).item()
    0.0
    """
    pairs = zip(predictions, targets, strict=True)
    return torch.stack([cosine_regression_loss(p, t) for p, t in pairs]).mean()
