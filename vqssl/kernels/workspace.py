"""Scratch memory of the operators on a CPU, which each thread keeps between calls."""

import math
import threading

import torch
from torch import Tensor

__all__ = ["workspace"]

MAX_KEPT = 2**22
"""Entries of the largest buffer that is kept: 16 MB of float32."""


class _Buffers(threading.local):
    """The buffers of the current thread, by name and dtype."""

    def __init__(self) -> None:
        self.by_name: dict[tuple[str, torch.dtype], Tensor] = {}


_buffers = _Buffers()


def workspace(name: str, dtype: torch.dtype, device: torch.device, *shape: int) -> Tensor:
    """Return uninitialised memory that stays valid until this thread calls with the same name and dtype again.

    On a CPU the operating system provides fresh memory page by page, as it is first written. For tokens of width 64
    that takes half as long as the matrix product. So buffers of up to 16 MB are kept. Larger ones are allocated at each
    call, and so are those on other devices, whose allocators keep memory themselves.
    """
    size = math.prod(shape)
    if device.type != "cpu" or size > MAX_KEPT:
        return torch.empty(shape, dtype=dtype, device=device)
    buffer = _buffers.by_name.get((name, dtype))
    if buffer is None or buffer.numel() < size:
        # A tensor made in inference mode could not be written to outside of it.
        with torch.inference_mode(False):
            buffer = _buffers.by_name[name, dtype] = torch.empty(size, dtype=dtype)
    return buffer[:size].view(shape)
