"""Shards of named codes as bytes: npz, and parquet where pyarrow is installed. Equal arrays give equal bytes."""

import importlib
import io
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["SHARD_FORMATS", "ShardFormat", "ShardFormatName"]

ShardFormatName = Literal["npz", "parquet"]


class ShardFormat(NamedTuple):
    """How a shard is written and read: arrays by name, all with one entry for each sample."""

    check: Callable[[], None]
    """Raises ImportError if a package is missing."""
    encode: Callable[[Mapping[str, NDArray[Any]]], bytes]
    decode: Callable[[bytes], dict[str, NDArray[Any]]]


def _encode_npz(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            entry = io.BytesIO()
            np.lib.format.write_array(entry, array, allow_pickle=False)
            # numpy's own writer stamps the time of writing on each entry; this one has the date of an empty ZipInfo.
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), entry.getvalue(), zipfile.ZIP_DEFLATED)
    return file.getvalue()


def _decode_npz(data: bytes) -> dict[str, NDArray[Any]]:
    with np.load(io.BytesIO(data), allow_pickle=False) as archive:
        return dict(archive)


def _check_parquet() -> None:
    try:
        importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise ImportError("parquet needs pyarrow: pip install pyarrow, or write file_format='npz'") from error


def _encode_parquet(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    pyarrow, parquet = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    file = io.BytesIO()
    parquet.write_table(pyarrow.table({name: _column(pyarrow, array) for name, array in arrays.items()}), file)
    return file.getvalue()


def _column(pyarrow: Any, array: NDArray[Any]) -> Any:
    """Return an array ``(N, *shape)`` as a column of lists in lists."""
    if array.ndim == 1:
        return pyarrow.array(array.tolist() if array.dtype.kind == "U" else array)
    column = pyarrow.array(array.reshape(-1))
    for axis in range(array.ndim - 1, 0, -1):
        size = array.shape[axis]
        count = int(np.prod(array.shape[:axis]))
        offsets = np.arange(0, count * size + 1, size) if size else np.zeros(count + 1, int)
        column = pyarrow.ListArray.from_arrays(pyarrow.array(offsets.astype(np.int32)), column)
    return column


def _decode_parquet(data: bytes) -> dict[str, NDArray[Any]]:
    parquet = importlib.import_module("pyarrow.parquet")
    return {name: np.array(values) for name, values in parquet.read_table(io.BytesIO(data)).to_pydict().items()}


SHARD_FORMATS: dict[ShardFormatName, ShardFormat] = {
    "npz": ShardFormat(lambda: None, _encode_npz, _decode_npz),
    "parquet": ShardFormat(_check_parquet, _encode_parquet, _decode_parquet),
}
"""The formats by name, which is the ending of their files."""
