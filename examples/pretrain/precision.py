"""Half precision, memory layout and compilation: what a device has to be able to do, tried before a run begins."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor
from torch.nn import functional as F

from examples.pretrain.optimization import Optimization

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Of `Optimization.precision`, where it is not float32."""


def computing(config: Optimization, device: str) -> contextlib.AbstractContextManager[object]:
    """Return the context of forward passes: autocast to half precision, or nothing.

    >>> with computing(Optimization(precision="bf16"), "cpu"):
    ...     (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
    torch.bfloat16
    """
    if config.precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(torch.device(device).type, DTYPES[config.precision])


def laid_out(views: list[Tensor], config: Optimization) -> list[Tensor]:
    """Return views `(B, C, S, S)` in the memory layout of the run."""
    if not config.channels_last:
        return views
    return [view.contiguous(memory_format=torch.channels_last) for view in views]


def check_device_can(config: Optimization, device: str) -> None:
    """Raise ValueError unless the device can compute as the options say: one small convolution is tried.

    Without such options nothing is tried.
    """
    if config.precision != "float32":
        why = _half_fails(config, device)
        if why is not None:
            raise ValueError(
                f"--optimization.precision must be one that {device} can compute in, got {config.precision}, which it "
                f"cannot ({why}): give float32"
            )
    if config.compile:
        why = _compiling_fails(device)
        if why is not None:
            raise ValueError(
                f"--optimization.compile needs a compiler for {device}, and none works here ({why}): leave it out, or "
                "install what torch.compile needs (a C++ compiler on a CPU, triton on a GPU)"
            )


def _half_fails(config: Optimization, device: str) -> str | None:
    """Return why forward and backward pass of a convolution fail in half precision; None if they do not."""
    try:
        weight = torch.ones(8, 8, 3, 3, device=device, requires_grad=True)
        with computing(config, device):
            found = F.conv2d(torch.ones(2, 8, 8, 8, device=device), weight)
        found.float().sum().backward()
    except (RuntimeError, ValueError, AssertionError) as error:  # AssertionError: torch was built without the device
        return _first_line(error)
    return None if found.dtype == DTYPES[config.precision] else f"autocast gives {found.dtype}"


def _compiling_fails(device: str) -> str | None:
    """Return why a function of one line cannot be compiled; None if it can."""
    try:
        torch.compile(lambda x: x.relu() + 1)(torch.ones(8, device=device))
    except Exception as error:  # torch raises many kinds
        return _first_line(error)
    return None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:120]
