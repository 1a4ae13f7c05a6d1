"""Finding: one sentence of a verdict, and how its numbers are written."""

from collections.abc import Iterable
from typing import Literal, NamedTuple

__all__ = ["LEVELS", "Finding", "Level", "amount", "count", "power_above", "power_below", "share", "worst"]

Level = Literal["ok", "look", "act"]
LEVELS: tuple[Level, ...] = ("ok", "look", "act")


class Finding(NamedTuple):
    """One sentence of the verdict.

    >>> Finding("ok", "perplexity 221 of 256", "").level
    'ok'
    """

    level: Level
    """``"ok"``; ``"look"``: worth a look, or too early to tell; ``"act"``: the codebook does not do its work."""
    says: str
    """What was found, with the number."""
    advice: str
    """What to do about it; empty where there is nothing to do."""


def worst(findings: Iterable[Finding]) -> Level:
    """The worst level among findings; ``"ok"`` where there are none.

    >>> worst([Finding("look", "", ""), Finding("ok", "", "")])
    'look'
    """
    return max((finding.level for finding in findings), key=LEVELS.index, default="ok")


def share(count: int, size: int, what: str = "codes") -> str:
    return f"{100 * count / size:.0f}% of the {what} ({count} of {size})"


def amount(value: float) -> str:
    """A number of tokens."""
    return format(value, ",.0f" if value >= 10 else ".2g")


def count(value: float) -> str:
    return format(value, ".0f" if value >= 100 else ".3g")


def power_above(value: float) -> int:
    power = 1
    while power < value:
        power *= 2
    return power


def power_below(value: float) -> int:
    power = 1
    while 2 * power <= value:
        power *= 2
    return power
