"""What the numbers mean, and what to do: findings, with every threshold and its reason in one place."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Literal, NamedTuple

from vqssl.health.measures import even_use

if TYPE_CHECKING:
    from vqssl.health.report import CodebookHealth

__all__ = ["Finding", "Level", "judge", "near_duplicate_below", "worst"]

Level = Literal["ok", "look", "act"]
LEVELS: tuple[Level, ...] = ("ok", "look", "act")

DEAD_ACT, DEAD_LOOK = 0.25, 0.05
"""Share of dead codes beyond those that chance leaves without tokens. A quarter dead is capacity paid for (memory,
search) and not had; below a twentieth no measure of the codebook moves."""

DYING_LOOK = 0.2
"""Share of dying codes beyond chance. A code that nobody uses spends 1 of the ln 10 horizons from the fair share
to a tenth of it dying, so that a fifth dying means nearly half idle. Trained codebooks of 256 had 0 to 11%."""

EVEN_ACT, EVEN_LOOK = 0.1, 0.5
"""Perplexity as a share of what even use would show with as many tokens. Data are not even: trained codebooks have 0.7
to 0.9. Below a half they could do with half the codes; a tenth is collapse."""

FEW_TOKENS = 2.0
"""Tokens a code that the running counts remember. With 2 an evenly used codebook shows 6% dead and 78% perplexity, with
1 it is 19% and 62%: below, dead codes and chance cannot be told apart."""

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

SETTLED = 5.0
"""Memory lengths 1 / (1 - decay) until use has settled. A revived code enters with the fair share, and takes ln 10 of
them to lose it; on encoders that train, perplexity first falls below half of what it comes to, and lies within 15% of
that from 2 to 4 lengths on (``docs/health.md``)."""

TURNOVER_LOOK = 0.5
"""Share of codes that lie where another one lay: half of the indices no longer mean what they meant."""


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


def judge(health: CodebookHealth) -> tuple[Finding, ...]:
    """The findings on one codebook, worst first; never empty.

    >>> import vqssl
    >>> judge(vqssl.health.examine(vqssl.EMACodebook(8, 4))["codebook"])[0].says
    'not trained yet: the codes are random'
    """
    if not health.initialized:
        advice = "call it in training mode: .train(), not frozen, and with at least one valid token"
        return (Finding("look", "not trained yet: the codes are random", advice),)
    found = [*_broken(health), *_unused(health), *_collapsed(health)]
    if not found:  # else the rest would be consequences
        found = [*_usage(health), *_geometry(health)]
    if worst(found) != "act" or health.since_initialized is False:  # a since of no use is said in any case
        found += _movement(health)
    if not any(LEVELS.index(finding.level) for finding in found):
        found.append(_healthy(health))
    return tuple(sorted(found, key=lambda finding: -LEVELS.index(finding.level)))


def worst(findings: Iterable[Finding]) -> Level:
    """The worst level among findings; ``"ok"`` where there are none.

    >>> worst([Finding("look", "", ""), Finding("ok", "", "")])
    'look'
    """
    return max((finding.level for finding in findings), key=LEVELS.index, default="ok")


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
            f"{_share(health.not_finite, health.codebook_size)} hold NaN, infinities or values beyond 1e150",
            "codebooks of vqssl take in no such token: load an older checkpoint, and check what wrote this one",
        )
    if health.not_counts:
        yield Finding(
            "act",
            f"{_share(health.not_counts, health.codebook_size, 'running counts')} are NaN, infinite or negative",
            "the state is broken, and its use cannot be told: load an older checkpoint, and check what wrote this one",
        )


def _unused(health: CodebookHealth) -> Iterator[Finding]:
    if not health.not_counts and not health.shares.any():
        yield Finding("act", "no tokens: all running counts are 0", "check the masks, and that tokens are finite")


def _usage(health: CodebookHealth) -> Iterator[Finding]:
    size = health.codebook_size
    if size < 2:
        return
    if health.decay == 1:
        yield Finding(
            "look",
            "decay is 1: neither counts nor codes ever move, so that use cannot be told",
            "write decay=0.99; for codes that are to stay, freeze()",
        )
        return
    if health.start_share is not None and (not health.updates or health.start_share > _unused_until(health)):
        yield Finding(
            "look",
            f"too early to tell: after {health.updates} updates a code that was never used still has "
            f"{100 * health.start_share:.0f}% of the fair share (at decay {health.decay:g})",
            f"look again after some {_updates_needed(health)} updates",
        )
        return
    remembered = tokens_per_code(health)
    if health.tokens_per_step is None or remembered is None:
        return
    if few := remembered < FEW_TOKENS:
        yield Finding(
            "look",
            f"too few tokens to tell: {amount(health.tokens_per_step)} a step, of which the counts remember "
            f"{remembered:.2g} a code",
            f"use codebook_size={_power_below(size * remembered / FEW_TOKENS)} or less, larger batches, or a decay "
            "nearer to 1; until then dead codes are partly chance",
        )
    uneven = _uneven(health, remembered, few)
    if uneven is None:
        return
    until = _settled_after(health)
    if health.updates is None:
        yield uneven._replace(advice=f"{uneven.advice}; if training has just begun, look again after {until} updates")
    elif health.updates < until:
        yield Finding(
            "look",
            f"still settling: {health.updates} updates of some {until}, perplexity {_count(health.perplexity)} of "
            f"{size} so far",
            f"look again after some {until - health.updates} more: until then revived codes come and go",
        )
    else:
        yield uneven


def _uneven(health: CodebookHealth, remembered: float, few: bool) -> Finding | None:
    """What is wrong with the use of the codes, if it has settled."""
    size = health.codebook_size
    perplexity, chance_dead = even_use(remembered, health.dead_below)
    even = health.perplexity / (perplexity * size)
    dead = health.dead / size - chance_dead
    if even < EVEN_ACT:
        start = _start(health, "start where the tokens are, by initialization=KMeansInit()", "; ")
        revival = "" if health.revives else "have revival=BatchRevival(); "
        return Finding(
            "act",
            f"collapsed use: perplexity {_count(health.perplexity)} of {size}",
            f"check that tokens differ, are of unit scale, and lie where the codes do; {start}{revival}if all that is "
            f"so, lower codebook_size to {_power_above(max(health.perplexity, 2))}",
        )
    if few:
        return None
    if dead > DEAD_LOOK:
        level: Level = "act" if dead > DEAD_ACT else "look"
        return Finding(level, f"{_share(health.dead, size)} are dead", _fewer_dead(health))
    if even < EVEN_LOOK:
        start = _start(health, "initialization=KMeansInit() starts more evenly")
        return Finding(
            "look",
            f"uneven use: perplexity {_count(health.perplexity)} of {size}",
            f"codebook_size={_power_above(health.perplexity)} would hold as much{start and '; ' + start}",
        )
    top = min(math.e * health.dead_below, 1.0)
    chance_dying = even_use(remembered, top)[1] - chance_dead
    if health.dying / size - chance_dying > DYING_LOOK:
        return Finding(
            "look",
            f"{_share(health.dying, size)} are dying: below {top:.2f} of the fair share, and falling if idle",
            f"the data fill fewer codes than there are: lower codebook_size to {_power_below(size - 1)}, or live with "
            "revivals",
        )
    return None


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
            f"{_share(health.near_duplicates, size)} have a near-duplicate",
            "two such codes do the work of one: lower codebook_size; where batches hold fewer tokens than codes, "
            "SampleInit() and BatchRevival() repeat some: make them larger",
        )
    elif clumps is not None:
        yield Finding(
            "look",
            f"the {size} codes sit in clumps: as seen from afar in {clumps:.2g} places",
            "tokens differ far more between clumps than within: if what is within matters, find the token dimensions "
            f"that part the clumps and scale them down; if not, codebook_size={_power_above(clumps)} is enough",
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
        f"perplexity {_count(health.perplexity)} of {health.codebook_size} "
        f"({100 * health.perplexity / health.codebook_size:.0f}%), {health.dead} dead, {health.dying} dying",
        "",
    )


def tokens_per_code(health: CodebookHealth) -> float | None:
    """m of :func:`vqssl.health.even_use`: how many tokens a code the running counts remember."""
    if health.tokens_per_step is None:
        return None
    return health.tokens_per_step / health.codebook_size * (1 + health.decay) / max(1 - health.decay, 1e-12)


def _settled_after(health: CodebookHealth) -> int:
    return math.ceil(round(SETTLED / (1 - health.decay), 6))


def _start(health: CodebookHealth, advice: str, end: str = "") -> str:
    """Advice on the start of the codes; none where it was followed."""
    if health.initialization == "KMeansInit":
        return ""
    return f"{advice}{'' if health.initialization else ' if it was another'}{end}"


def _fewer_dead(health: CodebookHealth) -> str:
    smaller = f"lower codebook_size to {min(_power_above(max(health.perplexity, 2)), health.codebook_size // 2 or 1)}"
    if health.revives is None:
        threshold = f"revival=BatchRevival(threshold={max(health.dead_below, 0.1):g})"
        return f"train with {threshold} if there is no revival, with a higher threshold if there is, or {smaller}"
    if not health.revives:
        start = _start(health, " and initialization=KMeansInit()")
        return f"write revival=BatchRevival(){start}, or {smaller}"
    raised = f"raise the revival's threshold above {health.dead_below:g} (it acts in training mode, not frozen)"
    return f"{raised}, or {smaller}"


def _unused_until(health: CodebookHealth) -> float:
    """What a code that was never used must have fallen to before usage says anything."""
    return health.dead_below or 0.1


def _updates_needed(health: CodebookHealth) -> int:
    """t from ``decay ** t * K / sum(N) = tau``, where ``sum(N) = decay ** t * K + (1 - decay ** t) * T``."""
    fair = (health.tokens_per_step or 0.0) / health.codebook_size or 1.0
    tau = _unused_until(health)
    if not 0 < health.decay < 1 or tau == 1:
        return 1
    return max(math.ceil(math.log(tau * fair / (1 - tau + tau * fair)) / math.log(health.decay)), 1)


def _share(count: int, size: int, what: str = "codes") -> str:
    return f"{100 * count / size:.0f}% of the {what} ({count} of {size})"


def amount(value: float) -> str:
    """A number of tokens."""
    return format(value, ",.0f" if value >= 10 else ".2g")


def _count(value: float) -> str:
    return format(value, ".0f" if value >= 100 else ".3g")


def _power_above(value: float) -> int:
    power = 1
    while power < value:
        power *= 2
    return power


def _power_below(value: float) -> int:
    power = 1
    while 2 * power <= value:
        power *= 2
    return power
