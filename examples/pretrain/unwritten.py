"""Files that cannot be written: which one, why, and what to do about it, in a sentence."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

CURES = {
    errno.ENOSPC: "make room on its disk",
    errno.EDQUOT: "make room within your quota",
    errno.EFBIG: "raise the limit on the size of files (`ulimit -f`)",
    errno.EROFS: "give a place that can be written to",
    errno.EACCES: "give a place that you may write to",
    errno.EPERM: "give a place that you may write to",
    errno.EMFILE: "raise the limit on open files (`ulimit -n`)",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ENOTDIR: "give a place whose folders are no files",
    errno.EEXIST: "give a place that is no file",
    errno.EISDIR: "remove the folder that is in its place",
}
"""What helps, by the number of the system's error."""


class Unwritten(OSError):
    """A file or folder cannot be written; ``filename`` is its path."""

    def __str__(self) -> str:
        return f"{self.filename} cannot be written: {self.strerror}"

    @property
    def cure(self) -> str:
        """What helps, as the start of a sentence."""
        return CURES.get(self.errno or 0, "look for the reason there")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise :class:`Unwritten` with the path of the file that is meant in place of any other OSError of the system.

    >>> with writing(Path("table.md")):
    ...     raise OSError(errno.ENOSPC, "No space left on device")
    Traceback (most recent call last):
    examples.pretrain.unwritten.Unwritten: table.md cannot be written: No space left on device
    """
    try:
        yield
    except Unwritten:
        raise
    except OSError as error:
        if error.errno is None:  # our own words
            raise
        raise Unwritten(error.errno, error.strerror or os.strerror(error.errno), str(path)) from error


def sentence(error: OSError) -> str:
    """Return what happened to which file, without the number of the error.

    >>> sentence(FileNotFoundError(2, "No such file or directory", "a.npz"))
    'a.npz: No such file or directory'
    """
    if isinstance(error, Unwritten) or error.errno is None or error.strerror is None:
        return str(error)
    named = error.filename if error.filename is not None else "the output, or a file"
    return f"{os.fsdecode(named) if isinstance(named, bytes) else named}: {error.strerror}"
