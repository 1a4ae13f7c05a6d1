"""Averages of the regression loss over the views of a batch."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from vqssl.functional.cosine_regression import cosine_regression_loss

__all__ = ["cross_view_loss", "same_view_loss"]


def cross_view_loss(predictions: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    r"""Average the regression loss over all ordered pairs of different views.

    .. math:: \frac{1}{V (V - 1)} \sum_{v \neq w} L(p^v, t^w)

    Args:
        predictions: V tensors ``(B, D)``, V >= 2.
        targets: V tensors ``(B, D)``, in the same order.

    Returns:
        Scalar, float32 (float64 for float64 input).

    Raises:
        TypeError: a tensor is not floating.
        ValueError: two shapes differ, or the batch is empty.

    >>> import torch
    >>> right, up = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    >>> cross_view_loss([right, up], [up, right]).item(), cross_view_loss([right, up], [right, up]).item()
    (0.0, 2.0)
    """
    pairs = itertools.permutations(range(len(predictions)), 2)
    return torch.stack([cosine_regression_loss(predictions[v], targets[w]) for v, w in pairs]).mean()


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
