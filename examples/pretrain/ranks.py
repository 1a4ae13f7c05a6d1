"""The processes of a run under `torchrun`: rank, common decisions and averages."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

T = TypeVar("T")


def rank() -> int:
    """Return the number of this process, 0 without torchrun."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes, 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextlib.contextmanager
def joined(device: str) -> Iterator[None]:
    """Join the processes that `torchrun` started in a process group; do nothing without torchrun."""
    if "LOCAL_RANK" not in os.environ or dist.is_initialized():
        yield
        return
    if device.startswith("cuda"):
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def decided_by_first(function: Callable[[], T]) -> T:
    """Call `function` on rank 0 and return its result, or raise its error, on all ranks."""
    if world_size() == 1:
        return function()
    found: list[Any] = [None, None]
    if rank() == 0:
        try:
            found[0] = function()
        except Exception as error:
            found[1] = error
    dist.broadcast_object_list(found)
    if found[1] is not None:
        raise found[1]
    result: T = found[0]
    return result


def all_together() -> None:
    """Wait until all ranks are here."""
    if dist.is_initialized():
        dist.barrier()


@torch.no_grad()
def average_(tensors: list[torch.Tensor]) -> None:
    """Replace each tensor by its mean over the ranks."""
    if world_size() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)
            tensor /= world_size()


def average_statistics_(model: nn.Module) -> None:
    """Replace BatchNorm's running statistics, which each rank gathers from its own images, by their mean."""
    average_([buffer for name, buffer in model.named_buffers() if "running_" in name])
