"""Codes by index, as the estimator and the commitment loss read them."""

import torch
from torch import Tensor

__all__ = ["look_up", "rows_of_table"]


def look_up(codebook: Tensor, indices: Tensor, mask: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """Return the code of each token.

    Args:
        codebook: codes ``(K, D)``; no gradient passes to them.
        indices: ``(*batch,)`` int64, -1 where a token has no code.
        mask: ``(*batch,)`` bool, True where a token counts.
        dtype: of the result; None keeps that of the codes.

    Returns:
        ``(*batch, D)``: zeros where masked, NaN where a token that counts has no code.

    >>> import torch
    >>> look_up(torch.tensor([[1.0], [2.0]]), torch.tensor([1, -1, -1]), torch.tensor([True, False, True])).tolist()
    [[2.0], [0.0], [nan]]
    """
    table, rows = rows_of_table(codebook, indices, mask, dtype or codebook.dtype)
    return torch.nn.functional.embedding(rows, table)


def rows_of_table(codebook: Tensor, indices: Tensor, mask: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the codes with a row of NaN before them and, with a mask, one of zeros after them; and each token's row.

    So the special cases of :func:`look_up` cost two rows instead of a pass over all tokens.

    Returns:
        ``(K + 1, D)`` or ``(K + 2, D)`` in ``dtype``, and ``(*batch,)`` int64.
    """
    if codebook.requires_grad:
        codebook = codebook.detach()
    table = torch.nn.functional.pad(codebook.to(dtype), (0, 0, 1, 0), value=torch.nan)
    rows = indices.long() + 1  # -1, no code, becomes the row of NaN
    if mask is None:
        return table, rows
    return torch.nn.functional.pad(table, (0, 0, 0, 1)), torch.where(mask, rows, len(codebook) + 1)
