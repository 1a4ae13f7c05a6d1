"""Ranks of which one dies, refuses, stalls or cannot find the others: one says why, the others end quietly."""

import signal
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.attempts.attempt import Outcome, attempt
from benchmarks.attempts.failing_ranks import AT_STEP, Ranks, started_by_hand, started_by_torchrun

LONG = ("--optimization.epochs", "300")
ONE_SAYS_WHY = "one rank says why, the other ends quietly with the same status"
SHORT = """
import contextlib
with contextlib.suppress(ImportError):  # of older commits
    import examples.pretrain.last_word as w
    w.PATIENCE = 8
"""
"""Code that shortens the time after which a stalled rank is named."""
SOON = """
import contextlib
with contextlib.suppress(ImportError):
    import examples.pretrain.launcher as m
    m.MEETING = 6
"""
"""Code that shortens the time within which all ranks must have started."""


def _agreed(ended: Ranks, *words: str, status: int | None = 1, gone: int | None = None) -> Outcome:
    """Return the outcome of ranks of which one should say these words.

    The status of ``gone`` does not count. A ``status`` of None is any but 0.
    """
    statuses = {each.status for rank, each in enumerate(ended.ranks) if rank != gone}
    lines = ended.lines
    told = len(lines) == 1 and all(word in lines[0] for word in words)
    return Outcome(
        ended.clean
        and told
        and (statuses == {status} if status is not None else len(statuses) == 1 and 0 not in statuses),
        ended.seen(),
    )


def _at_step(body: str) -> str:
    return AT_STEP + f"def fault(run):\n    {body}\n"


def _on(rank: int, code: str) -> tuple[str, str]:
    return ("", code) if rank else (code, "")


Start = Callable[..., Ranks]


def _fails(start: Start, rank: int, body: str, *words: str, status: int | None = 1, gone: int | None = None) -> Outcome:
    """Let a rank run a statement before the first step of the second epoch."""
    with tempfile.TemporaryDirectory() as name:
        ended = start(Path(name), "--out", f"{name}/run", *LONG, codes=_on(rank, _at_step(body)))
        return _agreed(ended, *words, status=status, gone=gone)


KILLED = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
STOPPED = "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)"
CTRL_C = "import os, signal; os.kill(os.getpid(), signal.SIGINT)"
BAD_DATA = "raise ValueError('image 7 is damaged')"


# ---- torchrun ----


@attempt("torchrun: rank 1 is killed in the second epoch", right="one line names the rank and the kept epoch")
def killed_under_torchrun() -> Outcome:
    return _fails(started_by_torchrun, 1, KILLED, "ank 1", "epoch 1 is whole", status=None, gone=1)


@attempt("torchrun: Ctrl-C in the terminal", right="one line, status 130 on both")
def interrupted_under_torchrun() -> Outcome:
    with tempfile.TemporaryDirectory() as name:
        ended = started_by_torchrun(Path(name), "--out", f"{name}/run", *LONG, send=(signal.SIGINT, "byol 2/"))
        return _agreed(ended, "interrupted", "is whole", status=130)


@attempt("torchrun: SIGTERM, as a scheduler sends it", right="one line, status 143 on both")
def terminated_under_torchrun() -> Outcome:
    with tempfile.TemporaryDirectory() as name:
        ended = started_by_torchrun(Path(name), "--out", f"{name}/run", *LONG, send=(signal.SIGTERM, "byol 2/"))
        return _agreed(ended, "SIGTERM", "is whole", status=143)


# ---- processes started one by one, as torch.multiprocessing does ----


@attempt("rank 1 is killed in the second epoch", right="one line names the rank and the kept epoch")
def killed() -> Outcome:
    return _fails(started_by_hand, 1, KILLED, "rank 1", "epoch 1 is whole", gone=1)


@attempt("rank 0, where the ranks meet, is killed", right="one line names the rank and the kept epoch")
def first_killed() -> Outcome:
    return _fails(started_by_hand, 0, KILLED, "rank 0", "epoch 1 is whole", gone=0)


@attempt("bad data on rank 0 in the second epoch", right=ONE_SAYS_WHY)
def bad_data_on_the_first() -> Outcome:
    return _fails(started_by_hand, 0, BAD_DATA, "image 7 is damaged")


@attempt("Ctrl-C on rank 0 alone", right="one line, status 130 on both")
def first_interrupted() -> Outcome:
    return _fails(started_by_hand, 0, CTRL_C, "interrupted", "epoch 1 is whole", status=130)


@attempt("a fault of the program on rank 1", right="a traceback on rank 1 alone, the other ends quietly")
def fault_of_the_program() -> Outcome:
    with tempfile.TemporaryDirectory() as name:
        code = _at_step("raise KeyError('a fault')")
        ended = started_by_hand(Path(name), "--out", f"{name}/run", *LONG, codes=("", code))
        first, second = ended.ranks
        alone = not first.lines and "KeyError: 'a fault'" in second.errors
        return Outcome(alone and {first.status, second.status} == {1}, ended.seen())


@attempt("a full disk under rank 0's checkpoint", right=ONE_SAYS_WHY)
def full_disk_on_the_first() -> Outcome:
    body = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))"
    return _fails(started_by_hand, 0, body, "checkpoint.pt cannot be written", "epoch 1 is whole", "ulimit -f")


@attempt("a folder that the ranks do not share", right=ONE_SAYS_WHY)
def folder_not_shared() -> Outcome:
    with tempfile.TemporaryDirectory() as name:
        code = f"os.makedirs('{name}/' + rank); os.chdir('{name}/' + rank)"
        ended = started_by_hand(Path(name), "--out", "run", codes=(code, code))
        return _agreed(ended, "out is", "on rank 1")


@attempt("a damaged checkpoint, --resume on two ranks", right=ONE_SAYS_WHY)
def damaged_checkpoint() -> Outcome:
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "run" / "byol").mkdir(parents=True)
        (Path(name) / "run" / "byol" / "checkpoint.pt").write_bytes(b"PK\3\4" + bytes(1000))
        ended = started_by_hand(Path(name), "--out", f"{name}/run", "--resume")
        return _agreed(ended, "checkpoint.pt: not a readable checkpoint")


@attempt("rank 1 stalls, and nobody launches again", right="it is named after the stated time")
def stalled() -> Outcome:
    with tempfile.TemporaryDirectory() as name:
        code = _at_step(STOPPED)
        ended = started_by_hand(Path(name), "--out", f"{name}/run", *LONG, codes=(SHORT, SHORT + code), timeout=80)
        return _agreed(ended, "rank 1 did not answer for 8 s", "epoch 1 is whole", gone=1)


GROUP_OF_CALLER = """
import torch.distributed as dist
meet = "file://" + os.environ["FOLDER"] + "/meet"
dist.init_process_group("gloo", init_method=meet, rank=int(rank), world_size=2)
"""


@attempt("torch.multiprocessing with a group of the caller's own, bad data on rank 1", right=ONE_SAYS_WHY)
def bad_data_in_a_group_of_the_caller() -> Outcome:
    with tempfile.TemporaryDirectory() as name:
        codes = (GROUP_OF_CALLER, GROUP_OF_CALLER + _at_step(BAD_DATA))
        ended = started_by_hand(Path(name), "--out", f"{name}/run", *LONG, codes=codes)
        said = "image 7 is damaged" in ended.ranks[1].errors and len(ended.ranks[1].lines) == 1
        quiet = len(ended.ranks[0].lines) <= 1  # without a store of ours it can only say that another has ended
        return Outcome(ended.clean and said and quiet and {e.status for e in ended.ranks} == {1}, ended.seen())


# ---- the meeting ----


def _meeting(*words: str, code: str = "", also: bool = True, **changes: str | None) -> Outcome:
    """Start the first of two ranks with other variables: it should refuse in a line, and write nothing."""
    with tempfile.TemporaryDirectory() as name:
        environment = {"WORLD_SIZE": "2", **changes}
        codes = (code, "")
        ended = started_by_hand(Path(name), "--out", f"{name}/run", codes=codes, environments=[environment], timeout=28)
        outcome = _agreed(ended, *words)
        return outcome._replace(survived=outcome.survived and also and not (Path(name) / "run").exists())


@attempt("RANK is not set", right="refused with what to set")
def no_rank() -> Outcome:
    return _meeting("got no RANK", "torchrun", RANK=None)


@attempt("MASTER_ADDR and MASTER_PORT are not set", right="refused with what to set")
def no_address() -> Outcome:
    return _meeting("got no MASTER_ADDR, MASTER_PORT", "torchrun", MASTER_ADDR=None, MASTER_PORT=None)


@attempt("RANK=5 of WORLD_SIZE=2", right="refused by name")
def rank_beyond_all() -> Outcome:
    return _meeting("RANK must be below WORLD_SIZE, got 5 of 2", RANK="5")


@attempt("WORLD_SIZE=two", right="refused by name")
def count_in_words() -> Outcome:
    return _meeting("WORLD_SIZE must be", "got two", WORLD_SIZE="two")


@attempt("MASTER_PORT=99999", right="refused by name")
def port_too_large() -> Outcome:
    return _meeting("MASTER_PORT must be from 1 to 65535, got 99999", MASTER_PORT="99999")


@attempt("MASTER_PORT is taken by another program", right="refused with another port to set")
def port_taken() -> Outcome:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = str(other.getsockname()[1])
        return _meeting("MASTER_PORT must be a free port", port, "set another", MASTER_PORT=port)


@attempt("the second of two ranks never starts", right="said after the stated time")
def rank_never_starts() -> Outcome:
    return _meeting("2 ranks must meet at", "within 6 s", code=SOON)
