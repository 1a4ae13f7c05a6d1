"""Refinement: what trains the head that makes the refined targets z_s.

Each policy is a function ``(refined_targets, global_targets) -> (targets, loss)`` of two sequences, one ``(B, D)`` a
view. It returns the targets that the student sees and a scalar that the objective adds. :data:`REFINEMENTS` lists the
policies by name. A new one is a function and an entry.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from vqssl.functional.cross_view import same_view_loss

__all__ = [
    "REFINEMENTS",
    "Refinement",
    "RefinementName",
    "align_refinement",
    "detached_refinement",
    "predict_refinement",
]

Refinement = Callable[[Sequence[Tensor], Sequence[Tensor]], tuple[Sequence[Tensor], Tensor]]
RefinementName = Literal["predict", "align", "detached"]


def predict_refinement(
    refined_targets: Sequence[Tensor], global_targets: Sequence[Tensor]
) -> tuple[list[Tensor], Tensor]:
    r"""Train the head to predict z_c; the student sees z_s detached.

    .. math:: \frac{1}{V} \sum_v L(z_s^v, \mathrm{sg}[z_c^v])

    The head cannot make its target easier for the student, since no gradient of the alignment reaches it. The loss is
    not in the paper; the page on the method says why it is the default.

    Args:
        refined_targets: z_s, V tensors ``(B, D)``.
        global_targets: z_c, V tensors ``(B, D)``, in the same order; no gradient passes to them.

    Returns:
        z_s detached, and the loss: a scalar, float32 (float64 for float64 input).

    Raises:
        TypeError: a tensor is not floating.
        ValueError: the numbers of views or two shapes differ, or the batch is empty.

    >>> import torch
    >>> z_s, z_c = [torch.tensor([[1.0, 0.0]], requires_grad=True)], [torch.tensor([[0.0, 1.0]])]
    >>> targets, loss = predict_refinement(z_s, z_c)
    >>> targets[0].requires_grad, loss.item(), loss.requires_grad
    (False, 2.0, True)
    """
    loss = same_view_loss(refined_targets, _detached(global_targets))
    return _detached(refined_targets), loss


def align_refinement(
    refined_targets: Sequence[Tensor], global_targets: Sequence[Tensor]
) -> tuple[Sequence[Tensor], Tensor]:
    """Train the head by the alignment itself: the student sees z_s with its graph, and no loss is added.

    This is the literal reading of Eq. 7 (DiSSECT, arXiv 2509.18765). Student and head can then agree on a nearly
    constant target.

    Args:
        refined_targets: z_s, V tensors ``(B, D)``.
        global_targets: z_c; not used.

    Returns:
        z_s as given, and a scalar 0.

    >>> import torch
    >>> z_s = [torch.ones(1, 2, requires_grad=True)]
    >>> targets, loss = align_refinement(z_s, [torch.ones(1, 2)])
    >>> targets[0] is z_s[0], loss.item()
    (True, 0.0)
    """
    return refined_targets, _zero(refined_targets)


def detached_refinement(
    refined_targets: Sequence[Tensor], global_targets: Sequence[Tensor]
) -> tuple[list[Tensor], Tensor]:
    """Leave the head as it is: the student sees z_s detached, and no loss is added.

    For a head that is trained elsewhere, or not at all.

    Args:
        refined_targets: z_s, V tensors ``(B, D)``.
        global_targets: z_c; not used.

    Returns:
        z_s detached, and a scalar 0.

    >>> import torch
    >>> targets, loss = detached_refinement([torch.ones(1, 2, requires_grad=True)], [torch.ones(1, 2)])
    >>> targets[0].requires_grad, loss.item()
    (False, 0.0)
    """
    return _detached(refined_targets), _zero(refined_targets)


REFINEMENTS: dict[RefinementName, Refinement] = {
    "predict": predict_refinement,
    "align": align_refinement,
    "detached": detached_refinement,
}
"""The policies by name."""


def _detached(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach() for tensor in tensors]


def _zero(targets: Sequence[Tensor]) -> Tensor:
    """Return a scalar 0 in the dtype that the regression loss would have."""
    dtype = torch.promote_types(targets[0].dtype, torch.float32)
    return torch.zeros((), dtype=dtype, device=targets[0].device)
