"""A folder of token shards, and the list of those that are finished."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vqssl.atomic_file import write_atomically
from vqssl.shards import SHARD_FORMATS, ShardFormatName

__all__ = ["Codes", "Shard", "TokenFolder", "names_digest"]

Codes = Mapping[str, NDArray[np.int32]]
"""Codes ``(n, *shape)`` by name: one entry, or one a map."""

LIST = "tokens.json"
FORMAT = 1


class Shard(NamedTuple):
    """A finished shard, as the list holds it."""

    file: str
    batches: int
    samples: int
    names: str
    """Digest of all names, see :func:`names_digest`."""


class TokenFolder:
    """A folder of shards and the list of those that are finished.

    Args:
        path: of the folder, which is made.
        file_format: of the shards.
        shard_size: samples in a shard, at least; only compared.
        model: a digest of the model; only compared.

    Raises:
        ValueError: the folder holds other files, or shards of other options.

    >>> import tempfile
    >>> folder = TokenFolder(Path(tempfile.mkdtemp()), "npz", 4, "model")
    >>> folder.add(["a", "b"], [{"codes": np.array([[1], [2]], dtype=np.int32)}])
    >>> folder.read(folder.shards[0])["codes"].tolist()
    [[1], [2]]
    """

    def __init__(self, path: Path, file_format: ShardFormatName, shard_size: int, model: str) -> None:
        self.path = path
        self.format = SHARD_FORMATS[file_format]
        self.ending = file_format
        self.options = {
            "format": FORMAT,
            "file_format": file_format,
            "shard_size": shard_size,
            "model": model,
        }
        self.shards: list[Shard] = []
        self.finished = False
        path.mkdir(parents=True, exist_ok=True)
        _remove_partial(path, LIST)
        if (path / LIST).exists():
            self._read()
        elif any(path.iterdir()):
            raise ValueError(
                f"out must be a new or an empty folder, or one that vqssl.tokens wrote, got {str(path)!r} with other "
                "files in it: give another folder"
            )
        _remove_partial(path, "*")
        self._write()

    def _read(self) -> None:
        try:
            found = json.loads((self.path / LIST).read_text(encoding="utf-8"))
            self.shards = [Shard(**shard) for shard in found["shards"]]
            self.finished = bool(found["finished"])
            options = {name: found[name] for name in self.options}
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{str(self.path / LIST)!r} must be a list that vqssl.tokens wrote: remove the folder"
            ) from error
        for name, value in self.options.items() if self.shards or self.finished else ():  # without a shard, of no call
            if options[name] != value:
                what = "another model" if name == "model" else f"{name} {options[name]!r}, not {value!r}"
                raise ValueError(
                    f"out must be a folder of this call, got {str(self.path)!r} of {what}: give another folder"
                )

    def _write(self) -> None:
        shards = [shard._asdict() for shard in self.shards]
        content = {**self.options, "finished": self.finished, "shards": shards}
        write_atomically(self.path / LIST, (json.dumps(content, indent=1) + "\n").encode())

    def read(self, shard: Shard) -> dict[str, NDArray[Any]]:
        """Return the arrays of a shard: its names and its codes."""
        return self.format.decode((self.path / shard.file).read_bytes())

    def add(self, names: list[str], codes: Sequence[Codes]) -> None:
        """Write a shard from names and the codes of its batches, and list it."""
        file = f"{len(self.shards):05d}.{self.ending}"
        arrays = {"names": np.array(names, dtype=np.str_), **_joined(codes)}
        write_atomically(self.path / file, self.format.encode(arrays))
        # Listed last: a shard that a kill leaves unlisted is written again, with the same bytes.
        self.shards.append(Shard(file, len(codes), len(names), names_digest(names)))
        self._write()

    def finish(self) -> None:
        """Note that no shard is missing."""
        self.finished = True
        self._write()


def _remove_partial(path: Path, name: str) -> None:
    """Remove what a kill left while a file was written."""
    for partial in path.glob(f".{name}.*.partial"):
        partial.unlink()


def names_digest(names: Sequence[str]) -> str:
    """Return a short text that differs where a name does.

    >>> names_digest(["a", "b"]) == names_digest(["ab"])
    False
    """
    return hashlib.blake2b(json.dumps(names).encode(), digest_size=12).hexdigest()


def _joined(batches: Sequence[Codes]) -> dict[str, NDArray[np.int32]]:
    """Return the arrays of all batches in one, padded with -1 to the largest shape."""
    if any(batch.keys() != batches[0].keys() for batch in batches):
        raise ValueError("model must return equally many code maps for all batches, got other numbers of them")
    joined = {}
    for name in batches[0]:
        parts = [batch[name] for batch in batches]
        if len({part.ndim for part in parts}) > 1:
            raise ValueError(
                f"{name} must have equally many axes in all batches, got {sorted({p.ndim for p in parts})}"
            )
        shape = np.max([part.shape for part in parts], axis=0)
        padded = [
            np.pad(p, [(0, 0), *((0, s - n) for s, n in zip(shape[1:], p.shape[1:], strict=True))], constant_values=-1)
            for p in parts
        ]
        joined[name] = np.concatenate(padded)
    return joined
