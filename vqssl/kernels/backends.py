"""The choice between Triton's kernels and PyTorch for CUDA tensors."""

import contextlib
import importlib
import warnings
from typing import Any

import torch
from torch import Tensor

__all__ = ["run_triton", "unusable_modules", "used_modules"]

_unusable: set[str] = set()
_used: set[str] = set()


def run_triton(module: str, function: str, *arguments: Any) -> Any | None:
    """Call a function that launches Triton kernels; return None if Triton is missing, cannot start or cannot compile.

    The module is imported here, at the first call, so that ``import vqssl`` does not need Triton. A failure is
    remembered: later calls return None at once.

    Args:
        module: full name of the module that holds the kernels.
        function: the function's name in it.
        arguments: passed on; the first CUDA tensor among them determines the device.

    Returns:
        What the function returns, or None: the caller then computes the same in PyTorch.

    Warns:
        RuntimeWarning: at the first failure of each module.
    """
    if module in _unusable:
        return None
    try:
        kernel = getattr(importlib.import_module(module), function)
        with _device_of(arguments):
            result = kernel(*arguments)
        _used.add(module)
        return result
    except Exception as error:
        if not _is_tritons_own(error):
            raise
        _mark_unusable(module, error)
        return None


_START_UP = ("triton.runtime.build", "triton.runtime.driver")
"""Where Triton compiles its launcher, with the system's C compiler and Python.h, and looks for a driver."""


def _is_tritons_own(error: Exception) -> bool:
    """Return True if Triton is missing, could not start, or could not compile; other errors are the caller's."""
    if isinstance(error, ImportError) or type(error).__module__.startswith("triton."):
        return True
    frame = error.__traceback__
    while frame is not None:
        if frame.tb_frame.f_globals.get("__name__") in _START_UP:
            return True
        frame = frame.tb_next
    return False


def unusable_modules() -> frozenset[str]:
    """Return the full names of the modules whose Triton kernels failed in this process."""
    return frozenset(_unusable)


def used_modules() -> frozenset[str]:
    """Return the full names of the modules whose Triton kernels ran in this process."""
    return frozenset(_used)


def _device_of(arguments: tuple[Any, ...]) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which the arguments' device is the current one, on which Triton launches."""
    for argument in arguments:
        if isinstance(argument, Tensor) and argument.is_cuda:
            return torch.cuda.device(argument.device)
    return contextlib.nullcontext()


def _mark_unusable(module: str, error: Exception) -> None:
    """Remember that a module failed, and warn."""
    _unusable.add(module)
    warnings.warn(
        f"vqssl: the GPU kernels of {module} cannot be used here ({type(error).__name__}: {error}); falling back to "
        "PyTorch: same results, slower, more memory. Install the Triton version that your PyTorch requires. It "
        "needs a C compiler and Python's headers (Debian: gcc and python3-dev)",
        RuntimeWarning,
        stacklevel=3,
    )
