"""The dtype of a module's state: float32 or float64, whatever the rest of a model is cast to."""

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["keeping_float32", "state_dtype"]


def state_dtype(dtype: torch.dtype | None) -> torch.dtype:
    """Return the dtype of the state for the one that was requested: float64, or else float32.

    >>> state_dtype(torch.float16), state_dtype(torch.float64)
    (torch.float32, torch.float64)
    """
    return torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)


def keeping_float32(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return ``fn``, as ``Module._apply`` takes it, without its casts to less than float32; its moves stay.

    >>> keeping_float32(Tensor.half)(torch.zeros(1)).dtype, keeping_float32(Tensor.double)(torch.zeros(1)).dtype
    (torch.float32, torch.float64)
    """

    def at_least_float32(tensor: Tensor) -> Tensor:
        applied = fn(tensor)
        narrow = applied.is_floating_point() and applied.itemsize < 4
        return tensor.to(applied.device) if narrow else applied

    return at_least_float32
