"""Turn a data set into codes: shards of names and codes in a folder, resumable after a kill."""

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vqssl.checks import check_indices, check_positive_int
from vqssl.shards import SHARD_FORMATS, ShardFormatName
from vqssl.token_folder import Codes, Shard, TokenFolder, names_digest

__all__ = ["TokenFiles", "tokens"]


class TokenFiles(NamedTuple):
    """What :func:`tokens` wrote.

    Attributes:
        files: the shards in the order of the loader.
        samples: how many they hold.

    >>> TokenFiles((Path("00000.npz"),), 8).samples
    8
    """

    files: tuple[Path, ...]
    samples: int


class _Batch(NamedTuple):
    names: list[str]
    x: Any


def tokens(
    model: Callable[[Any], Any],
    loader: Iterable[Any],
    out: str | Path,
    *,
    shard_size: int = 4096,
    file_format: ShardFormatName = "npz",
    progress: Callable[[Iterable[Any]], Iterable[Any]] | None = None,
) -> TokenFiles:
    """Write the codes of a data set to a folder, one shard after another, and continue there after a kill.

    A shard holds ``names`` ``(n,)`` and ``codes`` ``(n, *shape)`` int32, the codes of a sample as the model returns
    them; of several maps ``codes_0``, ``codes_1`` and so on. Where batches differ in shape, codes are padded with -1,
    the index of a masked token. Only one shard is in memory. It ends with the first batch that fills it.

    A call with a folder that is not finished skips the batches that are there, and ends with the same bytes as a run
    without interruption. It compares the names of all skipped batches, the codes of the first batch of each shard, and
    the state of the model: a folder of another model or loader is refused. A finished folder is compared by its first
    batch and the length of the loader, and returned.

    Under ``torch.distributed`` each rank takes its own share of the data and a folder of its own.

    Args:
        model: called with the first entry of each batch; returns integer codes ``(B, *shape)``, a sequence of such
            tensors, or a result of vqssl with ``indices``. A module is in eval mode meanwhile, and a batch that is a
            tensor is moved to its device. Of a function nothing is known: call ``eval()`` on its modules before.
        loader: of pairs of input and names, B strings or integers that tell samples apart, unlike labels; the same
            batches in the same order at each call, so without shuffling and random augmentation.
        out: the folder, new, empty or unfinished.
        shard_size: samples in a shard, at least.
        file_format: ``"npz"``, or ``"parquet"``, which needs pyarrow.
        progress: wraps the loader, such as ``tqdm.tqdm``.

    Returns:
        :class:`TokenFiles`.

    Raises:
        TypeError: a batch is not such a pair, or codes are not integers.
        ValueError: a name stands for two samples of a shard; another number of names than codes, an unknown format, or
            a folder of another model, loader or option.
        ImportError: pyarrow is missing for parquet.

    >>> import tempfile, numpy, torch, vqssl
    >>> model = vqssl.RandomProjectionQuantizer(in_dim=4, codebook_size=16, dim=2)
    >>> loader = [(torch.randn(3, 10, 4), ["a", "b", "c"]), (torch.randn(2, 10, 4), ["d", "e"])]
    >>> written = tokens(model, loader, tempfile.mkdtemp())
    >>> with numpy.load(written.files[0]) as shard:
    ...     shard["names"].tolist(), shard["codes"].shape
    (['a', 'b', 'c', 'd', 'e'], (5, 10, 1))
    """
    check_positive_int("shard_size", shard_size)
    if file_format not in SHARD_FORMATS:
        raise ValueError(f"file_format must be one of {', '.join(map(repr, SHARD_FORMATS))}, got {file_format!r}")
    SHARD_FORMATS[file_format].check()
    digest = _state_digest(model) if isinstance(model, nn.Module) else "a function"
    folder = TokenFolder(Path(out), file_format, shard_size, digest)
    with _without_training(model):
        batches = _batches(loader if progress is None or folder.finished else progress(loader))
        if folder.finished:
            _check_length(loader, folder)
            _compare(model, batches, folder, folder.shards[:1], first_batch_only=True)
        else:
            _compare(model, batches, folder, folder.shards)
            while shard := _next_shard(model, batches, shard_size):
                folder.add(*shard)
            folder.finish()
    files = tuple(folder.path / shard.file for shard in folder.shards)
    return TokenFiles(files, sum(shard.samples for shard in folder.shards))


def _check_length(loader: Iterable[Any], folder: TokenFolder) -> None:
    batches = sum(shard.batches for shard in folder.shards)
    if isinstance(loader, Sized) and len(loader) != batches:
        raise ValueError(
            f"loader must give the {batches} batches of the finished folder {str(folder.path)!r}, got {len(loader)}: "
            "give another folder"
        )


def _compare(
    model: Callable[[Any], Any],
    batches: Iterator[_Batch],
    folder: TokenFolder,
    shards: Sequence[Shard],
    *,
    first_batch_only: bool = False,
) -> None:
    """Read the batches of finished shards again, and raise unless they are those of the shards."""
    for shard in shards:
        file, first, kept = folder.path / shard.file, next(batches, None), folder.read(shard)
        if first is None or first.names != kept["names"][: len(first.names)].tolist():
            raise _of_another("loader", file)
        for name, codes in _codes(model, first).items():
            if name not in kept or not _equal_but_for_padding(codes, kept[name][: len(codes)]):
                raise _of_another("model", file)
        if first_batch_only:
            return
        names = [*first.names]
        for batch in islice(batches, shard.batches - 1):
            names += batch.names
        if names_digest(names) != shard.names:
            raise _of_another("loader", file)


def _of_another(what: str, file: Path) -> ValueError:
    why, cure = {
        "loader": ("names in another order or batch size", "build the loader as before, without shuffling"),
        "model": ("other codes of the same names", "give the same model, data and device"),
    }[what]
    return ValueError(f"out must be a folder of this {what}, got {str(file)!r} with {why}: {cure}, or another folder")


def _batches(loader: Iterable[Any]) -> Iterator[_Batch]:
    for number, batch in enumerate(loader):
        if not (isinstance(batch, tuple | list) and len(batch) == 2):
            kind = f"a {type(batch).__name__}" + (f" of {len(batch)}" if isinstance(batch, tuple | list) else "")
            raise TypeError(
                f"batch {number} must be a pair of input and names, got {kind}: let the data set return (x, name)"
            )
        x, names = batch
        if isinstance(names, Tensor):
            names = names.tolist()
        if not isinstance(names, tuple | list) or not all(isinstance(name, str | int) for name in names):
            raise TypeError(
                f"names of batch {number} must be strings or integers, one a sample, got {type(names).__name__}: let "
                "the data set return (x, name)"
            )
        yield _Batch([str(name) for name in names], x)


def _next_shard(
    model: Callable[[Any], Any], batches: Iterator[_Batch], size: int
) -> tuple[list[str], list[Codes]] | None:
    """Return names and codes of the next batches, until they are ``size`` samples; None at the end."""
    names: list[str] = []
    codes: list[Codes] = []
    seen: set[str] = set()
    for batch in batches:
        _check_new(batch.names, seen)
        names += batch.names
        codes.append(_codes(model, batch))
        if len(names) >= size:
            break
    return (names, codes) if codes else None


def _check_new(names: Sequence[str], seen: set[str]) -> None:
    """Raise if a name stands for several samples, as the labels of a loader of (images, labels) do; add the names."""
    for name in names:
        if name in seen:
            raise ValueError(
                f"names must tell samples apart, got {name!r} twice: let the data set return (x, name), with the file "
                "or number of a sample as its name, not its label"
            )
        seen.add(name)


def _codes(model: Callable[[Any], Any], batch: _Batch) -> Codes:
    x = batch.x
    if isinstance(model, nn.Module) and isinstance(x, Tensor):
        held = next(chain(model.parameters(), model.buffers()), None)
        x = x if held is None else x.to(held.device)
    found = model(x)
    found = found if isinstance(found, Tensor) else getattr(found, "indices", found)
    several = isinstance(found, tuple | list)
    codes = {f"codes_{n}": each for n, each in enumerate(found)} if several else {"codes": found}
    for name, each in codes.items():
        check_indices(name, each)
        if each.ndim < 1 or len(each) != len(batch.names):
            raise ValueError(
                f"{name} must have one entry for each of the {len(batch.names)} names in its first axis, got shape "
                f"{tuple(each.shape)}: let the model return (B, *shape)"
            )
        if each.numel() and not -(2**31) <= int(each.min()) <= int(each.max()) < 2**31:
            raise ValueError(f"{name} must fit 32 bits, got {int(each.max())}: let the model return code numbers")
    return {name: each.to("cpu", torch.int32).numpy() for name, each in codes.items()}


def _equal_but_for_padding(codes: NDArray[np.int32], kept: NDArray[Any]) -> bool:
    if codes.ndim != kept.ndim or any(n > k for n, k in zip(codes.shape, kept.shape, strict=True)):
        return False
    inside = kept[tuple(slice(n) for n in codes.shape)]
    return np.array_equal(inside, codes) and bool((kept != -1).sum() == (codes != -1).sum())


@contextlib.contextmanager
def _without_training(model: Any) -> Iterator[None]:
    """Put a module in eval mode, without gradients, and each of its parts back into its mode."""
    modes = [(part, part.training) for part in model.modules()] if isinstance(model, nn.Module) else []
    for part, _ in modes:
        part.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for part, training in modes:
            part.training = training


def _state_digest(model: nn.Module) -> str:
    digest = hashlib.blake2b(digest_size=12)
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
