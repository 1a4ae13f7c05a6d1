"""Checks and messages that all foreign state dicts share."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

__all__ = ["check_state", "listed"]


def check_state(name: str, state: Any) -> None:
    """Raise TypeError if ``state`` is not a mapping with string keys; a module or a path is the usual mistake."""
    if isinstance(state, Mapping) and all(isinstance(key, str) for key in state):
        return
    if isinstance(state, nn.Module):
        found, cure = f"the module {type(state).__name__} itself", f"{name}.state_dict()"
    elif isinstance(state, Mapping):
        found, cure = "a mapping with keys other than strings", "the module's state_dict()"
    else:
        found, cure = type(state).__name__, "torch.load(path, weights_only=True)"
    raise TypeError(f"{name} must be a state dict, names to tensors, got {found}: write {cure}")


def listed(names: Iterable[str], most: int = 6) -> str:
    """Return the first names, quoted, and the number of the others.

    >>> listed(["a", "b"]), listed(["a", "b"], most=1), listed([])
    ("'a', 'b'", "'a' and 1 more", 'none')
    """
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(map(repr, names[:most])) or "none") + more
