"""Gradient estimators: the value is the code, the gradient reaches the token."""

import torch
from torch import Tensor

from vqssl.checks import check_alike
from vqssl.functional.vectors import unit

__all__ = ["ESTIMATORS", "rotation_trick", "straight_through"]

_CURE = "look the codes up with the indices of these very tokens"


def straight_through(x: Tensor, quantized: Tensor) -> Tensor:
    r"""The code's value with the token's gradient: :math:`q + (z - \mathrm{sg}[z])` (Bengio et al., arXiv 1308.3432).

    Written so, the value is the code bit for bit (:math:`z + \mathrm{sg}[q - z]` rounds), and a token with NaN
    yields NaN.

    Args:
        x: tokens ``(*batch, D)``.
        quantized: their codes, of the same shape; no gradient passes to them.

    Returns:
        ``(*batch, D)`` in the dtype of ``x``.

    Raises:
        TypeError: an input is no floating tensor.
        ValueError: the shapes or the devices differ.

    >>> import torch
    >>> x = torch.tensor([0.3, 0.7], requires_grad=True)
    >>> y = straight_through(x, torch.tensor([0.0, 1.0]))
    >>> (2 * y).sum().backward()
    >>> y.tolist(), x.grad.tolist()
    ([0.0, 1.0], [2.0, 2.0])
    """
    check_alike("x", x, "quantized", quantized, _CURE)
    return quantized.detach().to(x.dtype) + (x - x.detach())


def rotation_trick(x: Tensor, quantized: Tensor) -> Tensor:
    r"""The code's value with the gradient of the rotation and scaling that carries the token onto it.

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
        TypeError: an input is no floating tensor.
        ValueError: the shapes or the devices differ.

    >>> import torch
    >>> x = torch.tensor([1.0, 0.0], requires_grad=True)
    >>> y = rotation_trick(x, torch.tensor([0.0, 2.0]))  # a quarter turn and twice the length
    >>> y[1].backward()
    >>> y.tolist(), [round(g, 4) for g in x.grad.tolist()]
    ([0.0, 2.0], [2.0, 0.0])
    """
    check_alike("x", x, "quantized", quantized, _CURE)
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
    """Of two unit vectors; zeros where they are opposite to within rounding: the map is then a reflection."""
    bisector, chord = u + v, u - v
    # A bisector stands upright on its chord. Past a right angle cancellation eats away at that, and without it the
    # map is no rotation; so what lies along the chord is taken out.
    along = (bisector * chord).sum(-1, keepdim=True) / chord.square().sum(-1, keepdim=True).clamp_min(1.0)
    obtuse = (u * v).sum(-1, keepdim=True) < 0
    bisector = torch.where(obtuse, bisector - along * chord, bisector)
    length = bisector.norm(dim=-1, keepdim=True)
    known = length > 4 * torch.finfo(length.dtype).eps
    return torch.where(known, bisector / torch.where(known, length, 1.0), 0.0)


ESTIMATORS = {"straight_through": straight_through, "rotation": rotation_trick}
"""The estimators by name."""
