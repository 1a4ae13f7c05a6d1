"""Images that stay in a file: an array of which only the images asked for are read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np


def stored_or_none(images: object) -> StoredImages | None:
    """Return images that are in a file; None for an array."""
    return images if isinstance(images, StoredImages) else None


class StoredImages:
    """Images `(N, S, S)` or `(N, S, S, 3)` in an .npy file, or some of them, for which an index gives an array.

    The file is mapped into memory for each read and released after it, so that what a process holds does not grow with
    the number of images. Copies are pickled as a path and an index.

    Args:
        path: an .npy file of images.
        index: ``(N,)`` places of the images in the file; None is all of them.
    """

    def __init__(self, path: Path, index: np.ndarray | None = None) -> None:
        rows = np.load(path, mmap_mode="r")
        self.path = path
        self.index = np.arange(len(rows)) if index is None else index
        self.dtype: np.dtype = rows.dtype
        self.shape: tuple[int, ...] = (len(self.index), *rows.shape[1:])
        self.ndim: int = rows.ndim

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, where: Any) -> np.ndarray:
        if isinstance(where, tuple):  # of pixels too
            return np.asarray(self)[where]
        rows: np.ndarray = np.load(self.path, mmap_mode="r")
        return np.array(rows[self.index[where]])

    def __iter__(self) -> Iterator[np.ndarray]:
        for start in range(0, len(self), 64):
            yield from self[start : start + 64]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("images in a file cannot be an array without a copy: leave out copy=False")
        return self[:] if dtype is None else self[:].astype(dtype)

    def select(self, where: Any) -> StoredImages:
        """Return some of the images, which stay in the file."""
        return StoredImages(self.path, self.index[where])
