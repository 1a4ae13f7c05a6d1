"""Float32 averages behind half-precision tensors: an average that moves by a thousandth a step needs them."""

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from vqssl.distributed import in_form_of, is_sharded

__all__ = ["WideAverages", "is_narrow", "names_in", "widened"]

_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
_WIDE = dict.fromkeys((torch.float16, torch.bfloat16, *_FLOAT8), torch.float32) | {torch.complex32: torch.complex64}
_SUFFIX = "/wide"


def is_narrow(tensor: Tensor) -> bool:
    """Return True for float16, bfloat16, complex32 and floats of 8 bits.

    >>> is_narrow(torch.zeros(1, dtype=torch.bfloat16)), is_narrow(torch.zeros(1))
    (True, False)
    """
    return tensor.dtype in _WIDE


def widened(tensor: Tensor) -> Tensor:
    """Return a narrow tensor in float32, or in complex64 if it is complex; any other as it is."""
    return tensor.to(_WIDE.get(tensor.dtype, tensor.dtype))


class WideAverages(nn.Module):
    """A store of the float32 values that narrow tensors are rounded from, by name. No cast makes them narrow.

    A value counts as long as it rounds to the tensor. Where something else has written the tensor, such as a load or
    the module's own forward pass, the tensor counts.

    >>> averages, weight = WideAverages(), torch.zeros(1, dtype=torch.bfloat16)
    >>> for _ in range(100):
    ...     averages.write_("weight", weight, averages.of("weight", weight) + 0.001)
    >>> round(weight.item(), 3), list(averages.state_dict())
    (0.1, ['weight/wide'])
    """

    def of(self, name: str, tensor: Tensor) -> Tensor:
        """Return the value behind ``tensor``: the tensor itself if it is not narrow."""
        if not is_narrow(tensor):
            return tensor
        value = self._value(name)
        if value is None:
            return widened(tensor)
        wide = widened(tensor)
        value = in_form_of(wide, value)
        return torch.where(widened(value.to(tensor.dtype)) == wide, value, wide)

    def write_(self, name: str, tensor: Tensor, value: Tensor) -> None:
        """Write ``value`` to ``tensor``, and keep it where the tensor rounds it."""
        tensor.copy_(value)
        if is_narrow(tensor):
            self.keep_(name, value)

    def keep_(self, name: str, value: Tensor) -> None:
        """Keep a value under a name."""
        held = self._value(name)
        if held is None or held.dtype != value.dtype or is_sharded(held) != is_sharded(value):
            self.register_buffer(_key(name), value.detach().clone())
        else:
            held.copy_(value)

    def key_of(self, name: str) -> str:
        """Return the key of a tensor's value in the state dict."""
        return _key(name)

    def has(self, name: str) -> bool:
        """Return True if a value is kept under the name."""
        return self._value(name) is not None

    def names(self) -> list[str]:
        """Return the names of the tensors whose values are kept."""
        return list(names_in(dict(self.named_buffers()), "").values())

    def forget_(self, name: str) -> None:
        """Drop the value of a tensor that is no longer narrow."""
        if self.has(name):
            delattr(self, _key(name))

    def _value(self, name: str) -> Tensor | None:
        found: Tensor | None = getattr(self, _key(name), None)
        return found

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def at_least_float32(tensor: Tensor) -> Tensor:
            applied = fn(tensor)
            return tensor.to(applied.device) if is_narrow(applied) else applied

        return super()._apply(at_least_float32, recurse)  # type: ignore[no-untyped-call]


def names_in(state: Mapping[str, Any], prefix: str) -> dict[str, str]:
    """Return the names of the tensors whose values a state dict holds under ``prefix``, by key."""
    return {
        key: key[len(prefix) : -len(_SUFFIX)].replace("/", ".")
        for key in state
        if key.startswith(prefix) and key.endswith(_SUFFIX)
    }


def _key(name: str) -> str:
    # torch refuses names with dots, and names of a module's own attributes.
    return name.replace(".", "/") + _SUFFIX
