"""Memory that a thread keeps between calls of the kernels on a CPU."""

import math
import threading

import torch
from torch import Tensor

__all__ = ["workspace"]

# Entries of the largest buffer that is kept: 16 MB of float32.
_KEPT = 2**22


class _Kept(threading.local):
    def __init__(self) -> None:
        self.buffers: dict[tuple[str, torch.dtype], Tensor] = {}


_kept = _Kept()


def workspace(name: str, dtype: torch.dtype, device: torch.device, *shape: int) -> Tensor:
    """Uninitialised memory, valid until this thread asks for the same name again.

    On a CPU the system hands out fresh memory page by page as it is first written: for tokens of width 64 that takes
    half as long as the matrix product. So buffers of up to 16 MB are kept; larger ones, and those on other devices,
    whose allocators keep memory themselves, are made anew.
    """
    size = math.prod(shape)
    if device.type != "cpu" or size > _KEPT:
        return torch.empty(shape, dtype=dtype, device=device)
    buffer = _kept.buffers.get((name, dtype))
    if buffer is None or buffer.numel() < size:
        with torch.inference_mode(False):  # or nobody could write to it outside of inference mode
            buffer = _kept.buffers[name, dtype] = torch.empty(size, dtype=dtype)
    return buffer[:size].view(shape)
