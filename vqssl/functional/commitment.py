"""The commitment loss, Eq. 5 of DiSSECT."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vqssl import kernels
from vqssl.checks import check_codes, check_mask
from vqssl.functional.look_up import rows_of_table
from vqssl.functional.masking import zero_where_masked

__all__ = ["commitment_loss", "commitment_loss_rows"]


def commitment_loss(
    x: Tensor, quantized: Tensor, mask: Tensor | None = None, weight: float = 0.25, *, indices: Tensor | None = None
) -> Tensor:
    r"""Return how far tokens are from their codes: equation 5 of DiSSECT (arXiv 2509.18765), VQ-VAE's loss.

    .. math:: L = \beta \cdot \mathrm{mean}\, (z - \mathrm{sg}[q])^2

    Args:
        x: tokens ``(*batch, D)``.
        quantized: their codes, of the same shape; or, with ``indices``, the codebook ``(K, D)``. No gradient passes to
            either.
        mask: ``(*batch,)`` bool, True where a token counts; other tokens are ignored, even if NaN.
        weight: beta.
        indices: ``(*batch,)`` integers, the code of each token, -1 where it has none. With them neither the codes of
            all tokens nor the differences are held, and the codebook may change before the backward pass.

    Returns:
        Scalar, float32 (float64 for float64 tokens): the mean over the elements that count. 0 where none does, and
        then with a gradient of zeros. NaN where a token that counts has no code.

    Raises:
        TypeError: an input is not a floating tensor, the mask is not boolean, or the indices are not integers.
        ValueError: the shapes or the devices differ, or (on CPU) an index is out of range.

    >>> import torch
    >>> x = torch.tensor([[1.0, 3.0], [9.0, 9.0]])
    >>> commitment_loss(x, torch.zeros(2, 2), torch.tensor([True, False])).item()
    1.25
    >>> commitment_loss(x, torch.tensor([[9.0, 9.0], [1.0, 1.0]]), indices=torch.tensor([1, 0])).item()
    0.25
    """
    several = "call it once for each pair and add the results, torch.stack(losses).sum()"
    check_codes(x, quantized, indices, several)
    check_mask(mask, x.shape[:-1], x.device)
    dtype = torch.promote_types(x.dtype, torch.float32)
    if indices is not None:
        return commitment_loss_rows(x, *rows_of_table(quantized, indices, None, dtype), mask, weight)
    difference = x.to(dtype) - quantized.detach().to(dtype)
    squared = zero_where_masked(difference, mask).square().sum()
    return _mean(squared, x, mask, weight)


def commitment_loss_rows(x: Tensor, table: Tensor, rows: Tensor, mask: Tensor | None, weight: float) -> Tensor:
    """Compute :func:`commitment_loss` by what :func:`vqssl.functional.look_up.rows_of_table` returned, unchecked.

    >>> commitment_loss_rows(torch.zeros(1, 1), torch.tensor([[1.0], [2.0]]), torch.tensor([1]), None, 0.25).item()
    1.0
    """
    squared = _squared_error(x, rows if mask is None else torch.where(mask, rows, -1), table, mask is not None)
    return _mean(squared, x, mask, weight)


def _mean(squared: Tensor, x: Tensor, mask: Tensor | None, weight: float) -> Tensor:
    count = max(x.numel(), 1) if mask is None else (mask.sum() * x.shape[-1]).clamp_min(1)
    return weight * squared / count


def _squared_error(x: Tensor, rows: Tensor, table: Tensor, masked: bool) -> Tensor:
    if torch.onnx.is_in_onnx_export():
        return kernels.squared_error_plain(x, rows, table, masked)
    if torch.compiler.is_compiling():
        return kernels.squared_error(x, rows, table, masked)
    apply: Callable[..., Tensor] = _SquaredError.apply
    return apply(x, rows, table, masked)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, bool], output: Tensor) -> None:
    # Codes and indices instead of the codes of all tokens: K x D and N numbers instead of N x D.
    *tensors, ctx.masked = inputs
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)


def _residual(x: Tensor, rows: Tensor, table: Tensor, masked: bool) -> Tensor:
    residual = x - table[rows.clamp_min(0)]
    return torch.where((rows >= 0)[..., None], residual, 0.0) if masked else residual


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    x, rows, table = ctx.saved_tensors
    if torch.is_grad_enabled():  # a second derivative is wanted
        return (2 * grad * _residual(x, rows, table, ctx.masked)).to(x.dtype), None, None, None
    return kernels.squared_error_backward(grad, x, rows, table, ctx.masked), None, None, None


class _SquaredError(torch.autograd.Function):
    """The operator with its gradient, in the form that torch.func takes."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, rows: Tensor, table: Tensor, masked: bool) -> Tensor:
        return kernels.squared_error(x, rows, table, masked)

    setup_context = staticmethod(_keep)
    backward = staticmethod(_backward)

    @staticmethod
    def jvp(ctx: Any, x_tangent: Tensor, *_: None) -> Tensor:
        x, rows, table = ctx.saved_tensors
        return (2 * _residual(x, rows, table, ctx.masked) * x_tangent).sum()


# And in the form that a compiled or exported graph keeps.
kernels.squared_error.register_autograd(_backward, setup_context=_keep)
