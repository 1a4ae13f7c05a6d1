"""What a launcher has to set: checked before the ranks meet, with the line to write where it is wrong."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

MEETING = 600.0
"""Seconds within which all ranks must have started."""
MEANING = {
    "RANK": "the number of this process among all, from 0",
    "WORLD_SIZE": "the number of processes",
    "LOCAL_RANK": "the number of this process on its machine, from 0",
    "MASTER_ADDR": "the name of the machine of rank 0",
    "MASTER_PORT": "a free port there, such as 29501",
}


def check_environment() -> None:
    """Raise ValueError unless the variables by which ranks find each other are all set, and fit each other."""
    environment = os.environ
    missing = [name for name in MEANING if not environment.get(name)]
    if missing:
        explained = "; ".join(f"{name} is {MEANING[name]}" for name in missing)
        raise ValueError(
            f"a rank needs {', '.join(MEANING)}, got no {', '.join(missing)}: start with `torchrun --standalone "
            f"--nproc-per-node=2 -m examples.pretrain ...`, which sets all, or set what is missing ({explained})"
        )
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        if not environment[name].isdecimal():
            raise ValueError(f"{name} must be {MEANING[name]}, got {environment[name]}: set a number")
    rank, count, port = (int(environment[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    if rank >= count:
        raise ValueError(f"RANK must be below WORLD_SIZE, got {rank} of {count}: the ranks of {count} start at 0")
    if not 0 < port < 2**16:
        raise ValueError(f"MASTER_PORT must be from 1 to 65535, got {port}: set a free one, such as 29501")


def meet() -> tuple[Any, int, int]:
    """Return the store in which all ranks have met, the number of this rank, and that of all.

    Raises:
        ValueError: the variables are wrong, the port is taken, or a rank has not come in time.
    """
    check_environment()
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    try:
        store, rank, count = next(iter(rendezvous("env://", timeout=timedelta(seconds=MEETING))))
    except dist.DistError as error:
        if "EADDRINUSE" in str(error):
            raise ValueError(
                f"MASTER_PORT must be a free port, got {port}, which another program uses: set another, such as "
                f"MASTER_PORT={int(port) % 65535 + 1}, or start with `torchrun --standalone`"
            ) from error
        raise ValueError(
            f"{os.environ['WORLD_SIZE']} ranks must meet at {address}:{port} within {MEETING:g} s, and did not: start "
            "one process for each RANK, with the MASTER_ADDR and MASTER_PORT of rank 0"
        ) from error
    return store, rank, count
