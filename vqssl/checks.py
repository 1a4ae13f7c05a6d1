"""Checks of input that several parts share.

Each raises an error that says the rule, what was received, and what to write instead.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

T = TypeVar("T", bound=Callable[..., Any])


def check_tokens(name: str, x: Tensor, dim: int) -> None:
    """Raise unless ``x`` is a real floating tensor whose last axis has ``dim`` entries."""
    if isinstance(x, Tensor) and x.dtype in (torch.int16, torch.int32, torch.int64):
        # Indices converted to floats would pass every later check.
        raise TypeError(
            f"{name} must have a floating dtype, got {x.dtype}: write codebook.lookup({name}) for code numbers, "
            f"{name}.float() for measurements"
        )
    check_floating(name, x)
    if x.ndim < 1 or x.shape[-1] != dim:
        if x.ndim > 2 and x.shape[1] == dim:
            cure = "for maps with channels first, write vqssl.ChannelsFirst(module)"
        else:
            cure = "project it to that width first, or build the module with its width"
        raise ValueError(
            f"{name} must be (*batch, dim) with dim = {dim} in its last axis, got shape {tuple(x.shape)}: {cure}"
        )


def check_floating(name: str, x: Tensor, several: str = "") -> None:
    """Raise unless ``x`` is a real floating tensor.

    Args:
        name: of the argument.
        x: the argument.
        several: what to write where a sequence of tensors came instead of one.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {_kind(x)}: {_one_tensor(name, x, several)}")
    if not x.is_floating_point():
        raise TypeError(f"{name} must have a floating dtype, got {x.dtype}: write {name}.float()")


def _kind(x: Any) -> str:
    """Return in words what came instead of a tensor."""
    plain = isinstance(x, Sequence) and not isinstance(x, str) and not hasattr(x, "_fields")
    return f"a {type(x).__name__} of {len(x)}" if plain else type(x).__name__


def _one_tensor(name: str, x: Any, several: str) -> str:
    """Return what to write instead of ``x``, which is not a tensor."""
    if hasattr(x, "quantized"):
        return f"write {name}.quantized"
    if isinstance(x, Sequence) and any(isinstance(part, Tensor) for part in x):
        # Usually (z, maps) of a model that returns both.
        return several or f"give one tensor; of a model that returns several, write model(x)[0], here {name}[0]"
    return f"write torch.as_tensor({name})"


def check_device(name: str, x: Tensor, device: torch.device, owner: str = "the codes") -> None:
    """Raise unless ``x`` is on ``device``, that of ``owner``."""
    if x.device != device:
        raise ValueError(
            f"{name} must be on the device of {owner}, {device}, got {x.device}: write {name}.to({str(device)!r}) "
            "or move the module"
        )


def check_alike(name: str, x: Tensor, other_name: str, other: Tensor, cure: str, several: str = "") -> None:
    """Raise unless both are floating tensors of one shape on one device."""
    check_floating(name, x, several)
    check_floating(other_name, other, several)
    if x.shape != other.shape:
        raise ValueError(
            f"{name} and {other_name} must have one shape, got {tuple(x.shape)} and {tuple(other.shape)}: {cure}"
        )
    check_device(other_name, other, x.device, name)


def check_codes(x: Tensor, quantized: Tensor, indices: Tensor | None = None, several: str = "") -> None:
    """Raise unless ``quantized`` has one code for each token, or with ``indices`` is their codebook ``(K, D)``.

    Args:
        x: tokens ``(*batch, D)``.
        quantized: ``(*batch, D)``, or with ``indices`` ``(K, D)``.
        indices: ``(*batch,)`` integers from -1 to K - 1, or None.
        several: what to write where a sequence of tensors came instead of one.
    """
    if indices is None:
        cure = "look the codes up with the indices of these very tokens"
        check_alike("x", x, "quantized", quantized, cure, several)
        return
    check_floating("x", x, several)
    check_floating("quantized", quantized, several)
    if quantized.ndim != 2 or x.ndim < 1 or x.shape[-1] != quantized.shape[1]:
        raise ValueError(
            f"with indices, quantized must be a codebook (K, D) with D the width of x, got shapes "
            f"{tuple(quantized.shape)} and {tuple(x.shape)}: leave indices out to give one code for each token"
        )
    check_indices("indices", indices, x.shape[:-1], x.device)
    check_device("quantized", quantized, x.device, "x")
    if indices.device.type == "cpu":  # elsewhere it would synchronise; the device has an assertion of its own
        check_code_range("indices", indices, len(quantized))


def check_dtype(name: str, x: Tensor, dtype: torch.dtype) -> None:
    """Raise unless ``x`` has the parameters' dtype or autocast is enabled."""
    kind = x.device.type
    if x.dtype != dtype and not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
        raise TypeError(
            f"{name} must have the dtype of the module's parameters, {dtype}, got {x.dtype}: write {name}.to({dtype}) "
            "or call it under torch.autocast"
        )


def check_mask(mask: Tensor | None, shape: torch.Size, device: torch.device, name: str = "mask") -> None:
    """Raise unless ``mask`` is None, or boolean, of exactly ``shape`` and on the tokens' device."""
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        found = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{name} must be a boolean tensor, True where a token counts, got {found}: write {name} != 0")
    if mask.shape != shape:
        raise ValueError(
            f"{name} must have one entry for each token, shape {tuple(shape)}, got {tuple(mask.shape)}: "
            "resize or expand it to that shape first"
        )
    check_device(name, mask, device, "the tokens")


def check_indices(
    name: str, indices: Tensor, shape: torch.Size | None = None, device: torch.device | None = None
) -> None:
    """Raise unless ``indices`` is an integer tensor, of ``shape`` and on ``device`` where these are given."""
    integer = isinstance(indices, Tensor) and not (
        indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool
    )
    if not integer:
        found = indices.dtype if isinstance(indices, Tensor) else type(indices).__name__
        given: Any = indices
        if isinstance(given, tuple) and hasattr(given, "indices"):
            cure = "give its .indices"
        elif isinstance(given, Tensor):  # rounding features to integers would be no error, and no codes
            cure = "give code numbers, such as the .indices that a quantiser returned"
        elif isinstance(given, list | tuple) and given and isinstance(given[0], Tensor):
            cure = f"give one tensor, such as {name}[0]"
        else:
            cure = f"write torch.as_tensor({name}).long()"
        raise TypeError(f"{name} must be an integer tensor of code numbers, got {found}: {cure}")
    if shape is not None and indices.shape != shape:
        raise ValueError(
            f"{name} must have one entry for each token, shape {tuple(shape)}, got {tuple(indices.shape)}: "
            "give the indices that quantize returned for these very tokens"
        )
    if device is not None:
        check_device(name, indices, device)


def check_one_a_scale(name: str, values: Any, scales: int) -> None:
    """Raise unless ``values`` is a sequence with one entry for each scale."""
    if isinstance(values, Tensor) or not isinstance(values, Sequence):
        if isinstance(values, Tensor):
            found = f"one tensor of shape {tuple(values.shape)}"
            cure = f"[{name}]" if scales == 1 else f"a list of {scales} tensors"
        else:
            found = type(values).__name__
            cure = f"list({name}.values())" if isinstance(values, Mapping) else f"list({name})"
        raise TypeError(
            f"{name} must be a sequence with one entry for each of the {scales} scales, got {found}: write {cure}"
        )
    if len(values) != scales:
        raise ValueError(
            f"{name} must hold one entry for each of the {scales} scales, got {len(values)}: pass those maps that the "
            "module was built for; of a model that returns (z, maps), the maps alone"
        )


def check_code_range(name: str, indices: Tensor, codebook_size: int) -> None:
    """Raise unless every index is -1 (masked) or names a code.

    Synchronises with the device: keep it out of hot paths. It does nothing in a compiled graph.
    """
    if indices.numel() == 0 or indices.device.type == "meta" or torch.compiler.is_compiling():
        return
    bounds = indices.long().aminmax()
    try:
        low, high = (int(bound) for bound in bounds)
    except RuntimeError:  # under torch.func.vmap there is no one value to read
        return
    if low < -1 or high >= codebook_size:
        raise ValueError(
            f"{name} must be from -1 (masked) to {codebook_size - 1} (codebook_size - 1), got {low} to {high}: "
            "check that they come from this codebook"
        )


def can_read_without_sync(tensor: Tensor) -> bool:
    """Return True if reading the tensor neither synchronises with the device nor breaks tracing."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def check_positive_int(name: str, value: int) -> None:
    """Raise unless ``value`` is an int from 1 to 2^31 - 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    if value >= 2**31:
        raise ValueError(f"{name} must be below 2^31, got {value}")


def check_seed(seed: int) -> None:
    """Raise unless ``seed`` is an int of 64 bits."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an int, got {seed!r}")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed must fit 64 bits, got {seed}: write seed % 2**63")


def check_floating_dtype(dtype: Any) -> None:
    """Raise unless ``dtype`` is None or a real floating dtype."""
    if dtype is not None and not isinstance(dtype, torch.dtype):
        known = isinstance(dtype, str) and isinstance(getattr(torch, dtype, None), torch.dtype)
        cure = f"torch.{dtype}" if known else "torch.float32 or torch.float64"
        raise TypeError(f"dtype must be a torch.dtype, got {dtype!r}: write {cure}")
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating dtype, got {dtype}: write torch.float32 or torch.float64")


def check_range(name: str, value: float, low: float, high: float, *, rule: str = "") -> None:
    """Raise unless ``value`` is a number from ``low`` to ``high``; ``rule`` says what it means."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be from {low:g} to {high:g}, got {value}{rule and ': '}{rule}")


def check_object(name: str, value: Any, protocol: type, example: str) -> None:
    """Raise unless ``value`` is an object with the methods of ``protocol``, not the name or the class of one."""
    if not isinstance(value, protocol) or isinstance(value, type):
        if isinstance(value, type):
            found = f"the class {value.__name__}"
        else:
            found = type(value).__name__ if isinstance(value, nn.Module) else repr(value)
        raise TypeError(f"{name} must be an object, got {found}: write {name}={example}")


def check_shape_of_result(policy: str, result: Any, x: Tensor) -> None:
    """Raise unless what a policy returned is a tensor of the tokens' shape."""
    found = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
    if found != tuple(x.shape):
        raise ValueError(
            f"{policy} must return a tensor of the tokens' shape, {tuple(x.shape)}, got {found}: return one vector "
            "of the same width for each token"
        )


def check_state_fits(module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """Raise if a shape differs, before anything is loaded: a pre-hook of ``load_state_dict``.

    Without it torch loads everything else first.
    """
    differ = []
    for name, ours in chain(module.named_parameters(), module.named_buffers()):
        theirs = state_dict.get(prefix + name)
        if not isinstance(theirs, Tensor) or is_lazy(ours):  # a lazy parameter takes any shape
            continue
        # A scalar takes a vector of one entry, as everywhere in torch.
        if theirs.shape != ours.shape and not (ours.ndim == 0 and theirs.shape == (1,)):
            differ.append(f"{name} {tuple(ours.shape)}, got {tuple(theirs.shape)}")
    if differ:
        more = f"; and {len(differ) - 3} more" if len(differ) > 3 else ""
        raise ValueError(
            f"state_dict must have the shapes of this {type(module).__name__}: {'; '.join(differ[:3])}{more}: build "
            "the module with the sizes that the checkpoint was written with"
        )


def by_name(kind: str, choice: str | T, table: Mapping[Any, T]) -> T:
    """Return what ``choice`` names in ``table``, or ``choice`` itself where it is callable and no class."""
    if isinstance(choice, str):
        if choice not in table:
            raise ValueError(f"{kind} must be one of {', '.join(map(repr, table))}, or a callable, got {choice!r}")
        return table[choice]
    if not callable(choice):
        raise TypeError(f"{kind} must be a name ({', '.join(map(repr, table))}) or a callable, got {choice!r}")
    if isinstance(choice, type):
        raise TypeError(f"{kind} must be a function or an object, got the class {choice.__name__}: give an object")
    return choice


def policy_name(choice: Any) -> str:
    """Return the name of a policy that was given as a name, a function or an object, for ``repr``."""
    return choice if isinstance(choice, str) else getattr(choice, "__name__", type(choice).__name__)
