"""How a command ends while it imports its libraries, which takes seconds: in one line, and nothing has been written.

This file imports nothing that takes time, and nothing of the example.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType, TracebackType
from typing import NoReturn

SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")
"""Ctrl-C, a scheduler's word to end, and a terminal that is closed; Windows lacks the last."""


def guard() -> None:
    """Until :func:`release`, end the process in one line at a signal, or where a library cannot be imported."""
    for number in heard():
        signal.signal(number, _end)
    sys.excepthook = _one_line


def release() -> None:
    """Undo :func:`guard`."""
    for number in heard():
        if signal.getsignal(number) is _end:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    if sys.excepthook is _one_line:
        sys.excepthook = sys.__excepthook__


def heard() -> list[signal.Signals]:
    """Return the signals that end a command here: not those that `nohup` or a shell has told it to ignore."""
    there = [signal.Signals[name] for name in SIGNALS if hasattr(signal, name)]
    return [number for number in there if signal.getsignal(number) is not signal.SIG_IGN]


def _end(number: int, frame: FrameType | None) -> NoReturn:
    if os.environ.get("RANK", "0") == "0":  # one line for all ranks
        os.write(2, f"\n{word_of(number)} before anything was written\n".encode())
    os._exit(128 + number)


def word_of(number: int) -> str:
    """Return what a signal does.

    >>> word_of(2), word_of(15)
    ('interrupted', 'ended by SIGTERM')
    """
    return "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"


def _one_line(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not issubclass(kind, ImportError | MemoryError | OSError):
        sys.__excepthook__(kind, error, trace)
        return
    reason = " ".join(str(error).split()) or kind.__name__
    print(
        f"error: a library cannot be imported: {reason}. Free memory, or raise its limit; or let `python3 examples` "
        "install the packages again",
        file=sys.stderr,
    )
