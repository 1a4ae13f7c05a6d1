"""Which backend runs an operator on CUDA tensors: Triton's kernels where they can be had, plain torch elsewhere."""

import contextlib
import importlib
import warnings
from typing import Any

import torch
from torch import Tensor

__all__ = ["by_triton"]

# Modules that turned out not to run here: asked once, warned of once.
_unusable: set[str] = set()


def by_triton(module: str, function: str, *arguments: Any) -> Any | None:
    """What ``vqssl.kernels.MODULE.FUNCTION`` returns, or None where Triton is missing or cannot compile it.

    The kernels' modules are imported here, at the first call, so that ``import vqssl`` needs no Triton.
    """
    if module in _unusable:
        return None
    try:
        kernel = getattr(importlib.import_module(f"vqssl.kernels.{module}"), function)
    except ImportError as error:
        _give_up(module, error)
        return None
    try:
        with _device_of(arguments):
            return kernel(*arguments)
    except Exception as error:
        # Compilation errors only, of any version's class: whatever else goes wrong is the caller's to see.
        if not type(error).__module__.startswith("triton."):
            raise
        _give_up(module, error)
        return None


def _device_of(arguments: tuple[Any, ...]) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, whichever device its arguments are on."""
    for argument in arguments:
        if isinstance(argument, Tensor) and argument.is_cuda:
            return torch.cuda.device(argument.device)
    return contextlib.nullcontext()


def _give_up(module: str, error: Exception) -> None:
    _unusable.add(module)
    warnings.warn(
        f"vqssl: plain torch takes the place of the GPU kernel {module}, which cannot be used here "
        f"({type(error).__name__}: {error}); the results are the same, later and with more memory. Install the Triton "
        "that belongs to your torch",
        RuntimeWarning,
        stacklevel=3,
    )
