"""Runs of several ranks, started by torchrun or one by one, of which each may run some code first."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.attempts.attempt import ROOT
from benchmarks.attempts.failing import SMALL, Ended, Started

RANK = """
import os, runpy, signal, sys
signal.alarm(int(os.environ["ALARM"]))  # a rank that waits for ever must not outlive the attempt
rank = os.environ["RANK"] if "RANK" in os.environ else "none"
exec(os.environ.get("CODE" + rank, ""))
sys.argv = ["examples.pretrain", *sys.argv[1:], *os.environ.get("MORE" + rank, "").split()]
status = 0
try:
    runpy.run_module("examples.pretrain", run_name="__main__")
except SystemExit as end:
    status = end.code if isinstance(end.code, int) else int(end.code is not None)
    raise
except BaseException:
    status = 1
    raise
finally:
    open(os.environ["FOLDER"] + "/status" + rank, "w").write(str(status))
"""
"""A rank of the example that runs some code first, and writes its exit status to a file."""
AT_STEP = """
import examples.pretrain.train as train
def fault(run):
    pass
step = train.Run._step
def with_fault(run, *args):
    if run.epoch == 1:
        fault(run)
    return step(run, *args)
train.Run._step = with_fault
"""
"""Code that calls a function ``fault``, to be defined after it, before each step of the second epoch."""


class Ranks(NamedTuple):
    """The end of a run of several ranks."""

    ranks: list[Ended]
    status: int
    """Of the launcher."""

    def seen(self) -> str:
        """Return statuses and lines of all ranks in a line."""
        statuses = " and ".join(str(each.status) for each in self.ranks)
        said = " / ".join(f"rank {n}: {line}" for n, each in enumerate(self.ranks) for line in each.lines[-1:])
        return f"statuses {statuses}, {'' if self.clean else 'traceback, '}{said or 'nothing said'}"

    @property
    def clean(self) -> bool:
        """True if no rank has shown anything of its insides."""
        return all(each.clean for each in self.ranks)

    @property
    def lines(self) -> list[str]:
        """Error lines of all ranks."""
        return [line for each in self.ranks for line in each.lines]


def started_by_hand(
    folder: Path,
    *arguments: str | Path,
    codes: Sequence[str] = ("", ""),
    more: Sequence[str] = ("", ""),
    environments: Sequence[dict[str, str | None]] = ({}, {}),
    send: tuple[int, int, str] | None = None,
    timeout: float = 60,
) -> Ranks:
    """Start ranks as ``torch.multiprocessing`` does, each a process with variables of its own, and wait for all.

    Args:
        folder: for what they write.
        arguments: of the example.
        codes: what each rank runs first.
        more: further arguments of each rank.
        environments: variables of each rank; None removes one.
        send: a rank, a signal for it, and the word of rank 0's output after which it is sent.
        timeout: seconds after which what is left is killed.
    """
    (folder / "rank.py").write_text(RANK)
    port = _free_port()
    processes = []
    for rank, changes in enumerate(environments):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(len(environments))}
        own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **_variables(folder, codes, more, timeout)}
        merged = {**os.environ, **own, **changes}
        command = [str(folder / "rank.py"), *SMALL, "--methods", "byol", *map(str, arguments)]
        environment = {name: value for name, value in merged.items() if value is not None}
        with (folder / f"out{rank}").open("w") as out, (folder / f"err{rank}").open("w") as err:
            processes.append(Started(command, out.fileno(), err.fileno(), environment))
    until = time.monotonic() + timeout
    if send is not None:
        while send[2] not in (folder / "out0").read_text() and time.monotonic() < until:
            time.sleep(0.02)
        processes[send[0]].send(send[1])
    late = not all(process.wait(max(until - time.monotonic(), 0.1)) for process in processes)
    for process in processes:
        process.kill()
    return _ranks(folder, [-1 if one.returncode is None else one.returncode for one in processes], int(late))


def started_by_torchrun(
    folder: Path,
    *arguments: str | Path,
    codes: Sequence[str] = ("", ""),
    more: Sequence[str] = ("", ""),
    send: tuple[int, str] | None = None,
    timeout: float = 80,
) -> Ranks:
    """Start two ranks by torchrun and wait for it; ``send`` is a signal for torchrun, and the word of rank 0 before."""
    (folder / "rank.py").write_text(RANK)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--redirects", "3"]
    command = [sys.executable, "-P", *launch, "--log-dir", folder / "logs", folder / "rank.py"]
    environment = {**os.environ, **_variables(folder, codes, more, timeout)}
    process = subprocess.Popen(
        [*map(str, command), *SMALL, "--methods", "byol", *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    until = time.monotonic() + timeout

    def printed(rank: int, name: str) -> str:
        found = list((folder / "logs").rglob(f"{rank}/{name}.log"))
        return found[0].read_text() if found else ""

    if send is not None:
        while send[1] not in printed(0, "stdout") and time.monotonic() < until:
            time.sleep(0.02)
        os.killpg(process.pid, send[0]) if send[0] == signal.SIGINT else process.send_signal(send[0])
    try:
        status = process.wait(max(until - time.monotonic(), 1))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        status = process.wait()
    for rank in range(2):
        (folder / f"out{rank}").write_text(printed(rank, "stdout"))
        (folder / f"err{rank}").write_text(printed(rank, "stderr"))
    files = [folder / f"status{rank}" for rank in range(2)]  # of a rank that was killed there is none
    statuses = [int(file.read_text()) if file.exists() and file.read_text() else 137 for file in files]
    return _ranks(folder, statuses, status)


def _variables(folder: Path, codes: Sequence[str], more: Sequence[str], timeout: float) -> dict[str, str]:
    found = {"FOLDER": str(folder), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    found["ALARM"] = str(int(timeout + 5))
    for rank, (code, arguments) in enumerate(zip(codes, more, strict=True)):
        found |= {f"CODE{rank}": code, f"MORE{rank}": arguments}
    return found


def _ranks(folder: Path, statuses: Sequence[int], status: int) -> Ranks:
    ends = [
        Ended(own, (folder / f"out{rank}").read_text(), (folder / f"err{rank}").read_text())
        for rank, own in enumerate(statuses)
    ]
    return Ranks(ends, status)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
