"""Scratch memory of the operators on a CPU, which each thread keeps between calls.

On a CPU the operating system provides fresh memory page by page, as it is first written. For tokens of width 64 that
takes half as long as the matrix product of a search. So a thread keeps the memory of its last call.

A call takes the memory away from its thread and puts it back at the end. A second call within the first, from a signal
handler, a finaliser or a dispatch mode, finds none and makes its own: calls never share memory.
"""

import contextlib
import math
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["Workspace", "workspace"]

MAX_KEPT = 2**22
"""Entries of the largest buffer that is kept: 16 MB of float32."""


class Workspace:
    """Buffers by name and dtype, for one call at a time."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def empty(self, name: str, dtype: torch.dtype, device: torch.device, *shape: int) -> Tensor:
        """Return uninitialised memory, valid until the next request of the same name and dtype.

        Buffers beyond 16 MB are allocated at each request, and so are those on other devices than a CPU, whose
        allocators keep memory themselves.
        """
        size = math.prod(shape)
        if device.type != "cpu" or size > MAX_KEPT:
            return torch.empty(shape, dtype=dtype, device=device)
        buffer = self._buffers.get((name, dtype))
        if buffer is None or buffer.numel() < size:
            # A tensor made in inference mode could not be written to outside of it.
            with torch.inference_mode(False):
                buffer = self._buffers[name, dtype] = torch.empty(size, dtype=dtype)
        return buffer[:size].view(shape)


_idle = threading.local()


@contextlib.contextmanager
def workspace() -> Iterator[Workspace]:
    """Lend this thread's workspace to the caller, or a new one while it is lent."""
    # pop takes the workspace in one step, which no signal handler can interrupt.
    lent = _idle.__dict__.pop("workspace", None) or Workspace()
    try:
        yield lent
    finally:
        _idle.workspace = lent
