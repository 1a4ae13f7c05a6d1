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
    """Return the codes with two rows more, zeros and NaN, and each token's row among them.

    So the special cases of :func:`look_up` cost K rows instead of a pass over all tokens.

    Returns:
        ``(K + 2, D)`` in ``dtype`` and ``(*batch,)`` int64.
    """
    size, dim = codebook.shape
    table = codebook.new_empty(size + 2, dim, dtype=dtype)
    table[:size] = codebook.detach()
    table[size] = 0.0
    table[size + 1] = torch.nan
    rows = torch.where(indices < 0, size + 1, indices.long())
    return table, rows if mask is None else torch.where(mask, rows, size)
