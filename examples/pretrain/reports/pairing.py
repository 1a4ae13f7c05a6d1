"""Which runs may be compared: those of one seed on one device model. Another model rounds differently."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple


class Key(NamedTuple):
    """Identity of a run among those of one encoder or variant."""

    seed: int
    device: str | None
    """Model of the device that measured; None in records that do not say."""
    trained_on: tuple[str, ...]
    """Models of the devices that pretrained; empty for an untrained encoder, and in records that do not say."""


def key_of(record: dict[str, Any]) -> Key:
    """Return the key of a record.

    >>> key_of({"seed": 0, "device": "A", "pretrained_on": ["B"]})
    Key(seed=0, device='A', trained_on=('B',))
    >>> key_of({"seed": 0})
    Key(seed=0, device=None, trained_on=())
    """
    return Key(record["seed"], record.get("device"), tuple(record.get("pretrained_on") or ()))


def order_of(key: Key) -> tuple[int, str, tuple[str, ...]]:
    """Return a sort key: by seed, then by device."""
    return key.seed, key.device or "", key.trained_on


def pairs(ours: Iterable[Key], theirs: Iterable[Key]) -> list[tuple[Key, Key]]:
    """Return the pairs of runs with the same seed and the same device models.

    An untrained encoder pairs with any run that was measured on its device. Unknown models pair among themselves.

    >>> a, b = Key(0, "A", ("A",)), Key(0, "A", ("B",))
    >>> len(pairs([a], [a])), len(pairs([a], [b]))
    (1, 0)
    >>> len(pairs([a], [Key(0, "A", ())])), len(pairs([a], [Key(0, None, ())]))
    (1, 0)
    """
    theirs = sorted(theirs, key=order_of)
    return [(a, b) for a in sorted(ours, key=order_of) for b in theirs if _comparable(a, b)]


def _comparable(a: Key, b: Key) -> bool:
    alike = a.trained_on == b.trained_on or not (a.trained_on and b.trained_on)
    return a.seed == b.seed and a.device == b.device and alike


def device_note(keys: Iterable[Key]) -> str:
    """Return a sentence that names the device models of runs, and says whether a table mixes them.

    >>> device_note([Key(0, "A", ()), Key(1, "A", ("A",))])
    'Device model: A.'
    >>> device_note([Key(0, "A", ("A",)), Key(0, "A", ("B",))])
    'Device models: A (1 run), A after training on B (1 run). Differences are only taken within one model.'
    >>> device_note([Key(0, None, ()), Key(1, None, ())])
    'Device model: unknown (2 runs), so that differences may mix models.'
    """
    counts = Counter(_device_name(key) for key in sorted(keys, key=order_of))
    if list(counts) == [_UNKNOWN]:
        return f"Device model: {_counted(*counts.popitem())}, so that differences may mix models."
    if len(counts) == 1:
        return f"Device model: {next(iter(counts))}."
    named = ", ".join(_counted(name, count) for name, count in counts.items())
    mixed = ", but those of an unknown model may mix several" if _UNKNOWN in counts else ""
    return f"Device models: {named}. Differences are only taken within one model{mixed}."


_UNKNOWN = "unknown"


def _device_name(key: Key) -> str:
    others = [model for model in key.trained_on if model != key.device]
    return (key.device or _UNKNOWN) + (f" after training on {' and '.join(others)}" if others else "")


def _counted(name: str, count: int) -> str:
    return f"{name} ({count} run{'s' if count != 1 else ''})"
