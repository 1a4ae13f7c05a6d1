"""Tables and pictures of work that is done: each is written if it can be, and what is left out is said."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from examples.pretrain.unwritten import Unwritten


class Outputs:
    """The files at the end of a command: a full disk or a library that is gone costs one of them, not the others."""

    def __init__(self) -> None:
        self.written: list[Path] = []
        self.lost: list[Unwritten] = []

    def add(self, write: Callable[[], object], *paths: Path) -> None:
        """Call a function that writes these files; say so if it cannot.

        Args:
            write: writes each file whole or not at all.
            paths: what it writes; the first stands for all in a message.
        """
        try:
            write()
        except Unwritten as error:
            self.lost.append(error)
            print(f"left out: {error}", file=sys.stderr)
        except (ImportError, MemoryError) as error:
            reason = " ".join(str(error).split()) or "not enough memory"
            print(f"left out: {paths[0]}: {reason}", file=sys.stderr)
        else:
            self.written += paths

    def check(self) -> None:
        """Raise the first error of a file that could not be written, once everything else is."""
        if self.lost:
            rest = "the rest is whole" if self.written else "what they were made from is whole"
            self.lost[0].add_note(f"{len(self.lost)} of {len(self.lost) + len(self.written)} files are missing, {rest}")
            raise self.lost[0]
