"""A quantiser's look-up as one step of autograd: straight-through codes and the squared error of Eq. 5."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vqssl import kernels

__all__ = ["look_up"]


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    # Codes and indices instead of the codes of all tokens: K x D and N numbers instead of N x D.
    ctx.save_for_backward(*inputs)
    ctx.save_for_forward(*inputs)


def _backward(ctx: Any, grad: Tensor, grad_error: Tensor) -> tuple[Tensor, None, None]:
    x, indices, codes = ctx.saved_tensors
    if torch.is_grad_enabled():  # somebody will differentiate this once more
        return grad + (2 * grad_error * (x - codes[indices])).to(grad.dtype), None, None
    return kernels.look_up_backward(grad, grad_error, x, indices, codes), None, None


class _LookUp(torch.autograd.Function):
    """The operator with its gradient, in the form that torch.func takes."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, indices: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        return kernels.look_up(x, indices, codes)

    setup_context = staticmethod(_keep)
    backward = staticmethod(_backward)

    @staticmethod
    def jvp(ctx: Any, x_tangent: Tensor, *_: None) -> tuple[Tensor, Tensor]:
        x, indices, codes = ctx.saved_tensors
        return x_tangent.clone(), (2 * (x - codes[indices]) * x_tangent).sum()


# And in the form that a compiled or exported graph keeps.
kernels.look_up.register_autograd(_backward, setup_context=_keep)


def look_up(x: Tensor, indices: Tensor, codes: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    r"""Each token's code with the token's gradient, and how far apart they are.

    .. math:: q_i = e_{k_i} + (z_i - \mathrm{sg}[z_i]), \qquad
        \textstyle\sum_i \lVert z_i - \mathrm{sg}[e_{k_i}] \rVert^2

    Equal to :func:`straight_through` and an unweighted sum of Eq. 5 (DiSSECT, arXiv 2509.18765), without holding the
    difference.

    Args:
        x: tokens ``(*batch, D)``; masked ones hold zeros.
        indices: ``(*batch,)`` int64, -1 where a token has no code.
        codes: ``(K, D)``; no gradient passes to them, and they may change before the backward pass.
        mask: ``(*batch,)`` bool, True where a token counts.

    Returns:
        ``(*batch, D)`` in the dtype of ``x``, zeros where masked, NaN where an unmasked token has no code; and a
        scalar, float32 (float64 for float64 tokens).

    >>> import torch
    >>> x = torch.tensor([[0.25, 0.5]], requires_grad=True)
    >>> quantized, error = look_up(x, torch.tensor([1]), torch.tensor([[9.0, 9.0], [0.0, 1.0]]))
    >>> quantized.tolist(), error.item()
    ([[0.0, 1.0]], 0.3125)
    """
    size, dim = codes.shape
    # Two rows more: for what is masked, and for what has no code.
    table = codes.new_empty(size + 2, dim, dtype=torch.promote_types(x.dtype, torch.float32))
    table[:size] = codes.detach()
    table[size] = 0.0
    table[size + 1] = torch.nan
    rows = torch.where(indices < 0, size + 1, indices)
    if mask is not None:
        rows = torch.where(mask, rows, size)
    operator: Callable[..., tuple[Tensor, Tensor]] = _LookUp.apply
    if torch.onnx.is_in_onnx_export():
        operator = kernels.look_up_plain
    elif torch.compiler.is_compiling():
        operator = kernels.look_up
    quantized, error = operator(x.reshape(-1, dim), rows.reshape(-1), table)
    return quantized.reshape(x.shape), error
