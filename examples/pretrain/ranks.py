"""The processes of a run under `torchrun`: rank, common decisions and averages."""

from __future__ import annotations

import contextlib
import inspect
import os
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from examples.pretrain import last_word
from examples.pretrain.endings import RankGone
from examples.pretrain.last_word import LastWord, is_echo
from examples.pretrain.launcher import meet

T = TypeVar("T")


def rank() -> int:
    """Return the number of this process, 0 without torchrun."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes, 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def buffers_stay() -> dict[str, Any]:
    """Return the option by which DistributedDataParallel sends no buffers at each forward pass.

    Versions of torch that lack it send them, which changes nothing here but the time.

    >>> DistributedDataParallel.__name__, set(buffers_stay()) <= {"forward_sync_buffers"}
    ('DistributedDataParallel', True)
    """
    name = "forward_sync_buffers"
    return {name: False} if name in inspect.signature(DistributedDataParallel.__init__).parameters else {}


@contextlib.contextmanager
def joined(device: str) -> Iterator[None]:
    """Join the processes that `torchrun` started in a process group; do nothing without torchrun.

    Raises:
        ValueError: another launcher started several processes, which know nothing of each other.
    """
    check_launcher()
    if dist.is_initialized():  # by the caller, who knows where the ranks have met
        try:
            yield
        except RuntimeError as error:
            if not is_echo(error):
                raise
            raise RankGone("another rank has ended, and says why itself") from error
        return
    if "LOCAL_RANK" not in os.environ:
        yield
        return
    store, rank, count = meet()
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    patience = timedelta(seconds=last_word.PATIENCE)
    dist.init_process_group("nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=count, timeout=patience)
    last = LastWord(store, rank, count)
    last.listen()
    try:
        yield
    except BaseException as error:
        ending = last.settle(error)
        if ending is error:
            raise
        raise ending from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def check_launcher() -> None:
    """Raise ValueError if this is one of several processes that are no ranks: each would train alone in one folder."""
    environment = os.environ
    if "LOCAL_RANK" in environment:
        return
    if _number("WORLD_SIZE") > 1:
        raise ValueError(
            f"RANK and WORLD_SIZE need LOCAL_RANK beside them, got WORLD_SIZE={environment['WORLD_SIZE']} without it: "
            "start with torchrun, which sets all three"
        )
    # A batch script is a single process of an allocation for many; a step that srun started says how many it has.
    tasks = _number("SLURM_STEP_NUM_TASKS") or _number("SLURM_NTASKS")
    if "SLURM_PROCID" in environment and tasks > 1:
        nodes = max(_number("SLURM_STEP_NUM_NODES") or _number("SLURM_NNODES"), 1)
        raise ValueError(
            f"processes of one run must be started by torchrun, got {tasks} by srun, which know nothing of each other: "
            f"write `{srun_line(tasks, nodes)}`"
        )
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"):
        if _number(name) > 1:
            raise ValueError(
                f"processes of one run must be started by torchrun, got {name}={environment[name]} of MPI, which know "
                f"nothing of each other: write `torchrun --standalone --nproc-per-node={environment[name]} -m "
                "examples.pretrain ...`"
            )


def srun_line(tasks: int, nodes: int) -> str:
    """Return the command that starts `tasks` ranks on `nodes` nodes of a SLURM allocation.

    >>> srun_line(4, 1)
    'srun --ntasks=1 torchrun --standalone --nproc-per-node=4 -m examples.pretrain ...'
    """
    if nodes == 1:
        return f"srun --ntasks=1 torchrun --standalone --nproc-per-node={tasks} -m examples.pretrain ..."
    return (
        f"srun --ntasks={nodes} --ntasks-per-node=1 torchrun --nnodes={nodes} --nproc-per-node={-(-tasks // nodes)} "
        "--rdzv-backend=c10d --rdzv-id=$SLURM_JOB_ID --rdzv-endpoint=$(scontrol show hostnames | head -n 1):29500 "
        "-m examples.pretrain ..."
    )


def _number(name: str) -> int:
    """Return an environment variable as a number, 0 if it is not set or not a number."""
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else 0


def gathered(value: T) -> list[T]:
    """Return the values of all ranks, in their order."""
    found: list[Any] = [None] * world_size()
    if world_size() == 1:
        return [value]
    dist.all_gather_object(found, value)
    return found


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


def while_first_works(steps: Iterable[object], *, every: float = 20.0) -> None:
    """Run `steps` on rank 0 while the others wait, however long it takes; its error is raised on all ranks.

    Args:
        steps: work in steps that are each much shorter than the time-out of the process group.
        every: seconds after which a word goes round, so that no rank waits until that time-out.
    """
    if rank() > 0:
        while (word := _word_of_first(BUSY)) == BUSY:
            pass
        if word != DONE:
            raise ValueError(word)
        return
    last = time.monotonic()
    try:
        for _ in steps:
            if time.monotonic() - last > every:
                _word_of_first(BUSY)
                last = time.monotonic()
    except Exception as error:
        _word_of_first(f"rank 0: {error}")
        raise
    _word_of_first(DONE)


BUSY, DONE = "busy", "done"


def _word_of_first(word: str) -> str:
    """Return the word that rank 0 gives, on all ranks."""
    words = [word]
    if world_size() > 1:
        dist.broadcast_object_list(words)
    return words[0]


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


def concatenated(rows: torch.Tensor) -> torch.Tensor:
    """Return the rows of all ranks, in the order of the ranks; every rank must have as many."""
    if world_size() == 1:
        return rows
    found = [torch.empty_like(rows) for _ in range(world_size())]
    dist.all_gather(found, rows.contiguous())
    return torch.cat(found)
