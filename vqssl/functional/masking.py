"""Zeros where a mask leaves tokens out."""

import torch
from torch import Tensor

__all__ = ["zero_where_masked"]


def zero_where_masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return tokens ``(*batch, D)``, zeros where the mask ``(*batch,)`` is False; ``x`` itself without a mask.

    Not by a product: zero times a NaN under the mask would still be NaN, as would be its gradient.

    >>> zero_where_masked(torch.tensor([[1.0], [torch.nan]]), torch.tensor([True, False])).tolist()
    [[1.0], [0.0]]
    """
    return x if mask is None else torch.where(mask[..., None], x, 0.0)
