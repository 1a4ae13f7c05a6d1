"""A lock on a folder of results, which the system releases when its holder ends, however it ends."""

from __future__ import annotations

import errno
import os
import platform
import sys
import warnings
from datetime import datetime
from pathlib import Path

from examples.pretrain.unwritten import writing

NAME = "run.lock"
"""The file that is locked. It stays behind and says who held the folder last; only the system's lock counts."""

_held: dict[tuple[int, Path], int] = {}
"""Open file descriptors by process and locked file; a forked process holds nothing of its parent's."""


def hold(folder: Path) -> None:
    """Keep other processes from writing to a folder until this process ends; create it if needed.

    A process may hold a folder several times. Files that a killed run left half written are removed. The lock also
    holds between machines that share a folder by NFS. Windows, and file systems without locks, get none.

    Raises:
        ValueError: another process holds the folder; nothing is changed then.
        Unwritten: the folder cannot be made or written to.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    path = folder.resolve() / NAME
    if _holds(path):
        return
    if path.is_symlink():
        raise ValueError(f"{path} must be a file, got a symbolic link: remove it")
    # The mode of open(); no link is followed even if one appears after the check above.
    with writing(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    try:
        _lock(descriptor, folder)
        holder = f"process {os.getpid()} on {platform.node()} since {datetime.now():%Y-%m-%d %H:%M}\n"
        with writing(path):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, holder.encode())
    except BaseException:
        os.close(descriptor)
        raise
    _held[os.getpid(), path] = descriptor
    for left in folder.glob("*.partial"):
        left.unlink()


def _holds(path: Path) -> bool:
    """Return True if this process holds the file that is at `path` now: another may have taken its place."""
    descriptor = _held.get((os.getpid(), path))
    if descriptor is None:
        return False
    if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
        return True
    os.close(_held.pop((os.getpid(), path)))
    return False


def _lock(descriptor: int, folder: Path) -> None:
    if sys.platform == "win32":
        return
    import fcntl

    try:
        # Not lockf: its locks end when the process closes any descriptor of the file.
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.read(descriptor, 200).decode(errors="replace").strip() or "another process"
        raise ValueError(
            f"{folder} must have one writer, and {holder} is writing there: wait until it ends, or give another --out. "
            "Several processes of one run are started by torchrun"
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise
        warnings.warn(f"{folder} cannot be locked ({error.strerror}): start no second run there", stacklevel=3)
