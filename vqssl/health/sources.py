"""Where codebooks are found: in modules, in state dicts of any nesting, in files."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vqssl.codebook import EMACodebook
from vqssl.revival import BatchRevival, NoRevival

__all__ = ["Found", "find_codebooks", "read_checkpoint", "short_names"]

FLAGS = ("initialized", "initted", "inited")
"""Under which of these a state says whether its codes have seen data: ours, vector-quantize-pytorch's, encodec's."""


SAVE_TENSORS = (
    "write it as torch.save(model.state_dict(), path): tensors, not the module itself nor a configuration's object"
)


class Found(NamedTuple):
    """A codebook as it was found; None where the source does not say.

    >>> import vqssl
    >>> find_codebooks(vqssl.EMACodebook(8, 4))["codebook"].decay
    0.99
    """

    embed: Tensor
    """``(K, D)``."""
    cluster_size: Tensor
    """``(K,)``."""
    initialized: bool
    updates: int | None
    """Of the counts since :meth:`vqssl.EMACodebook.set_codes_` set them to 1, as the first values do; None where they
    came from elsewhere."""
    decay: float | None = None
    revives: bool | None = None
    threshold: float | None = None
    """Of the revival."""
    metric: str | None = None
    initialization: str | None = None
    """Name of its class."""


def find_codebooks(source: nn.Module | Mapping[Any, Any]) -> dict[str, Found]:
    """All codebooks of a module or state, by dotted name, each once.

    Of a module these are its :class:`vqssl.EMACodebook`; a module without any is looked through as its state is. Of a
    state they are what has ``embed`` and ``cluster_size`` side by side under any prefix, in dictionaries and
    lists of any depth; codes ``(heads, K, D)``, as vector-quantize-pytorch stores them, count as one codebook a head.
    A name is that of the module: without the key that all were nested under (``model``, ``state_dict``), and without
    what wrappers add (``module.`` before all names, ``_orig_mod``). A codebook that is the source itself is called
    ``codebook``; where two names would be one, the second ends in ``#2``.

    Args:
        source: a module, a state dict, or a checkpoint that holds state dicts.

    Raises:
        TypeError: ``source`` is neither module nor mapping.
        ValueError: it holds no codebook, or one without values (on the meta device) or of odd shape.

    >>> import vqssl
    >>> model = vqssl.MultiScaleQuantizer([16, 32], codebook_size=8, dim=4)
    >>> list(find_codebooks(model)) == list(find_codebooks({"model": model.state_dict(), "epoch": 3}))
    True
    """
    if isinstance(source, nn.Module):
        listed = [(name, module) for name, module in source.named_modules() if isinstance(module, EMACodebook)]
        found: list[tuple[tuple[str, ...], Found]] = [((name,), _from_module(module)) for name, module in listed]
        kind = f"a {type(source).__name__}"
        if not found:
            found = _from_tree(source.state_dict())
    elif isinstance(source, Mapping):
        found = _from_tree(source)
        kind = f"a {type(source).__name__} of {_some(source)}"
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
    """What ``torch.save`` (read with ``weights_only``, so that nothing is executed) or safetensors wrote.

    Args:
        path: a file; ``.safetensors`` by its ending, anything else as torch's.

    Raises:
        ValueError: there is no such file, it cannot be read, or it holds no dictionary.
        ImportError: a ``.safetensors`` file, and safetensors is not installed.

    >>> read_checkpoint("nowhere.pt")
    Traceback (most recent call last):
    ValueError: checkpoint must be a file, got 'nowhere.pt', which is none: ...
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"checkpoint must be a file, got {str(path)!r}, which is none: check the path")
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError as error:
            raise ImportError(f"{path.name} needs safetensors: pip install safetensors") from error
        read: Callable[[Path], Any] = load_file
        refusal = _unreadable_safetensors
    else:
        read = _load
        refusal = _unreadable
    try:
        content = read(path)
    except Exception as error:  # pickle, zip, zlib and safetensors raise what they like
        raise ValueError(refusal(path)) from error
    if not isinstance(content, Mapping):
        raise ValueError(
            f"checkpoint must hold a dictionary, got {type(content).__name__} in {str(path)!r}: {SAVE_TENSORS}"
        )
    return content


def short_names(names: Iterable[str]) -> tuple[str, dict[str, str]]:
    """The dotted prefix that all names share, and what is left of each.

    >>> short_names(["codebooks.0", "codebooks.1"])
    ('codebooks', {'codebooks.0': '0', 'codebooks.1': '1'})
    """
    names = list(names)
    parts = [name.split(".") for name in names]
    common: list[str] = []
    for column in zip(*(one[:-1] for one in parts), strict=False):
        if len(set(column)) > 1:
            break
        common.append(column[0])
    return ".".join(common), {name: ".".join(one[len(common) :]) for name, one in zip(names, parts, strict=True)}


def _load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _unreadable_safetensors(path: Path) -> str:
    return f"checkpoint must be what safetensors wrote, got {str(path)!r}: write it with safetensors.torch.save_file"


def _unreadable(path: Path) -> str:
    """Why torch would not read it, found out without executing anything either."""
    try:
        classes = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # no zip, or none of torch's
        return f"checkpoint must be what torch.save wrote, got {str(path)!r}, which is not: {SAVE_TENSORS}"
    inside = f"objects of {', '.join(sorted(classes)[:3])}" if classes else "what cannot be read"
    return (
        f"checkpoint must hold tensors and plain values, which load without executing anything, got {inside} in "
        f"{str(path)!r}: {SAVE_TENSORS}"
    )


def _from_module(codebook: EMACodebook) -> Found:
    found = _from_entries("", codebook.state_dict())
    assert found is not None
    threshold = codebook.revival.threshold if isinstance(codebook.revival, BatchRevival) else None
    return found._replace(
        decay=float(codebook.decay),
        revives=not isinstance(codebook.revival, NoRevival),
        threshold=threshold,
        metric=codebook.metric,
        initialization=type(codebook.initialization).__name__,
    )


def _from_tree(source: Mapping[Any, Any]) -> list[tuple[tuple[str, ...], Found]]:
    """With the keys on the way: containers first, the dotted prefix last."""
    found: list[tuple[tuple[str, ...], Found]] = []
    seen = set()
    for path, state in _states(source, ()):
        for key, embed in state.items():
            prefix, _, last = key.rpartition("embed")
            if last or (prefix and not prefix.endswith(".")) or not isinstance(embed, Tensor):
                continue
            entries = _from_entries(prefix, state)
            if entries is None:
                continue
            # A codebook that two modules share stands in their state under two names, with one memory.
            memory = (embed.device, embed.data_ptr(), embed.storage_offset(), tuple(embed.shape))
            if embed.data_ptr() and memory in seen:
                continue
            seen.add(memory)
            heads = [entries]
            if embed.ndim == 3 and entries.cluster_size.shape == embed.shape[:2]:
                pairs = zip(embed, entries.cluster_size, strict=True)
                heads = [entries._replace(embed=codes, cluster_size=counts) for codes, counts in pairs]
            for head, one in enumerate(heads):
                found.append(((*path, prefix + (f"head{head}" if len(heads) > 1 else "")), one))
    return found


def _states(source: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """Every dictionary in ``source`` with the keys that lead to it."""
    if isinstance(source, Mapping):
        yield path, {key: value for key, value in source.items() if isinstance(key, str)}
        for key, value in source.items():
            yield from _states(value, (*path, str(key)))
    elif isinstance(source, Sequence) and not isinstance(source, str | bytes):
        for position, value in enumerate(source):
            yield from _states(value, (*path, str(position)))


def _from_entries(prefix: str, state: Mapping[str, Any]) -> Found | None:
    embed, cluster_size = state[prefix + "embed"], state.get(prefix + "cluster_size")
    if not isinstance(cluster_size, Tensor):
        return None
    if embed.is_meta:
        return Found(embed, cluster_size, False, None)
    flags = [state[prefix + name] for name in FLAGS if prefix + name in state]
    initialized = bool(torch.as_tensor(flags[0]).bool().all()) if flags else True
    # Of the draws that `rng` counts, one was the construction's and one the codes' that were set. Beside counts from
    # elsewhere there are fewer: such a state never had its codes set.
    rng = state.get(prefix + "rng")
    draws = int(rng[1]) if isinstance(rng, Tensor) and rng.shape == (2,) else 0
    updates = draws - 2 if draws >= 2 else None
    if updates is None and initialized and bool((cluster_size == 1).all()):
        updates = 0  # as `set_codes_` leaves them
    return Found(embed, cluster_size, initialized, updates)


def _names(paths: list[tuple[str, ...]]) -> list[str]:
    containers = {path[:-1] for path in paths}
    parts = [
        [part for key in (path[-1:] if len(containers) == 1 else path) for part in key.split(".")] for path in paths
    ]
    parts = [[part for part in one if part and part != "_orig_mod"] for one in parts]
    while all(one[:1] == ["module"] for one in parts):
        parts = [one[1:] for one in parts]
    names = [".".join(one) or "codebook" for one in parts]
    if len(set(names)) < len(names):  # what was left out told them apart
        names = [".".join(path).strip(".") or "codebook" for path in paths]
    taken = set(names)
    for position, name in enumerate(names):
        number = 1
        while names[position] in names[:position]:  # the keys 1 and "1", or a dot between keys and one within a key
            number += 1
            if f"{name}#{number}" not in taken:
                names[position] = f"{name}#{number}"
                taken.add(names[position])
    return names


def _check(name: str, found: Found) -> None:
    embed, cluster_size = found.embed, found.cluster_size
    if embed.is_meta or cluster_size.is_meta:
        raise ValueError(f"{name} must have values, got a codebook on the meta device: load a state first")
    if embed.ndim != 2 or 0 in embed.shape or not embed.is_floating_point() or cluster_size.shape != embed.shape[:1]:
        raise ValueError(
            f"{name} must have codes (K, D) and counts (K,), got embed {tuple(embed.shape)} {embed.dtype} and "
            f"cluster_size {tuple(cluster_size.shape)}: give the state of a codebook"
        )


def _some(source: Mapping[Any, Any]) -> str:
    keys = [repr(key) for key in list(source)[:3]]
    return (", ".join(keys) + (", ..." if len(source) > 3 else "")) or "nothing"
