"""Ranges of the methods' own options, by name: the same name means the same in every method."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

from examples.pretrain.ranges import check_range

COUNT: dict[str, float] = {"least": 1}
WEIGHT: dict[str, float] = {"least": 0}
SHARE: dict[str, float] = {"least": 0, "most": 1}
POSITIVE: dict[str, float] = {"above": 0}
RANGES: dict[str, dict[str, float]] = {
    **dict.fromkeys(("dim", "hidden_dim", "side_dim", "bottleneck", "prototypes", "codebook_size", "grid"), COUNT),
    **dict.fromkeys(("heads", "queue", "iterations", "words", "members", "components"), COUNT),
    **dict.fromkeys(("momentum", "final_momentum", "codebook_decay", "warmup", "alone", "hidden", "cut_out"), SHARE),
    **dict.fromkeys(("temperature", "teacher_temperature", "strength"), POSITIVE),
    **dict.fromkeys(("commitment_weight", "restoration_weight", "adversary_weight", "koleo_weight"), WEIGHT),
    **dict.fromkeys(("code_weight", "word_weight", "weights", "target_weights", "local_crops"), WEIGHT),
    "sides": {"above": 0, "most": 1},
}
"""Bounds as :func:`check_range` takes them. Numbers that are not finite are refused for every name."""


def check_options(name: str, options: Any) -> None:
    """Raise ValueError unless every number among the options of a method is in its range.

    Args:
        name: of the method, or of the part of its options, as a user writes it.
        options: a dataclass; those in it are checked too.

    >>> from examples.pretrain.methods.byol import BYOLOptions
    >>> check_options("byol", BYOLOptions(dim=0))
    Traceback (most recent call last):
    ValueError: --byol.dim must be a number of at least 1, got 0
    """
    for each in fields(options):
        value = getattr(options, each.name)
        full = f"{name}.{each.name}"
        if is_dataclass(value):
            check_options(full, value)
            continue
        for number in numbers(value):
            check_range(f"--{full.replace('_', '-')}", number, **RANGES.get(each.name, {}))


def numbers(value: Any) -> list[float]:
    """Return the numbers of an option: none of a flag or a name, all of a tuple."""
    if isinstance(value, tuple):
        return [number for part in value for number in numbers(part)]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else []
