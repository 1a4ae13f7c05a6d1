"""Save a module with its constructor's options in one safetensors file, and load it without its code."""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vqssl.atomic_file import write_atomically
from vqssl.centring import TargetCentring
from vqssl.channels_first import ChannelsFirst
from vqssl.checks import policy_name
from vqssl.code_targets import AnchorTarget, BagTarget, PlaceTarget
from vqssl.codebook import EMACodebook
from vqssl.constructor_options import constructor_options, has_constructor_options
from vqssl.distributed import is_sharded
from vqssl.fusion import SERFFusion
from vqssl.initialization import KMeansInit, RandomInit, SampleInit
from vqssl.multiscale import MultiScaleQuantizer
from vqssl.place_centring import PlaceCentring
from vqssl.prediction import CodePrediction
from vqssl.product import ProductQuantizer
from vqssl.random_projection import RandomProjectionQuantizer
from vqssl.residual import ResidualQuantizer
from vqssl.revival import BatchRevival, NoRevival

__all__ = ["METADATA_KEY", "load", "save"]

METADATA_KEY = "vqssl"
"""The only key of the metadata, because safetensors writes several in any order; its value is JSON."""
FORMAT = 1

MODULES: dict[str, type[nn.Module]] = {
    each.__name__: each
    for each in (
        EMACodebook,
        MultiScaleQuantizer,
        ResidualQuantizer,
        ProductQuantizer,
        RandomProjectionQuantizer,
        ChannelsFirst,
        SERFFusion,
        CodePrediction,
        TargetCentring,
        PlaceCentring,
    )
}
POLICIES: dict[str, type] = {
    each.__name__: each
    for each in (RandomInit, SampleInit, KMeansInit, BatchRevival, NoRevival, AnchorTarget, BagTarget, PlaceTarget)
}
IN_CODE = "write torch.save(module.state_dict(), path), and later build the module in your code and load that state"


def save(module: nn.Module, file: str | Path, *, notes: Mapping[str, Any] | None = None) -> None:
    """Write a module to a safetensors file: its state, and as metadata the options that build it again.

    :func:`load` returns a module that continues training to the bit. Also kept are which parts are in eval mode or
    frozen, and which parameters do not require a gradient. Options are those that the module has now, such as a
    ``decay`` that was changed while training. Other programs read the tensors with safetensors; the metadata are JSON
    under the key ``vqssl``. The file is written whole or not at all. Under ``torch.distributed`` call it on one rank.

    Process groups and devices belong to a run and are not written.

    Args:
        module: an EMACodebook, MultiScaleQuantizer, ResidualQuantizer, ProductQuantizer, RandomProjectionQuantizer,
            ChannelsFirst around one, SERFFusion, CodePrediction, TargetCentring or PlaceCentring.
        file: its path, which ends in ``.safetensors``.
        notes: what a reader of the file should know, such as how the module was trained: names to plain values, which
            JSON can hold. They are in the metadata under ``notes``; :func:`load` does nothing with them.

    Raises:
        TypeError: ``module`` is of another class, also of a subclass; or ``notes`` are not such values.
        ValueError: an option is a function or an object of your own, which a file cannot hold; parts of a quantiser
            have different options; the values are on the meta device or sharded; or the ending is another.
        ImportError: safetensors is not installed.

    >>> import tempfile, torch, vqssl
    >>> file = tempfile.mkdtemp() + "/codes.safetensors"
    >>> vqssl.save(vqssl.EMACodebook(codebook_size=8, dim=4, decay=0.9), file)
    >>> vqssl.load(file)
    EMACodebook(codebook_size=8, dim=4, decay=0.9, ...)
    """
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"module must be a module of vqssl, got {type(module).__name__}: write save(module, file), with the module "
            "itself and not its state dict"
        )
    file = _path(file, "give it that ending")
    described = {"format": FORMAT, **_described(module), **_modes(module)}
    description = json.dumps(described if notes is None else {**described, "notes": _plain(notes)})
    state = module.state_dict()
    for name, tensor in state.items():
        if tensor.is_meta or is_sharded(tensor):
            where = "on the meta device" if tensor.is_meta else "sharded over ranks"
            raise ValueError(f"module must hold its values on this process, got {name} {where}: {IN_CODE}")
    tensors = {name: tensor.detach().contiguous() for name, tensor in state.items()}
    write_atomically(file, _safetensors().torch.save(tensors, {METADATA_KEY: description}))


def load(file: str | Path, *, map_location: torch.device | str | None = None, **options: Any) -> Any:
    """Return the module that :func:`save` wrote: nothing in the file is executed.

    Args:
        file: its path.
        map_location: the device of the state; None is the CPU.
        **options: of the constructor, in place of those in the file: ``process_group=``, which no file holds, or
            ``decay=`` to train on with another.

    Returns:
        The module, of the class that was saved, in the same mode.

    Raises:
        ValueError: there is no such file, it is not one of :func:`save`, a newer version wrote it, or its state is
            damaged.
        TypeError: the constructor has no such option.
        ImportError: safetensors is not installed.

    >>> import tempfile, vqssl
    >>> file = tempfile.mkdtemp() + "/codes.safetensors"
    >>> vqssl.save(vqssl.ProductQuantizer(codebook_size=8, dim=4, num_groups=2).freeze().eval(), file)
    >>> quantizer = vqssl.load(file)
    >>> quantizer.codebook(1).frozen, quantizer.training
    (True, False)
    """
    file = _path(file, "give a file that vqssl.save wrote, or read another with torch.load and vqssl.interop")
    description, state = _read(file, torch.device("cpu" if map_location is None else map_location))
    # Without values: nothing is drawn, and torch's generators stay as they are.
    with torch.device("meta"):
        module = _built(file, description, options)
    for name in _listed(file, description, "without_gradient"):
        module.get_parameter(name).requires_grad_(False)
    module.load_state_dict(state, assign=True)
    for name in _listed(file, description, "eval"):
        module.get_submodule(name).training = False
    for name in _listed(file, description, "frozen"):
        codebook = module.get_submodule(name)
        assert isinstance(codebook, EMACodebook)
        codebook.freeze()
    return module


# ---- write ----


def _plain(notes: Mapping[str, Any]) -> dict[str, Any]:
    """Return notes as JSON gives them back."""
    cure = 'write notes={"trained on": "..."}, with numbers, strings, lists and dictionaries'
    if not isinstance(notes, Mapping) or not all(isinstance(name, str) for name in notes):
        raise TypeError(f"notes must be a dictionary of plain values by name, got {notes!r:.80}: {cure}")
    try:
        plain: dict[str, Any] = json.loads(json.dumps(dict(notes)))
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"notes must be plain values, which JSON can hold, got {notes!r:.80} ({error}): {cure}"
        ) from error
    return plain


def _described(module: nn.Module) -> dict[str, Any]:
    kind = type(module).__name__
    if not has_constructor_options(module):
        inside = next((name for name, part in module.named_modules() if name and has_constructor_options(part)), None)
        cure = f"save its part, module.{inside}" if inside else IN_CODE
        raise TypeError(f"module must be one of {', '.join(MODULES)}, got {kind}: {cure}")
    options = constructor_options(module)
    return {"module": kind, "options": {name: _written(name, value) for name, value in options.items()}}


def _written(name: str, value: Any) -> Any:
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, list):
        return [_written(name, each) for each in value]
    if isinstance(value, nn.Module) and has_constructor_options(value):
        return _described(value)
    if POLICIES.get(type(value).__name__) is type(value) and dataclasses.is_dataclass(value):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {"policy": type(value).__name__, "options": fields}
    raise ValueError(
        f"{name} must be a name or an object of vqssl, which load can build, got {policy_name(value)} of your own: "
        f"{IN_CODE}"
    )


def _modes(module: nn.Module) -> dict[str, list[str]]:
    parts = list(module.named_modules())
    return {
        "eval": [name for name, part in parts if not part.training],
        "frozen": [name for name, part in parts if isinstance(part, EMACodebook) and part.frozen],
        "without_gradient": [name for name, each in module.named_parameters() if not each.requires_grad],
    }


# ---- read ----


def _read(file: Path, device: torch.device) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not file.is_file():
        missing = "is a folder" if file.is_dir() else "does not exist"
        raise ValueError(f"file must be one that vqssl.save wrote, got {str(file)!r}, which {missing}: check the path")
    opened = _safetensors().safe_open
    try:
        with opened(file, framework="pt", device=str(device)) as content:
            metadata = content.metadata() or {}
            # Copies: otherwise the state would lie in a file that another process may write.
            state = {name: content.get_tensor(name).clone() for name in content.keys()}  # noqa: SIM118 (no mapping)
            description = json.loads(metadata[METADATA_KEY]) if METADATA_KEY in metadata else None
    except Exception as error:
        raise ValueError(
            f"file must be one that vqssl.save wrote, got {str(file)!r}, which cannot be read: {error}"
        ) from error
    if not isinstance(description, dict):
        raise ValueError(
            f"file must be one that vqssl.save wrote, got {str(file)!r} without options: build the module in your "
            "code, and write module.load_state_dict(safetensors.torch.load_file(file))"
        )
    if description.get("format") != FORMAT:
        raise ValueError(
            f"{str(file)!r} has format {description.get('format')!r}, this version of vqssl reads {FORMAT}: install "
            "a newer vqssl"
        )
    return description, state


def _built(file: Path, description: Mapping[str, Any], options: Mapping[str, Any]) -> nn.Module:
    kind, written = description.get("module"), description.get("options")
    if kind not in MODULES or not isinstance(written, dict):
        raise ValueError(f"{str(file)!r} must describe one of {', '.join(MODULES)}, got {kind!r}: save it again")
    read = {name: _option(file, value) for name, value in written.items()}
    return MODULES[kind](**{**read, **options})


def _option(file: Path, value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if "policy" not in value:
        return _built(file, value, {})
    if value["policy"] not in POLICIES:
        raise ValueError(
            f"{str(file)!r} must name policies among {', '.join(POLICIES)}, got {value['policy']!r}: save it again"
        )
    return POLICIES[value["policy"]](**value["options"])


def _listed(file: Path, description: Mapping[str, Any], key: str) -> list[str]:
    names = description.get(key, [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{str(file)!r} must list names under {key!r}, got {names!r}: save it again")
    return names


def _path(file: str | Path, cure: str) -> Path:
    if not isinstance(file, str | os.PathLike):
        raise TypeError(f"file must be a path, got {type(file).__name__}: write save(module, file) or load(file)")
    file = Path(file)
    if file.suffix != ".safetensors":
        raise ValueError(f"file must end in .safetensors, got {str(file)!r}: {cure}")
    return file


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            'vqssl.save and vqssl.load need safetensors: pip install safetensors, or "vqssl[health]"'
        ) from error
    return safetensors
