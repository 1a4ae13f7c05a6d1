"""Checkpoints: files that are whole at any moment, and refused where they do not belong to the run."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import torch

from examples.pretrain.data import ImageSet

FORMAT = 2
"""Version of the checkpoint's layout; another one is refused."""


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Write a file so that it holds all of `content`, or what it held before, if the process or machine dies."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
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

    Raises:
        ValueError: the file is damaged, no checkpoint, or of another version of this example.
    """
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        found = {"format": 1, **state}["format"]
    except Exception as error:  # torch raises many kinds on damaged files
        raise ValueError(
            f"{path}: not a readable checkpoint of this example ({error}): remove it, or give another --out"
        ) from error
    if found != FORMAT:
        raise ValueError(
            f"{path}: a checkpoint must have format {FORMAT}, got {found} of another version of this example: train "
            "again with another --out"
        )
    return state


def fingerprint(data: ImageSet) -> str:
    """Return shape, dtype and a cheap checksum of the images."""
    checksum = int(data.images[:: max(1, len(data) // 64)].sum(dtype="uint64"))
    return f"{data.images.shape} {data.images.dtype} {checksum}"


def differences(theirs: Any, ours: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    """Return dotted name, first value and second value of each entry in which two nested dicts differ."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        found = []
        for key in sorted({*theirs, *ours}):
            found += differences(theirs.get(key), ours.get(key), f"{name}.{key}" if name else key)
        return found
    return [] if theirs == ours else [(name, theirs, ours)]
