"""Processes over which tests compare ranks: forks of one server, which imports once what all of them need."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch.multiprocessing as mp

# The last two are what a first forward pass and the sharded cases import.
PRELOADED = ["vqssl", "tests.laws", "torch._dynamo", "torch.distributed.fsdp"]


def run_ranks(work: Callable[..., None], arguments: Sequence[Any], count: int = 2, *, seconds: float = 240) -> None:
    """Run `work(rank, *arguments)` in `count` processes and wait for all.

    If one raises, so does this; if they are not done in time, it fails. No process is left behind.
    """
    mp.get_context("forkserver").set_forkserver_preload(PRELOADED)
    context = mp.start_processes(  # type: ignore[attr-defined]
        work, tuple(arguments), count, join=False, start_method="forkserver"
    )
    try:
        deadline = time.monotonic() + seconds
        while not context.join(timeout=5):
            assert time.monotonic() < deadline, "the ranks hang"
    finally:
        for process in context.processes:
            process.kill()
