"""How a command ends: what a user or the machine does to it is said in one line, with the status that shells expect."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

import torch

from examples.pretrain import startup
from examples.pretrain.divergence import Diverged
from examples.pretrain.unwritten import Unwritten, sentence

BROKEN_PIPE = 128 + 13
"""Status of a program whose reader has gone, as in `python3 examples | head`."""


class Stopped(KeyboardInterrupt):
    """A signal other than Ctrl-C that ends the command as Ctrl-C does.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


class RankGone(RuntimeError):
    """Another process of the same run has ended, or does not answer."""


@contextlib.contextmanager
def told(
    *, go_on: str = "the same command goes on from there", start: str = "the same command starts again"
) -> Iterator[None]:
    """End the process in one line if the work inside is refused, fails or is stopped; faults of ours keep a traceback.

    Signals end the work as Ctrl-C does, from here until the end of the block; a second one ends the process at once.

    Args:
        go_on: what continues the work, said if a checkpoint is kept.
        start: what to do if none is.

    Raises:
        SystemExit: with 1, or with 128 and the number of the signal.
    """
    with _signals_raised():
        try:
            yield
            sys.stdout.flush()
        except (Exception, KeyboardInterrupt) as error:
            kept = getattr(error, "__notes__", [])
            line = line_of(error, kept, go_on if kept else start)
            if line is None:
                raise
            end(line, status_of(error), error)


def status_of(error: BaseException) -> int:
    """Return the exit status of a process that ends by an error."""
    if isinstance(error, KeyboardInterrupt):
        return 128 + (error.number if isinstance(error, Stopped) else signal.SIGINT)
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return BROKEN_PIPE if isinstance(error, BrokenPipeError) else 1


def line_of(error: BaseException, kept: list[str], next_step: str) -> str | None:
    """Return the line that a user reads; empty if nobody reads it, None for a fault of the program.

    Args:
        error: what ended the work.
        kept: what is safe, in parts of sentences.
        next_step: how to go on.
    """
    safe = "".join(f". {note[:1].upper()}{note[1:]}" for note in kept)
    if isinstance(error, KeyboardInterrupt):
        number = error.number if isinstance(error, Stopped) else int(signal.SIGINT)
        return f"\n{startup.word_of(number)}{safe or ';'}{'.' * bool(safe)} {_cased(next_step, start=bool(safe))}"
    if isinstance(error, Unwritten):
        return f"error: {error}{safe}. {_cased(error.cure, start=True)}, then {next_step}"
    if isinstance(error, BrokenPipeError) and error.filename is None:
        return ""
    if isinstance(error, OSError):
        return f"error: {sentence(error)}{safe}"
    if isinstance(error, MemoryError) or _lacks_memory(error):
        reason = " ".join(str(error).split())
        return (
            f"error: not enough memory{f' ({reason[:200]})' if reason else ''}{safe}. Give fewer or smaller images, a "
            f"smaller batch or model, or free memory; then {next_step}"
        )
    if isinstance(error, RankGone):
        return f"error: {error}{safe}. {_cased(next_step, start=True)}"
    if isinstance(error, RuntimeError) and "DataLoader worker" in str(error):
        return f"error: a process that reads images was killed, perhaps for want of memory{safe}. Then {next_step}"
    if isinstance(error, ValueError | TypeError | ImportError | Diverged):
        return f"error: {error}{safe}"
    return None


def end(line: str, status: int, error: BaseException) -> None:
    """End the process with a line on the terminal that those of other ranks cannot cut in two."""
    try:
        sys.stdout.flush()
    except OSError:  # it cannot be written, now or when Python ends
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if status == 1 and "LOCAL_RANK" not in os.environ:
        raise SystemExit(line) from error
    if line:
        sys.stderr.write(f"{line}\n")  # in one piece; sys.exit writes the end of the line by itself
    raise SystemExit(status) from error


def _cased(text: str, *, start: bool) -> str:
    return text[:1].upper() + text[1:] if start else text


def _lacks_memory(error: BaseException) -> bool:
    """Return True for torch's errors of allocators, which are of no kind of their own on a CPU."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    words = ("can't allocate memory", "not enough memory", "Cannot allocate memory", "unable to mmap")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


@contextlib.contextmanager
def _signals_raised() -> Iterator[None]:
    """Raise an exception in the main thread at a signal that ends a command, and restore all handlers afterwards."""
    startup.release()
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in startup.heard()}
    stopping = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopping
        if stopping:
            if "LOCAL_RANK" in os.environ:  # torchrun repeats what the terminal has sent
                return
            os._exit(128 + number)
        stopping = True
        raise KeyboardInterrupt if number == signal.SIGINT else Stopped(number)

    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            # A rank that ends may ignore a signal by now, so that its exit status stays its own. None: not Python's.
            if handler is not None and signal.getsignal(number) is stop:
                signal.signal(number, handler)
