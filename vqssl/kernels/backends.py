"""The choice between Triton's kernels and PyTorch for CUDA tensors."""

import contextlib
import importlib
import warnings
from typing import Any

import torch
from torch import Tensor

__all__ = ["run_triton", "unusable_modules"]

_unusable: set[str] = set()


def run_triton(module: str, function: str, *arguments: Any) -> Any | None:
    """Call a function that launches Triton kernels; return None if Triton is missing or cannot compile them.

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
    except ImportError as error:
        _mark_unusable(module, error)
        return None
    try:
        with _device_of(arguments):
            return kernel(*arguments)
    except Exception as error:
        # Only failures to compile, of whichever class this version of Triton has; other errors propagate.
        if not type(error).__module__.startswith("triton."):
            raise
        _mark_unusable(module, error)
        return None


def unusable_modules() -> frozenset[str]:
    """Return the full names of the modules whose Triton kernels failed in this process."""
    return frozenset(_unusable)


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
        "PyTorch: same results, slower, more memory. Install the Triton version that your PyTorch requires",
        RuntimeWarning,
        stacklevel=3,
    )
