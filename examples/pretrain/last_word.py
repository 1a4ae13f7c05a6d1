"""Which rank says why all of them end: the first with a reason. The others end quietly, soon, with its status."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from examples.pretrain.endings import RankGone, status_of

PATIENCE = 1800.0
"""Seconds after which a rank that does not answer is named."""
GRACE = 10.0
"""Seconds that a rank which hears that another has gone waits for its reason."""

KEY = "examples.pretrain/last word"


class LastWord:
    """The end of a run of several ranks, agreed in the store where they met.

    Args:
        store: of the process group; it must outlive the group.
        rank: of this process.
        world_size: number of ranks.
    """

    def __init__(self, store: Any, rank: int, world_size: int) -> None:
        self.store = store
        self.rank = rank
        self.world_size = world_size
        self.word: str | None = None
        """Rank and status of the last word, once this rank has heard it."""

    def listen(self) -> None:
        """Hear the last word while this rank waits in a collective: later, the store may have ended with rank 0."""
        threading.Thread(target=self._hear, daemon=True).start()

    def _hear(self) -> None:
        # Any error: the store has gone, or Python ends.
        with contextlib.suppress(Exception):
            while not self.store.check([KEY]):
                time.sleep(0.5)
            self.word = self.store.get(KEY).decode()
            self.store.set(_key(self.rank, "done"), "")

    def settle(self, error: BaseException) -> BaseException:
        """Leave the process group, and return what this rank is to raise: the error, or a quiet end.

        Those that wait for this rank in a collective only learn of its end when the process ends.

        Args:
            error: what ended the work of this rank; perhaps only that another rank has gone.
        """
        # torchrun ends the other ranks once one has ended: theirs would be the signal's exit status, not their own.
        with contextlib.suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            with _quiet():
                self.store.set_timeout(timedelta(seconds=GRACE))
                ending = self._echo(error) if is_echo(error) else self._reason(error)
                self.store.set(_key(self.rank, "done"), "")
                if self.rank == 0 and not _agent_holds_store():  # the store ends with this process: others read it
                    self._wait("done")
        except RuntimeError:  # the rank that holds the store has gone
            ending = RankGone(gone([0], error)) if is_echo(error) else error
        if self.word is not None and isinstance(ending, RankGone):
            ending = SystemExit(int(self.word.split()[1]))
        _leave()
        for note in getattr(error, "__notes__", []) if isinstance(ending, RankGone) else []:
            ending.add_note(note)
        return ending

    def _reason(self, error: BaseException) -> BaseException:
        word = self.store.compare_set(KEY, "", f"{self.rank} {status_of(error)}").decode()
        speaker, status = map(int, word.split())
        self.store.set(_key(self.rank, "here"), "ends")
        if speaker != self.rank:
            return SystemExit(status)
        if isinstance(error, KeyboardInterrupt):
            # Often not the reason itself: torchrun sends a signal to the rest when a rank was killed.
            self.store.set(_key(self.rank, "done"), "")
            silent = self._wait("done")
            if silent:
                error.add_note(f"{named(silent)} had ended without a word")
        return error

    def _echo(self, error: BaseException) -> BaseException:
        self.store.set(_key(self.rank, "here"), "waited" if _timed_out(error) else "heard")
        silent = self._wait("here")
        if self.store.check([KEY]):
            return SystemExit(int(self.store.get(KEY).decode().split()[1]))
        there = [rank for rank in range(self.world_size) if rank not in silent]
        if self.rank != there[0]:
            return SystemExit(1)
        answers = [self.store.get(_key(rank, "here")) for rank in there]
        return RankGone(gone(silent, error, stalled=b"waited" in answers))

    def _wait(self, word: str) -> list[int]:
        """Return the ranks that have not said a word after a while; at once if all have."""
        until = time.monotonic() + GRACE
        while True:
            silent = [rank for rank in range(self.world_size) if not self.store.check([_key(rank, word)])]
            if not silent or time.monotonic() > until:
                return silent
            time.sleep(0.05)


def is_echo(error: BaseException) -> bool:
    """Return True for the errors of a collective whose other side has gone: the reason is elsewhere."""
    words = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "ProcessGroup")
    return isinstance(error, RuntimeError) and (
        isinstance(error, dist.DistError) or any(word in str(error) for word in words)
    )


def gone(ranks: list[int], error: BaseException, *, stalled: bool | None = None) -> str:
    """Return the sentence on ranks that ended without a word, or do not answer."""
    if not ranks:
        return f"the connection between the ranks broke ({' '.join(str(error).split())[:120]})"
    if _timed_out(error) if stalled is None else stalled:
        return (
            f"{named(ranks)} did not answer for {PATIENCE:g} s, so that the others have ended: look whether it is "
            "stopped, or waits for a disk"
        )
    return f"{named(ranks)} ended without a word, as a killed process does, perhaps for want of memory"


def named(ranks: list[int]) -> str:
    """Return ranks in words.

    >>> named([1]), named([1, 3])
    ('rank 1', 'ranks 1, 3')
    """
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's C++ from printing its stack where the store has gone; it asks neither Python nor a logger."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _key(rank: int, word: str) -> str:
    return f"{KEY}: {rank} {word}"


def _agent_holds_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _timed_out(error: BaseException) -> bool:
    return "imed out" in str(error) or "imeout" in str(error)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
