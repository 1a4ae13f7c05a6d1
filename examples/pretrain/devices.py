"""The device of a command: refused before anything is drawn or written, if this machine does not have it."""

from __future__ import annotations

import torch

FITTING = ("cpu", "cuda", "mps", "xpu")
"""Kinds of devices that can train; others, such as meta, hold no values."""


def check_device(device: str) -> None:
    """Raise ValueError unless torch knows the device and this machine has it.

    >>> check_device("cpu")
    >>> check_device("meta")
    Traceback (most recent call last):
    ValueError: --device must be one that this machine can train on (cpu...), got meta
    """
    try:
        found = torch.device(device)
    except RuntimeError:
        found = None
    if found is None or found.type not in FITTING or (found.index or 0) >= _count(found.type):
        there = ", ".join(name for name in FITTING if _count(name))
        raise ValueError(f"--device must be one that this machine can train on ({there}), got {device or 'nothing'}")


def _count(kind: str) -> int:
    """Return the number of devices of a kind that this process can use."""
    if kind == "cpu":
        return 1
    if kind == "mps":
        return int(torch.backends.mps.is_available())
    module = getattr(torch, kind)
    return int(module.device_count()) if module.is_available() else 0
