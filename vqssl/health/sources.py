"""Find codebooks: in modules, in state dicts however deeply nested, and in files."""

import contextlib
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vqssl.checks import policy_name
from vqssl.codebook import EMACodebook
from vqssl.multiscale import MultiScaleQuantizer
from vqssl.product import ProductQuantizer
from vqssl.random_projection import RandomProjectionQuantizer
from vqssl.residual import ResidualQuantizer
from vqssl.revival import BatchRevival, NoRevival
from vqssl.saving import METADATA_KEY, load

__all__ = ["FoundCodebook", "find_codebooks", "printable", "read_checkpoint", "short_names"]

FLAGS = ("initialized", "initted", "inited")
"""Keys for "the codes have seen data": of vqssl, vector-quantize-pytorch and encodec."""

MOST_REPEATED = 2**20
"""Most entries of a tensor that repeats its values in memory: a small file may hold one of any shape."""

SAVE_TENSORS = (
    "write it as torch.save(model.state_dict(), path): tensors, not the module itself and no configuration object"
)


class FoundCodebook(NamedTuple):
    """A codebook of a module or a state; None where unknown."""

    embed: Tensor
    """``(K, D)``."""
    cluster_size: Tensor
    """``(K,)``."""
    initialized: bool
    updates: int | None
    """Updates of the counts since they started at one each; None for counts of unknown age."""
    decay: float | None = None
    revives: bool | None = None
    threshold: float | None = None
    """tau of the revival."""
    metric: str | None = None
    initialization: str | None = None
    """Name of its class."""
    fixed: bool = False
    """True for the random codes of a :class:`vqssl.RandomProjectionQuantizer`, which has no counts: all are 1 here."""
    part: str | None = None
    """Which of the codebooks of its quantiser it is, as in "level 0 of 3"; None for a single one and in a state."""


def find_codebooks(source: nn.Module | Mapping[Any, Any]) -> dict[str, FoundCodebook]:
    """Return all codebooks of a module or a state by dotted name, each once.

    In a module these are the :class:`vqssl.EMACodebook` and :class:`vqssl.RandomProjectionQuantizer` modules; if there
    are none, its state is searched. In a state they are all pairs of ``embed`` and ``cluster_size`` under one prefix,
    and the pairs of ``codes`` and ``projection`` of fixed random codes, in dictionaries and lists of any depth. Codes
    ``(heads, K, D)``, as vector-quantize-pytorch stores them, are one codebook for each head.

    Names are those of the module. The key that all are nested under (``model``, ``state_dict``) is left out, and so is
    what wrappers add (``module.`` before all names, ``_orig_mod``). If the source itself is a codebook, its name is
    ``codebook``. If two names are equal, the second ends in ``#2``.

    Args:
        source: a module, a state dict, or a checkpoint that holds state dicts or modules.

    Returns:
        A :class:`FoundCodebook` for each name, in the order of the source. Tensors are not copied.

    Raises:
        TypeError: ``source`` is neither a module nor a mapping.
        ValueError: there is no codebook, or one without values (on the meta device) or of another shape.

    >>> import vqssl
    >>> model = vqssl.MultiScaleQuantizer([16, 32], codebook_size=8, dim=4)
    >>> list(find_codebooks(model)) == list(find_codebooks({"model": model.state_dict(), "epoch": 3}))
    True
    """
    if isinstance(source, nn.Module):
        found = _from_module_tree(source)
        kind = f"a {type(source).__name__}"
    elif isinstance(source, Mapping):
        found = _from_tree(source)
        kind = f"a {type(source).__name__} of {_first_keys(source)}"
    else:
        raise TypeError(
            f"source must be a module or a state dict, got {type(source).__name__}: for a file write "
            "read_checkpoint(path)"
        )
    if not found:
        raise ValueError(
            f"source must hold a codebook, got {kind} with none: give the module that holds the EMACodebook, or a "
            "state with the keys embed and cluster_size under one prefix"
        )
    named = dict(zip(_names([path for path, _ in found]), (codebook for _, codebook in found), strict=True))
    for name, codebook in named.items():
        _check(name, codebook)
    return named


def read_checkpoint(path: str | Path) -> Mapping[Any, Any]:
    """Return what a file holds that torch.save or safetensors wrote. Executes nothing in it (``weights_only``).

    Args:
        path: a file; ``.safetensors`` by its ending, anything else in torch's format.

    Returns:
        The dictionary in the file, on the CPU. Of a file that :func:`vqssl.save` wrote, the module, under the name of
        its class: its options are known then.

    Raises:
        ValueError: there is no such file, it cannot be read, or it does not hold a dictionary.
        ImportError: the file is a ``.safetensors``, and safetensors is not installed.

    >>> read_checkpoint("nowhere.pt")
    Traceback (most recent call last):
    ValueError: checkpoint must be a file, got 'nowhere.pt', which does not exist: check the path
    """
    path = Path(path)
    if not path.is_file():
        missing = "is a folder" if path.is_dir() else "does not exist"
        raise ValueError(f"checkpoint must be a file, got {str(path)!r}, which {missing}: check the path")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if packed := _compressed(path):
        raise ValueError(
            f"checkpoint must be stored without compression, as torch.save does it, got {packed!r} packed in "
            f"{str(path)!r}, which may unpack to any size: load and save it where you trust it"
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and zlib raise many kinds
        raise ValueError(_why_unreadable(path)) from error
    if not isinstance(content, Mapping):
        raise ValueError(
            f"checkpoint must hold a dictionary, got {type(content).__name__} in {str(path)!r}: {SAVE_TENSORS}"
        )
    return content


def short_names(names: Iterable[str]) -> tuple[str, dict[str, str]]:
    """Return the dotted prefix that all names share, and what remains of each name.

    >>> short_names(["codebooks.0", "codebooks.1"])
    ('codebooks', {'codebooks.0': '0', 'codebooks.1': '1'})
    """
    parts = {name: name.split(".") for name in names}
    common: list[str] = []
    for column in zip(*(one[:-1] for one in parts.values()), strict=False):
        if len(set(column)) > 1:
            break
        common.append(column[0])
    return ".".join(common), {name: ".".join(one[len(common) :]) for name, one in parts.items()}


def _read_safetensors(path: Path) -> Mapping[str, Any]:
    try:
        from safetensors import safe_open
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError(f"{path.name} needs safetensors: pip install safetensors") from error
    try:
        with safe_open(path, framework="pt") as file:
            has_options = METADATA_KEY in (file.metadata() or {})
        if has_options:
            # A damaged state is measured without its options.
            with contextlib.suppress(TypeError, ValueError, RuntimeError):
                module = load(path)
                return {type(module).__name__: module}
        return load_file(path)
    except Exception as error:
        raise ValueError(
            f"checkpoint must be a file of safetensors, got {str(path)!r}, which cannot be read: write it with "
            "safetensors.torch.save_file"
        ) from error


def _compressed(path: Path) -> str:
    """Return the name of an entry that is compressed; empty if there is none, or the file is no archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            return next((e.filename for e in archive.infolist() if e.compress_type != zipfile.ZIP_STORED), "")
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return ""


def _why_unreadable(path: Path) -> str:
    """Return why torch refused a file. Executes nothing in it either."""
    try:
        classes = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # not a zip file, or not one of torch.save's
        return f"checkpoint must be a file of torch.save, got {str(path)!r}, which is not: {SAVE_TENSORS}"
    inside = f"objects of {', '.join(sorted(classes)[:3])}" if classes else "values that cannot be read"
    return (
        f"checkpoint must hold tensors and plain values, which load without executing code, got {inside} in "
        f"{str(path)!r}: {SAVE_TENSORS}"
    )


def _from_module_tree(module: nn.Module) -> list[tuple[tuple[str, ...], FoundCodebook]]:
    """Return the codebooks that are modules in a module, with names; if there are none, those in its state."""
    parts: dict[str, str] = {}
    found = []
    for name, part in module.named_modules():
        parts |= {f"{name}.codebooks.{number}".lstrip("."): text for number, text in enumerate(_parts_of(part))}
        found += [(path, codebook._replace(part=parts.get(name))) for path, codebook in _in_module(name, part)]
    return found or _from_tree(module.state_dict())


def _parts_of(module: nn.Module) -> list[str]:
    """Return what each of the codebooks of a quantiser is for."""
    if isinstance(module, ResidualQuantizer):
        return [f"level {number} of {module.num_levels}" for number in range(module.num_levels)]
    if isinstance(module, ProductQuantizer):
        count = module.num_groups
        return [f"all {count} groups"] if module.shared else [f"group {number} of {count}" for number in range(count)]
    if isinstance(module, MultiScaleQuantizer):
        count = module.num_scales
        return [f"all {count} scales"] if module.shared else [f"scale {number} of {count}" for number in range(count)]
    return []


def _in_module(name: str, module: nn.Module) -> list[tuple[tuple[str, ...], FoundCodebook]]:
    """Return the codebooks that a module itself is, with names."""
    if isinstance(module, EMACodebook):
        return [((name,), _from_module(module))]
    if isinstance(module, RandomProjectionQuantizer):
        return [((each,), found) for each, found in _fixed(name, module.codes)]
    return []


def _fixed(name: str, codes: Tensor) -> Iterator[tuple[str, FoundCodebook]]:
    """Yield the codebooks in fixed codes ``(codebooks, K, D)``, with names."""
    for number, embed in enumerate(codes.detach()):
        counts = torch.ones_like(embed[:, 0])
        part = str(number) if len(codes) > 1 else ""
        yield (
            ".".join(filter(None, [name, part])),
            FoundCodebook(embed, counts, True, None, metric="cosine", fixed=True),
        )


def _from_module(codebook: EMACodebook) -> FoundCodebook:
    return _from_state(codebook.state_dict(), "")._replace(
        decay=float(codebook.decay),
        revives=not isinstance(codebook.revival, NoRevival),
        threshold=codebook.revival.threshold if isinstance(codebook.revival, BatchRevival) else None,
        metric=policy_name(codebook.metric),
        initialization=type(codebook.initialization).__name__,
    )


def _from_tree(source: Mapping[Any, Any]) -> list[tuple[tuple[str, ...], FoundCodebook]]:
    """Return codebooks with the keys that lead to them: those of containers, and then the dotted prefix."""
    found: list[tuple[tuple[str, ...], FoundCodebook]] = []
    seen = set()
    for path, state in _states(source, ()):
        if isinstance(state, nn.Module):
            found += [((*path, *name), codebook) for name, codebook in _from_module_tree(state)]
            continue
        for key, embed in state.items():
            if key.rpartition(".")[2] == "codes" and _has_projection(state, key):
                found += [((*path, each), codebook) for each, codebook in _fixed(key.rpartition(".")[0], embed)]
            prefix, _, last = key.rpartition("embed")
            tensors = isinstance(embed, Tensor) and isinstance(state.get(prefix + "cluster_size"), Tensor)
            if last or (prefix and not prefix.endswith(".")) or not tensors:
                continue
            _check_form(".".join((*path, prefix + "embed")), embed)
            _check_form(".".join((*path, prefix + "cluster_size")), state[prefix + "cluster_size"])
            codebook = _from_state(state, prefix)
            # A codebook that two modules share is in their state under two names, in the same memory.
            memory = (embed.device, embed.data_ptr(), embed.storage_offset(), tuple(embed.shape))
            if embed.data_ptr() and memory in seen:
                continue
            seen.add(memory)
            heads = [codebook]
            if embed.ndim == 3 and codebook.cluster_size.shape == embed.shape[:2]:
                pairs = zip(embed, codebook.cluster_size, strict=True)
                heads = [codebook._replace(embed=codes, cluster_size=counts) for codes, counts in pairs]
            for number, head in enumerate(heads):
                found.append(((*path, prefix + (f"head{number}" if len(heads) > 1 else "")), head))
    return found


def _has_projection(state: Mapping[str, Any], key: str) -> bool:
    """Return True if the codes at ``key`` are those of a :class:`vqssl.RandomProjectionQuantizer`."""
    codes, projection = state[key], state.get(key.removesuffix("codes") + "projection")
    if not (isinstance(codes, Tensor) and isinstance(projection, Tensor)):
        return False
    return codes.ndim == projection.ndim == 3 and codes.shape[::2] == projection.shape[:2]


def _states(source: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], dict[str, Any] | nn.Module]]:
    """Yield every dictionary and every module in ``source`` with the keys that lead to it."""
    if isinstance(source, nn.Module):
        yield path, source
    elif isinstance(source, Mapping):
        yield path, {key: value for key, value in source.items() if isinstance(key, str)}
        for key, value in source.items():
            yield from _states(value, (*path, str(key)))
    elif isinstance(source, Sequence) and not isinstance(source, str | bytes):
        for position, value in enumerate(source):
            yield from _states(value, (*path, str(position)))


def _from_state(state: Mapping[str, Any], prefix: str) -> FoundCodebook:
    embed, cluster_size = state[prefix + "embed"], state[prefix + "cluster_size"]
    if embed.is_meta or cluster_size.is_meta:
        return FoundCodebook(embed, cluster_size, False, None)
    flags = [state[prefix + name] for name in FLAGS if isinstance(state.get(prefix + name), Tensor | int | float)]
    initialized = bool(torch.as_tensor(flags[0]).bool().all()) if flags else True
    updates = _updates(state.get(prefix + "num_updates"), state.get(prefix + "rng"), cluster_size)
    return FoundCodebook(embed, cluster_size, initialized, updates)


def _updates(num_updates: Any, rng: Any, cluster_size: Tensor) -> int | None:
    """Return how often the counts were updated, from whatever version of the state; None if it does not say."""
    updates = -1  # version 1 and other libraries count nothing
    if isinstance(num_updates, Tensor) and num_updates.numel() == 1 and _is_integer(num_updates):
        updates = int(num_updates)
    elif isinstance(rng, Tensor) and rng.shape == (2,) and _is_integer(rng):
        # Version 2 counts random draws: one at construction, one when the codes are set, and one for each update.
        updates = int(rng[1]) - 2
    if updates >= 0:
        return updates
    return 0 if bool((cluster_size == 1).all()) else None  # as counts start, in any state


def _is_integer(values: Tensor) -> bool:
    return not values.is_floating_point() and not values.is_complex()


def _names(paths: list[tuple[str, ...]]) -> list[str]:
    """Return one name for each path: dotted, unique, without containers and wrappers that all share."""
    containers = {path[:-1] for path in paths}
    parts = [
        [part for key in (path[-1:] if len(containers) == 1 else path) for part in key.split(".")] for path in paths
    ]
    parts = [[part for part in one if part and part != "_orig_mod"] for one in parts]
    while all(one[:1] == ["module"] for one in parts):
        parts = [one[1:] for one in parts]
    names = [".".join(one) or "codebook" for one in parts]
    if len(set(names)) < len(names):  # only what was left out distinguished them
        names = [".".join(path).strip(".") or "codebook" for path in paths]
    unique: list[str] = []
    for name in names:  # some are still equal: of the keys 1 and "1", or with a dot between two keys and within one key
        numbered = (f"{name}#{number}" for number in count(2))
        free = (other for other in numbered if other not in names and other not in unique)
        unique.append(next(free) if name in unique else name)
    return unique


def _check(name: str, found: FoundCodebook) -> None:
    embed, cluster_size = found.embed, found.cluster_size
    if embed.is_meta or cluster_size.is_meta:
        raise ValueError(f"{name} must have values, got a codebook on the meta device: load a state first")
    if embed.ndim != 2 or 0 in embed.shape or not embed.is_floating_point() or cluster_size.shape != embed.shape[:1]:
        raise ValueError(
            f"{name} must have codes (K, D) and counts (K,), got embed {tuple(embed.shape)} {embed.dtype} and "
            f"cluster_size {tuple(cluster_size.shape)}: give the state of a codebook"
        )


def _check_form(name: str, values: Tensor) -> None:
    """Raise unless the tensor is dense, of a dtype with arithmetic, and has a number in memory for each entry."""
    dense = values.layout == torch.strided and not values.is_quantized
    if not dense or values.is_complex() or (values.is_floating_point() and values.element_size() == 1):
        found = values.dtype if dense and not values.is_quantized else f"{values.dtype}, {values.layout}"
        raise ValueError(f"{printable(name)} must be a dense tensor of real numbers, got {found}: write x.float()")
    overlaps = any(step == 0 and size > 1 for step, size in zip(values.stride(), values.shape, strict=True))
    if overlaps and values.numel() > MOST_REPEATED:
        raise ValueError(
            f"{printable(name)} must hold a number for each entry, got {tuple(values.shape)} with strides "
            f"{values.stride()}, which repeats a few: write x.contiguous() where you trust it"
        )


def printable(text: str) -> str:
    r"""Return text in which a terminal finds no commands: characters that are not printable become escapes.

    >>> print(printable("a\x1b[31m"))
    a\x1b[31m
    """
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def _first_keys(source: Mapping[Any, Any]) -> str:
    keys = [repr(key) for key in list(source)[:3]]
    return (", ".join(keys) + (", ..." if len(source) > 3 else "")) or "nothing"
