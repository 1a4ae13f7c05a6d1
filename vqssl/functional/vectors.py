"""Directions: what cosines compare."""

import torch
from torch import Tensor

__all__ = ["unit"]


def unit(x: Tensor) -> Tensor:
    """``x / |x|`` along the last axis; a zero stays a zero and lets its gradient through.

    :func:`torch.nn.functional.normalize` gives a zero a gradient of 1e12, or NaN in half precision. Computed in float32
    at least: a length beyond 65504 is no length in float16.

    >>> import torch
    >>> unit(torch.tensor([[3.0, 4.0], [0.0, 0.0]])).tolist()
    [[0.6000000238418579, 0.800000011920929], [0.0, 0.0]]
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    length = wide.norm(dim=-1, keepdim=True)
    return (wide / torch.where(length > 0, length, 1.0)).to(x.dtype)
