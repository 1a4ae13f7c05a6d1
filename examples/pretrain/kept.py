"""What is safe when work ends before its time: said beside the reason, after a look at the files."""

from __future__ import annotations

import contextlib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch

from examples.pretrain.divergence import Diverged


@contextlib.contextmanager
def kept(*folders: Path) -> Iterator[None]:
    """Add a note on the whole checkpoints in folders to whatever ends the work inside, if it has none.

    Refusals say by themselves what to do, and get no note.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if _from_outside(error) and not getattr(error, "__notes__", []):
            found = [note for folder in folders if (note := note_of(folder)) is not None]
            if found:
                error.add_note("; ".join(found))
        raise


def note_of(folder: Path) -> str | None:
    """Return which epoch the checkpoint in a folder holds, None without a whole one."""
    path = folder / "checkpoint.pt"
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        # Its tensors stay in the file: there may be no memory for them.
        epoch = torch.load(path, map_location="cpu", mmap=True, weights_only=True)["epoch"]
    except Exception:  # there is none, or no memory or disk to read it: no promise then
        return None
    return f"{path} of epoch {epoch} is whole" if damaged is None else None


def _from_outside(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno is not None
    if isinstance(error, ValueError):
        return str(error).startswith("rank ")  # of another rank, as agreement.on_all writes it
    return not isinstance(error, TypeError | Diverged)
