"""The two outputs of a quantiser that need each token's code, from one table of codes."""

import torch
from torch import Tensor

from vqssl.functional.commitment import commitment_loss, commitment_loss_rows
from vqssl.functional.estimators import straight_through, straight_through_rows
from vqssl.functional.look_up import rows_of_table

__all__ = ["straight_through_and_loss"]


def straight_through_and_loss(
    x: Tensor, codebook: Tensor, indices: Tensor, mask: Tensor | None, weight: float
) -> tuple[Tensor, Tensor]:
    """Return :func:`vqssl.functional.straight_through` and :func:`vqssl.functional.commitment_loss` by index.

    Nothing is checked where the functions themselves are not called: the indices are those of a search.

    Args:
        x: tokens ``(*batch, D)``.
        codebook: ``(K, D)``.
        indices: ``(*batch,)`` int64, -1 where a token has no code.
        mask: ``(*batch,)`` bool, or None.
        weight: of the loss.

    >>> import torch
    >>> codes, loss = straight_through_and_loss(torch.zeros(2, 1), torch.ones(3, 1), torch.tensor([0, 2]), None, 0.25)
    >>> codes.tolist(), loss.item()
    ([[1.0], [1.0]], 0.25)
    """
    if x.itemsize < 4 or torch.compiler.is_compiling() or torch.onnx.is_in_onnx_export():
        # Tables of two dtypes; or a compiler, which makes one of both.
        quantized = straight_through(x, codebook, indices=indices, mask=mask)
        return quantized, commitment_loss(x, codebook, mask, weight, indices=indices)
    table, rows = rows_of_table(codebook, indices, mask, x.dtype)
    quantized = straight_through_rows(x, table, rows)
    # Computed last, so that backward runs it first: autograd then adds the estimator's gradient to it in place.
    return quantized, commitment_loss_rows(x, table, rows, mask, weight)
