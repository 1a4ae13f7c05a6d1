"""What an attempt is, and how one is run."""

from __future__ import annotations

import dataclasses
import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

__all__ = ["ATTEMPTS", "Attempt", "Outcome", "attempt", "kinds", "load", "run_command", "run_here"]

ROOT = Path(__file__).resolve().parents[2]


class Outcome(NamedTuple):
    """What came out of an attempt."""

    survived: bool
    """True where the right thing happened."""
    seen: str
    """What happened, in a few words: a figure, or the first line of what was printed."""


@dataclasses.dataclass(frozen=True)
class Attempt:
    """Something that a user, a machine or a file may do."""

    kind: str
    """The file that holds it, such as ``"teacher"``."""
    name: str
    title: str
    """What is done, as in "bf16 student, momentum 0.996, 500 updates"."""
    right: str
    """What should happen."""
    timeout: float
    """Seconds after which the attempt counts as lost."""
    run: Callable[[], Outcome]


ATTEMPTS: dict[str, Attempt] = {}
"""Attempts by ``"kind.name"``, filled when their files are imported."""


def attempt(
    title: str, *, right: str, timeout: float = 120
) -> Callable[[Callable[[], Outcome]], Callable[[], Outcome]]:
    """Register a function as an attempt. It takes nothing and returns an :class:`Outcome`.

    An exception that the function lets through is an outcome too: not survived.

    Args:
        title: what is done, in at most a line.
        right: what should happen, in at most a line.
        timeout: seconds after which the attempt counts as lost.
    """

    def register(function: Callable[[], Outcome]) -> Callable[[], Outcome]:
        kind = function.__module__.rpartition(".")[2]
        name = f"{kind}.{function.__name__}"
        if name in ATTEMPTS:
            raise ValueError(f"each attempt needs a name of its own: {name} is there twice")
        ATTEMPTS[name] = Attempt(kind, name, title, right, timeout, function)
        return function

    return register


def kinds() -> list[str]:
    """Return the names of the files that hold attempts."""
    own = ("__init__", "__main__", "attempt", "failing", "failing_ranks")
    return sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem not in own)


def load(*names: str) -> list[Attempt]:
    """Return the attempts of these kinds, or of all, in the order in which the files give them."""
    for kind in names or kinds():
        importlib.import_module(f"benchmarks.attempts.{kind}")
    return [one for one in ATTEMPTS.values() if not names or one.kind in names]


def run_here(one: Attempt) -> Outcome:
    """Run an attempt in this process; an exception is an outcome that did not survive."""
    try:
        outcome = one.run()
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        return Outcome(survived=False, seen=f"{type(error).__name__}: {first}"[:300])
    return Outcome(bool(outcome.survived), outcome.seen[:300])


def run_command(*arguments: str | Path, timeout: float = 100, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``python ARGUMENTS`` in the root of the tree, on one thread, and return what it printed.

    Args:
        arguments: as in ``"-m", "examples.pretrain", "demo", "--out", folder``.
        timeout: seconds.
        environment: variables to set beside those of this process.
    """
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=timeout, check=False
    )
