"""Gradient estimators: the value is the code, the gradient reaches the token."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from vqssl.checks import check_codes, check_mask
from vqssl.functional.look_up import look_up, rows_of_table
from vqssl.functional.vectors import unit

__all__ = ["ESTIMATORS", "Estimator", "EstimatorName", "rotation_trick", "straight_through", "straight_through_rows"]

Estimator = Callable[[Tensor, Tensor], Tensor]
"""``(x, quantized) -> tensor``, all ``(*batch, D)``: the value of the code with a gradient to the token."""

EstimatorName = Literal["straight_through", "rotation"]


def straight_through(
    x: Tensor, quantized: Tensor, *, indices: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    r"""Return the code's value with the token's gradient: :math:`q + (z - \mathrm{sg}[z])` (arXiv 1308.3432).

    Written so, the value is the code bit for bit (:math:`z + \mathrm{sg}[q - z]` rounds), and a token with NaN
    yields NaN.

    Args:
        x: tokens ``(*batch, D)``.
        quantized: their codes, of the same shape; or, with ``indices``, the codebook ``(K, D)``. No gradient passes to
            either.
        indices: ``(*batch,)`` integers, the code of each token, -1 where it has none: the value is NaN there. With
            them nothing of the tokens' size is held besides the result.
        mask: ``(*batch,)`` bool, with ``indices`` only: where it is False the value is zero.

    Returns:
        ``(*batch, D)`` in the dtype of ``x``.

    Raises:
        TypeError: an input is not a floating tensor, the indices are not integers, or the mask is not boolean.
        ValueError: the shapes or the devices differ, a mask came without indices, or (on CPU) an index is out of range.

    >>> import torch
    >>> x = torch.tensor([0.3, 0.7], requires_grad=True)
    >>> y = straight_through(x, torch.tensor([0.0, 1.0]))
    >>> (2 * y).sum().backward()
    >>> y.tolist(), x.grad.tolist()
    ([0.0, 1.0], [2.0, 2.0])
    >>> straight_through(x[None], torch.tensor([[5.0, 6.0], [0.0, 1.0]]), indices=torch.tensor([1])).tolist()
    [[0.0, 1.0]]
    """
    if indices is None:
        if mask is not None:
            raise ValueError("mask needs indices, got none: write torch.where(mask[..., None], quantized, 0.0)")
        check_codes(x, quantized)
        return quantized.detach().to(x.dtype) + (x - x.detach())
    check_codes(x, quantized, indices)
    check_mask(mask, x.shape[:-1], x.device)
    if torch.compiler.is_compiling() or torch.onnx.is_in_onnx_export():
        return look_up(quantized, indices, mask, x.dtype) + (x - x.detach())  # a compiler fuses it
    return straight_through_rows(x, *rows_of_table(quantized, indices, mask, x.dtype))


def straight_through_rows(x: Tensor, table: Tensor, rows: Tensor) -> Tensor:
    """Compute :func:`straight_through` by what :func:`vqssl.functional.look_up.rows_of_table` returned, unchecked.

    >>> straight_through_rows(torch.zeros(1, 1), torch.tensor([[1.0], [2.0]]), torch.tensor([1])).tolist()
    [[2.0]]
    """
    apply: Callable[..., Tensor] = _StraightThrough.apply
    return apply(x, table, rows)


class _StraightThrough(torch.autograd.Function):
    """Looked-up codes with the tokens' gradient, without arithmetic."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, table: Tensor, rows: Tensor) -> Tensor:
        return torch.nn.functional.embedding(rows, table)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None

    @staticmethod
    def jvp(ctx: Any, x_tangent: Tensor, *_: None) -> Tensor:
        return x_tangent.clone()


def rotation_trick(x: Tensor, quantized: Tensor) -> Tensor:
    r"""Return the code's value with the gradient of the rotation and scaling that carries the token onto it.

    Fifty et al., arXiv 2410.06424:

    .. math:: \tilde q = \mathrm{sg}\!\left[\tfrac{\lVert q \rVert}{\lVert z \rVert} R\right] z, \qquad
        R = I - 2 r r^\top + 2 \hat q \hat z^\top, \quad r = \frac{\hat z + \hat q}{\lVert \hat z + \hat q \rVert}

    The angle between the gradient and the code becomes the angle between the gradient and the token. A zero token or
    a zero code has no direction: there the gradient passes straight through.

    Args:
        x: tokens ``(*batch, D)``.
        quantized: their codes, of the same shape; no gradient passes to them.

    Returns:
        ``(*batch, D)`` in the dtype of ``x``.

    Raises:
        TypeError: an input is not a floating tensor.
        ValueError: the shapes or the devices differ.

    >>> import torch
    >>> x = torch.tensor([1.0, 0.0], requires_grad=True)
    >>> y = rotation_trick(x, torch.tensor([0.0, 2.0]))  # a quarter turn and twice the length
    >>> y[1].backward()
    >>> y.tolist(), [round(g, 4) for g in x.grad.tolist()]
    ([0.0, 2.0], [2.0, 0.0])
    """
    check_codes(x, quantized)
    z = x.to(torch.promote_types(x.dtype, torch.float32))
    q = quantized.detach().to(z.dtype)
    length_z, length_q = z.detach().norm(dim=-1, keepdim=True), q.norm(dim=-1, keepdim=True)
    directed = (length_z > 0) & (length_q > 0)
    unit_z, unit_q = unit(z.detach()), unit(q)
    bisector = _unit_bisector(unit_z, unit_q)
    turned = z - 2 * (z * bisector).sum(-1, keepdim=True) * bisector + 2 * (z * unit_z).sum(-1, keepdim=True) * unit_q
    carried = torch.where(directed, length_q / torch.where(directed, length_z, 1.0) * turned, z)
    return (q + (carried - carried.detach())).to(x.dtype)


def _unit_bisector(u: Tensor, v: Tensor) -> Tensor:
    """Return the unit bisector of two unit vectors; zeros where they are opposite to within rounding.

    The map is a reflection there.
    """
    bisector, chord = u + v, u - v
    # A bisector is perpendicular to its chord. Past a right angle cancellation destroys that, and the map would be no
    # rotation: remove the component along the chord.
    along = (bisector * chord).sum(-1, keepdim=True) / chord.square().sum(-1, keepdim=True).clamp_min(1.0)
    obtuse = (u * v).sum(-1, keepdim=True) < 0
    bisector = torch.where(obtuse, bisector - along * chord, bisector)
    length = bisector.norm(dim=-1, keepdim=True)
    known = length > 4 * torch.finfo(length.dtype).eps
    return torch.where(known, bisector / torch.where(known, length, 1.0), 0.0)


ESTIMATORS: dict[EstimatorName, Estimator] = {"straight_through": straight_through, "rotation": rotation_trick}
"""The estimators by name."""
