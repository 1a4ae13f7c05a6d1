"""Checkpoints: files that are whole at any moment, and refused where they are damaged."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import secrets
import warnings
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.utils._pytree import tree_leaves

from examples.pretrain.unwritten import writing

FORMAT = 3
"""Version of the checkpoint's layout. Version 2 differs in the fingerprint of the images, and is read too."""

MOST_PICKLED = 2**24
"""Bytes that a checkpoint may hold beside the values of its tensors: a thousand epochs of figures are a third of it."""


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Write a file so that it holds all of `content`, or what it held before, if the process or machine dies.

    The half-written file has a name of its own, so that two writers never share one. A symbolic link at `path` is
    replaced, not followed.

    Raises:
        Unwritten: it cannot be written; what it held before is kept, and no half-written file stays.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    try:
        with writing(path):
            with partial.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the new name has to reach the disk too
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint of tensors, numbers, strings, lists and dicts."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    write_whole(path, buffer.getbuffer())


def load(path: Path, device: str) -> dict[str, Any]:
    """Return the checkpoint at `path`, without executing anything that it holds.

    Every checksum is verified, which `torch.load` does not do. Memory is only taken for what the file really holds.

    Args:
        path: the file.
        device: where the tensors go. "meta" reads their shapes and dtypes alone, whatever their size.

    Raises:
        ValueError: the file is damaged, no checkpoint, or of another version of this example.
    """
    try:
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # zipfile's of duplicate names, torch's of foreign files
            _check_archive(file)
            file.seek(0)
            state = torch.load(file, map_location=device, weights_only=True)
        found = {"format": 1, **state}["format"]
    except Exception as error:  # torch raises many kinds on damaged files
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{path}: not a readable checkpoint of this example ({reason}): remove it, or give another --out"
        ) from error
    if found not in (2, FORMAT):
        raise ValueError(
            f"{path}: a checkpoint must have format {FORMAT}, got {found} of another version of this example: train "
            "again with another --out"
        )
    return state


def _check_archive(file: BinaryIO) -> None:
    """Raise ValueError unless the file is a zip of stored entries with the right checksums and sizes.

    `torch.save` compresses nothing. So what is unpacked is never larger than the file.
    """
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if len({entry.filename for entry in entries}) < len(entries):
            raise ValueError("it holds an entry twice")
        packed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
        if packed:
            raise ValueError(f"its entry {packed[0]} is compressed, which no checkpoint is")
        others = [entry for entry in entries if "/data/" not in entry.filename]
        if sum(entry.file_size for entry in others) > MOST_PICKLED:
            raise ValueError(f"it holds more than {MOST_PICKLED >> 20} MiB beside the values of its tensors")
        for entry in others:
            archive.read(entry)  # verifies the checksum
        file.seek(0)
        shapes = torch.load(file, map_location="meta", weights_only=True)
        needed = sum(leaf.nbytes for leaf in tree_leaves(shapes) if isinstance(leaf, torch.Tensor))
        values = sum(entry.file_size for entry in entries if entry not in others)
        if values > needed + MOST_PICKLED:
            raise ValueError(f"it holds {values:,} bytes of values, its tensors need {needed:,}")
        damaged = archive.testzip()
        if damaged:
            raise ValueError(f"the checksum of its entry {damaged} is wrong, the file is damaged")


def digest(path: Path) -> str:
    """Return a short digest of the bytes of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


BEFORE: dict[str, Any] = {
    "optimization.precision": "float32",
    "optimization.accumulate": 1,
    "optimization.channels_last": False,
    "optimization.compile": False,
}
"""What runs did before an option was there, by its name: their checkpoints and records lack it."""


def differences(theirs: Any, ours: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    """Return dotted name, first value and second value of each entry in which two nested dicts differ.

    An option that one of them lacks counts as it was before the option was there, see `BEFORE`.

    >>> differences({"optimization": {"lr": 1}}, {"optimization": {"lr": 2, "accumulate": 1}})
    [('optimization.lr', 1, 2)]
    """
    if isinstance(theirs, dict) and isinstance(ours, dict):
        found = []
        for key in sorted({*theirs, *ours}):
            full = f"{name}.{key}" if name else key
            before = BEFORE.get(".".join(full.split(".")[-2:]))
            found += differences(theirs.get(key, before), ours.get(key, before), full)
        return found
    return [] if theirs == ours else [(name, theirs, ours)]
