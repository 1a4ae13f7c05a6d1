"""Ranges of options: refused before hours of work, in one sentence."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence


def check_range(
    name: str,
    value: float,
    *,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> None:
    """Raise ValueError unless a number is finite and within its bounds.

    Args:
        name: of the option, as a user writes it.
        value: the number.
        least: included.
        most: included.
        above: not included.
        below: not included.

    >>> check_range("--lr", float("nan"), above=0)
    Traceback (most recent call last):
    ValueError: --lr must be a number above 0, got nan
    """
    bounds = [("of at least", least), ("of at most", most), ("above", above), ("below", below)]
    outside = (
        not math.isfinite(value)
        or (least is not None and value < least)
        or (most is not None and value > most)
        or (above is not None and value <= above)
        or (below is not None and value >= below)
    )
    if outside:
        rule = " and ".join(f"{word} {bound:g}" for word, bound in bounds if bound is not None)
        raise ValueError(f"{name} must be a {'number ' + rule if rule else 'finite number'}, got {value}")


def check_sizes(image_size: int, phantoms: int, *, drawn: bool) -> None:
    """Raise ValueError unless images of this side, and this number of phantoms, can be made.

    Args:
        image_size: side in pixels.
        phantoms: number of phantoms.
        drawn: whether phantoms are drawn.
    """
    check_range("--image-size", image_size, least=16 if drawn else 1)
    check_range("--phantoms", phantoms, least=1)


def check_distinct(name: str, values: Sequence[Hashable]) -> None:
    """Raise ValueError unless there are values, and each of them once.

    >>> check_distinct("--methods", ["byol", "byol"])
    Traceback (most recent call last):
    ValueError: --methods must name each once, got byol twice or more: name it once
    """
    if not values:
        raise ValueError(f"{name} must hold at least one entry, got none")
    twice = [value for number, value in enumerate(values) if value in values[:number]]
    if twice:
        raise ValueError(f"{name} must name each once, got {twice[0]} twice or more: name it once")


def check_shares(name: str, shares: Sequence[float]) -> None:
    """Raise ValueError unless shares are above 0, at most 1, and different to six digits."""
    for share in shares:
        check_range(name, share, above=0, most=1)
    check_distinct(name, [f"{100 * share:g}%" for share in shares])


def share_of(part: str) -> tuple[int, int]:
    """Return I and N of `"I/N"`, the I-th of N equal shares of the work, counted from 0.

    Raises:
        ValueError: it is of another form, or I is not below N.

    >>> share_of("1/2")
    (1, 2)
    """
    number, _, count = part.partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise ValueError(f"--part must be I/N with 0 <= I < N, such as 0/2 and 1/2, got {part}")
    return int(number), int(count)
