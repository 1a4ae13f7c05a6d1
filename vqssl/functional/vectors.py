"""Unit vectors, which cosines compare."""

import torch
from torch import Tensor

__all__ = ["unit"]


def unit(x: Tensor) -> Tensor:
    """Scale vectors to length 1 along the last axis; a zero vector stays zero and passes its gradient.

    :func:`torch.nn.functional.normalize` gives a zero vector a gradient of 1e12, or NaN in half precision. The length
    is computed in float32 at least, because float16 ends at 65504.

    Args:
        x: ``(*batch, D)``.

    Returns:
        ``(*batch, D)`` in the dtype of ``x``.

    >>> import torch
    >>> unit(torch.tensor([[3.0, 4.0], [0.0, 0.0]])).tolist()
    [[0.6000000238418579, 0.800000011920929], [0.0, 0.0]]
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    length = wide.norm(dim=-1, keepdim=True)
    return (wide / torch.where(length > 0, length, 1.0)).to(x.dtype)
