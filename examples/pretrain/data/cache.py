"""Decoded images of a folder in one file each size, so that they are decoded once and never all in memory.

A cache is a folder `NAME-SIZEpx-KEY` in the directory of `--cache`. Its key depends on the names, sizes and times of
the images, so that a cache is never read for images that have changed. Worker processes decode; what they have finished
is kept if the process is killed, and the next one goes on from there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from examples.pretrain.cores import usable_cores
from examples.pretrain.data.catalogue import Catalogue, bits, decoded, stack
from examples.pretrain.data.imageset import ImageSet
from examples.pretrain.data.stored import StoredImages
from examples.pretrain.unwritten import writing

FORMAT = 1
SHARD = 64
"""Images that a worker decodes at a time; at most so many of each are lost if the process is killed."""


@dataclass(frozen=True)
class Cache:
    """The decoded images of a catalogue in a directory.

    Args:
        folder: of the images.
        catalogue: of the images.
        size: side of the decoded images in pixels.
        directory: where caches are; it must not be among the images.

    Raises:
        ValueError: the directory is in the folder of the images.
    """

    folder: Path
    catalogue: Catalogue
    size: int
    directory: Path

    def __post_init__(self) -> None:
        directory = self.directory.absolute().resolve()
        if self.folder.resolve() in (directory, *directory.parents):
            raise ValueError(
                f"--cache must not be among the images, got {self.directory} in {self.folder}: give another"
            )

    @cached_property
    def place(self) -> Path:
        """Folder of this cache."""
        key = self._key([*self.catalogue.names, *self.catalogue.depends])
        return self.directory / f"{self.folder.resolve().name}-{self.size}px-{key}"

    def is_full(self) -> bool:
        """Return True if all images are decoded."""
        return (self.place / "index.json").is_file()

    @property
    def bytes(self) -> int:
        """Size of the cache on the disk."""
        return sum(path.stat().st_size for path in self.place.iterdir())

    def fill(self, *, progress: bool, workers: int | None = None) -> Iterator[int]:
        """Decode what is not decoded yet; yield the number of images after each step.

        Args:
            progress: whether to show a progress bar.
            workers: number of processes; None is the number of cores, at most 16. 0 decodes in this process.
        """
        if self.is_full():
            for left in self.place.glob("shard-*"):  # of a process that was killed after it had joined them
                left.unlink(missing_ok=True)
            return
        with writing(self.place):
            self.place.mkdir(parents=True, exist_ok=True)
        with _alone(self.place) as waits:
            for _ in waits:
                yield 0
            if self.is_full():  # by another process meanwhile
                return
            shards = self._shards()
            todo = [shard for shard in shards if not shard.path.is_file()]
            done = sum(len(shard.numbers) for shard in shards if shard.path.is_file())
            count = min(usable_cores(), 16, len(todo)) if workers is None else workers
            loader: DataLoader = DataLoader(
                cast(Dataset, todo),
                batch_size=None,
                num_workers=count,
                collate_fn=_finish,
                generator=torch.Generator(),  # of its own: a loader draws a number when it starts
                prefetch_factor=2 if count else None,
            )
            with tqdm(
                total=len(self.catalogue.names), initial=done, desc=self.folder.name, unit="image", disable=not progress
            ) as bar:
                for finished in loader:
                    if isinstance(finished, OSError):
                        raise finished
                    bar.update(finished)
                    yield finished
            self._join(shards)
            for shard in shards:
                shard.path.unlink()

    def open(self, *, skip_bad: bool) -> ImageSet:
        """Return the images, which stay in their file, with what the catalogue knows of them.

        Raises:
            ValueError: images could not be read, and are not to be skipped.
        """
        index = json.loads((self.place / "index.json").read_text(encoding="utf-8"))
        left_out = tuple(index["left_out"])
        if left_out and not skip_bad:
            more = f"; {len(left_out) - 1} more cannot be read either" if len(left_out) > 1 else ""
            raise ValueError(f"{left_out[0]}, or leave it out with --skip-bad{more}")
        if not index["count"]:
            raise ValueError(f"{self.folder}: none of its {len(left_out)} images can be read, the first: {left_out[0]}")
        kept = np.load(self.place / "kept.npy")
        masks = self.place / "masks.npy"
        return ImageSet(
            cast(np.ndarray, StoredImages(self.place / "images.npy")),
            _pick(self.catalogue.labels, kept),
            _pick(self.catalogue.groups, kept),
            bits(self.folder, np.load(masks), self.catalogue.mask_kind) if masks.is_file() else None,
            _pick(self.catalogue.split, kept),
            self.catalogue.label_names,
            np.array(self.catalogue.names)[kept],
            left_out,
        )

    def _key(self, names: Sequence[str]) -> str:
        """Return a digest of the files' names, sizes and times, and of all else that decides what is decoded."""
        found = hashlib.blake2b(f"{FORMAT} {self.size} {self.catalogue.mask_of is not None}".encode(), digest_size=8)
        for name in names:
            stat = (self.folder / name).stat()
            found.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode(errors="surrogatepass"))
        return found.hexdigest()

    def _shards(self) -> list[_Shard]:
        names = self.catalogue.names
        shards = []
        for start in range(0, len(names), SHARD):
            numbers = range(start, min(start + SHARD, len(names)))
            key = self._key([names[number] for number in numbers])
            path = self.place / f"shard-{start // SHARD:06}-{key}.npz"
            shards.append(_Shard(self.folder, self.catalogue, self.size, numbers, path))
        return shards

    def _join(self, shards: Sequence[_Shard]) -> None:
        """Write the images of all shards into one file, and the index last."""
        kinds, kept, left_out = set(), [], []
        for shard in shards:
            with np.load(shard.path) as part:
                if len(part["kept"]):
                    kinds.add((part["images"].dtype.str, part["images"].ndim))
                kept.append(part["kept"])
                left_out += part["left_out"].tolist()
        places = np.concatenate(kept)
        if len(places):
            deep, colour = any("2" in dtype for dtype, _ in kinds), any(ndim == 4 for _, ndim in kinds)
            shape = (len(places), self.size, self.size)
            with (
                _new_array(
                    self.place / "images.npy", (*shape, 3) if colour else shape, np.uint16 if deep else np.uint8
                ) as images,
                contextlib.ExitStack() as stack_of,
            ):
                masks = None
                if self.catalogue.mask_of is not None:
                    masks = stack_of.enter_context(_new_array(self.place / "masks.npy", shape, np.uint8))
                at = 0
                for shard in shards:
                    with np.load(shard.path) as part:
                        until = at + len(part["kept"])
                        if until > at:
                            images[at:until] = stack([*part["images"]], deep=deep, colour=colour)
                            if masks is not None:
                                masks[at:until] = part["masks"]
                        at = until
        with _whole(self.place / "kept.npy") as path, path.open("wb") as file:
            np.save(file, places)
        with _whole(self.place / "index.json") as path:
            index = {
                "format": FORMAT,
                "count": len(places),
                "left_out": left_out,
                "folder": str(self.folder.absolute()),
            }
            path.write_text(json.dumps(index), encoding="utf-8", errors="surrogatepass")


@dataclass(frozen=True)
class _Shard:
    """Some images of a catalogue, decoded into a file of their own."""

    folder: Path
    catalogue: Catalogue
    size: int
    numbers: range
    path: Path

    def finish(self) -> int:
        """Decode the images and write the file; return how many there were."""
        images, masks, kept, left_out = [], [], [], []
        for number, found in zip(
            self.numbers, decoded(self.folder, self.catalogue, self.size, self.numbers), strict=True
        ):
            if isinstance(found, ValueError):
                left_out.append(str(found))
                continue
            images.append(found[0])
            kept.append(number)
            if found[1] is not None:
                masks.append(found[1])
        arrays: dict[str, Any] = {"kept": np.array(kept, np.int64), "left_out": np.array(left_out, str)}
        if images:
            arrays["images"] = stack(images)
        if masks:
            arrays["masks"] = np.stack(masks)
        with _whole(self.path) as path, path.open("wb") as file:
            np.savez(file, **arrays)
        return len(self.numbers)


def _finish(shard: Any) -> int | OSError:
    """Return how many images are done; or the error, which would come out of a worker as a text of its stack."""
    try:
        done: int = shard.finish()
    except OSError as error:
        return error
    return done


def _pick(array: np.ndarray | None, kept: np.ndarray) -> np.ndarray | None:
    return None if array is None else array[kept]


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """Give a path to write to, which takes the place of `path` once it is whole."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with writing(path):
            yield partial
            os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def _new_array(path: Path, shape: tuple[int, ...], dtype: Any) -> Iterator[np.ndarray]:
    with _whole(path) as partial:
        array = np.lib.format.open_memmap(partial, "w+", dtype, shape)
        if hasattr(os, "posix_fallocate"):  # a write to memory that finds no disk under it would kill the process
            with partial.open("rb+") as file:
                os.posix_fallocate(file.fileno(), 0, partial.stat().st_size)
        yield array
        array.flush()
        del array


@contextlib.contextmanager
def _alone(place: Path) -> Iterator[Iterator[None]]:
    """Let one process fill a cache at a time; give an iterator that ends once it is this one's turn."""
    with writing(place / "fill.lock"):
        lock = (place / "fill.lock").open("a")
    with lock as file:

        def turn() -> Iterator[None]:
            if sys.platform == "win32":
                return
            import fcntl

            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    yield
                    time.sleep(0.5)
                except OSError:  # a file system without locks: two processes would do the same work, each whole
                    return
                else:
                    return

        yield turn()
        # Of processes that were killed. Nobody else writes here now.
        for left in place.glob("*.partial"):
            left.unlink(missing_ok=True)
