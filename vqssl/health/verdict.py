"""What the numbers mean, and what to do: the findings on one codebook, with every threshold and its reason."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from vqssl.health.finding import LEVELS, Finding, count, power_above, share, worst
from vqssl.health.use import unused, usage

if TYPE_CHECKING:
    from vqssl.health.report import CodebookHealth

__all__ = ["judge", "near_duplicate_below"]

DUPLICATES_ACT, DUPLICATES_LOOK = 0.25, 0.02
"""Share of codes with a near-duplicate: dead weight as dead codes are, though their counts may look alive. Random codes
have next to none; a few come and go where a revival draws one token twice."""

NEAR = 0.01
"""Near-duplicates lie within this fraction of the spacing that codes would have if they were spread out evenly."""

COLLAPSED = 1e-3
"""Spread of the codes next to their length. The tokens of working encoders have 0.1 and more; float32 keeps 1e-7."""

LINE = 1.5
"""Effective dimension of a codebook that could have three or more: nearly all variance lies along one direction."""

PLACE = 0.05
"""Codes nearer than this, in units of the spread, lie in one place as seen from the whole codebook."""

PLACES_LOOK = 12.0
"""Distinct places below which many codes (four times as many) sit in clumps. Codes spread along a line, Gaussian or
with heavier tails, have 18 to 34 places, and in two dimensions nearly all: only what has gaps has fewer."""

ONE_PLACE = 1.2
"""Distinct places below which a few codes lie far from all the others, which says nothing of those."""

TURNOVER_LOOK = 0.5
"""Share of codes that lie where another one lay: half of the indices no longer mean what they meant."""


def judge(health: CodebookHealth) -> tuple[Finding, ...]:
    """The findings on one codebook, worst first; never empty.

    >>> import vqssl
    >>> judge(vqssl.health.examine(vqssl.EMACodebook(8, 4))["codebook"])[0].says
    'not trained yet: the codes are random'
    """
    if not health.initialized:
        advice = "call it in training mode: .train(), not frozen, and with at least one valid token"
        return (Finding("look", "not trained yet: the codes are random", advice),)
    found = [*_broken(health), *unused(health), *_collapsed(health)]
    if not found:  # else the rest would be consequences
        found = [*usage(health), *_geometry(health)]
    if worst(found) != "act" or health.since_initialized is False:  # a since of no use is said in any case
        found += _movement(health)
    if not any(LEVELS.index(finding.level) for finding in found):
        found.append(_healthy(health))
    return tuple(sorted(found, key=lambda finding: -LEVELS.index(finding.level)))


def near_duplicate_below(codebook_size: int, dimension: float) -> float:
    r"""The distance, in units of the spread, within which two codes are near-duplicates.

    .. math:: 0.01 \cdot K^{-1/\max(d, 1)}

    K codes that spread in d dimensions (the effective dimension: not all of D) lie some :math:`K^{-1/d}` of their
    spread apart; two at a hundredth of that share a cell.

    >>> near_duplicate_below(1024, 1)
    9.765625e-06
    """
    return float(NEAR * codebook_size ** (-1 / max(dimension, 1)))


def _broken(health: CodebookHealth) -> Iterator[Finding]:
    if health.not_finite:
        yield Finding(
            "act",
            f"{share(health.not_finite, health.codebook_size)} hold NaN, infinities or values beyond 1e150",
            "codebooks of vqssl take in no such token: load an older checkpoint, and check what wrote this one",
        )
    if health.not_counts:
        yield Finding(
            "act",
            f"{share(health.not_counts, health.codebook_size, 'running counts')} are NaN, infinite or negative",
            "the state is broken, and its use cannot be told: load an older checkpoint, and check what wrote this one",
        )


def _collapsed(health: CodebookHealth) -> Iterator[Finding]:
    if health.codebook_size - health.not_finite > 1 and health.spread <= COLLAPSED * health.norm:
        relative = health.spread / health.norm if health.norm else 0.0
        yield Finding(
            "act",
            f"all codes are nearly equal: their spread is {relative:.1g} of their length",
            "the tokens have collapsed, not the codebook: check the encoder's targets, and the projection before it",
        )


def _geometry(health: CodebookHealth) -> Iterator[Finding]:
    size = health.codebook_size
    clumps = _clumps(health)
    if health.near_duplicates > DUPLICATES_LOOK * size:
        yield Finding(
            "act" if health.near_duplicates > DUPLICATES_ACT * size else "look",
            f"{share(health.near_duplicates, size)} have a near-duplicate",
            "two such codes do the work of one: lower codebook_size; where batches hold fewer tokens than codes, "
            "SampleInit() and BatchRevival() repeat some: make them larger",
        )
    elif clumps is not None:
        yield Finding(
            "look",
            f"the {size} codes sit in clumps: as seen from afar in {clumps:.2g} places",
            "tokens differ far more between clumps than within: if what is within matters, find the token dimensions "
            f"that part the clumps and scale them down; if not, codebook_size={power_above(clumps)} is enough",
        )
    on_a_line = health.effective_dimension is not None and health.effective_dimension < LINE
    if on_a_line and clumps is None and min(health.dim, size - 1) > 2:  # two clumps always lie on a line
        yield Finding(
            "look",
            f"effective dimension {health.effective_dimension:.1f} of {health.dim}: the codes lie nearly on a line",
            "one direction of the tokens outweighs the rest: normalise each of their dimensions before the codebook"
            + ("" if health.metric == "cosine" else ', or write metric="cosine"'),
        )


def _clumps(health: CodebookHealth) -> float | None:
    """How many; None where the codes are not in clumps."""
    places = health.places
    return places if places is not None and ONE_PLACE <= places <= min(PLACES_LOOK, health.codebook_size / 4) else None


def _movement(health: CodebookHealth) -> Iterator[Finding]:
    if health.since_initialized is False:
        yield Finding(
            "look",
            "nothing to compare with: the earlier codebook was not trained yet",
            "give a state from after its first update in training mode",
        )
    elif health.drift == 0 and health.updates_since == 0:
        yield Finding(
            "look",
            "the same state twice: 0 updates lie between, and the codes are equal",
            "give an earlier state; if training went on in between, it was frozen or in eval mode: .train(), "
            "freeze(False), and in loops that use quantize() also update_()",
        )
    elif health.drift == 0:
        yield Finding(
            "look",
            "the codes have not moved"
            + ("" if health.updates_since is None else f" in {health.updates_since} updates"),
            "fine if frozen; otherwise call it in training mode, freeze(False), and in loops that use quantize() also "
            "update_()",
        )
    elif health.turnover is not None and health.turnover > TURNOVER_LOOK:
        yield Finding(
            "look",
            f"{100 * health.turnover:.0f}% of the codes have changed places since (drift {health.drift or 0:.2g})",
            "usual early in training; later raise decay, or lower the learning rate or the revival's threshold",
        )


def _healthy(health: CodebookHealth) -> Finding:
    if health.codebook_size < 2:
        return Finding("ok", "a single code: nothing to measure", "")
    return Finding(
        "ok",
        f"perplexity {count(health.perplexity)} of {health.codebook_size} "
        f"({100 * health.perplexity / health.codebook_size:.0f}%), {health.dead} dead, {health.dying} dying",
        "",
    )
