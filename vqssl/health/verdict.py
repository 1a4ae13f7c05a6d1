"""Judge a codebook by its measures: the findings, and every threshold with its reason."""

import math
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Literal, NamedTuple

from vqssl.health.measures import CodeMeasures, CountMeasures, MovementMeasures, even_use, tokens_per_code
from vqssl.health.sources import FoundCodebook

__all__ = ["LEVELS", "Finding", "Level", "judge", "worst"]

Level = Literal["ok", "look", "act"]
LEVELS: tuple[Level, ...] = ("ok", "look", "act")

DEAD_ACT, DEAD_LOOK = 0.25, 0.05
"""Share of dead codes beyond those without tokens by chance. A dead quarter wastes memory and search time; below
a twentieth no other measure of the codebook changes."""

DYING_LOOK = 0.2
"""Share of dying codes beyond chance. An unused code takes ln 10 memory lengths from the fair share to a tenth of it,
and is dying for 1 of them: a fifth dying means that almost half are unused. Trained codebooks of 256 had 0 to 11%."""

EVEN_ACT, EVEN_LOOK = 0.1, 0.5
"""Perplexity as a share of that of even usage with as many tokens. Trained codebooks have 0.7 to 0.9, because data are
not even. Below a half, half the codes would do; a tenth is collapse."""

FEW_TOKENS = 2.0
"""Tokens per code that the running counts remember. With 2, even usage shows 6% dead codes and 78% perplexity; with 1,
19% and 62%. Below 2, dead codes cannot be distinguished from chance."""

SETTLED = 5.0
"""Memory lengths 1 / (1 - decay) until usage has settled. A revived code starts with the fair share, and loses it in
ln 10 of them. On encoders that train, perplexity first falls below half of its final value, and is within 15% of it
after 2 to 4 lengths (``docs/health.md``)."""

DUPLICATES_ACT, DUPLICATES_LOOK = 0.25, 0.02
"""Share of codes with a near-duplicate. They waste capacity as dead codes do, even if their counts look alive. Random
codes have almost none."""

COLLAPSED = 1e-3
"""Spread of the codes relative to their length. Tokens of working encoders have 0.1 and more; float32 resolves 1e-7."""

LINE = 1.5
"""Effective dimension, where three or more are possible: almost all variance lies in one direction."""

PLACES_LOOK = 12.0
"""Distinct places below which many codes (four times as many) lie in clumps. Codes along a line, Gaussian or with
heavier tails, have 18 to 34 places, and in two dimensions nearly K. Only codes with gaps have fewer."""

ONE_PLACE = 1.2
"""Distinct places below which a few codes lie far from all others, which says nothing about the others."""

TURNOVER_LOOK = 0.5
"""Share of codes that now lie where another one was: half of the indices have changed their meaning."""


class Finding(NamedTuple):
    """One sentence of the verdict.

    >>> Finding("ok", "perplexity 221 of 256", "").level
    'ok'
    """

    level: Level
    """``"ok"``; ``"look"``: worth a look, or too early to tell; ``"act"``: the codebook is not usable."""
    says: str
    """What was found, with the number."""
    advice: str
    """What to do about it; empty if there is nothing to do."""


def worst(findings: Iterable[Finding]) -> Level:
    """Return the worst level among findings; ``"ok"`` if there are none.

    >>> worst([Finding("look", "", ""), Finding("ok", "", "")])
    'look'
    """
    return max((finding.level for finding in findings), key=LEVELS.index, default="ok")


_look = partial(Finding, "look")
_act = partial(Finding, "act")


def judge(
    codebook: FoundCodebook, counts: CountMeasures, codes: CodeMeasures, movement: MovementMeasures
) -> tuple[Finding, ...]:
    """Return the findings on one codebook, worst first; at least one."""
    size, dim = codebook.embed.shape
    if not codebook.initialized:
        advice = "call it in training mode: .train(), not frozen, and with at least one valid token"
        return (_look("not trained yet: the codes are random", advice),)
    if codebook.fixed:
        return _fixed(size, codes, movement)
    found = list(_failures(size, counts, codes))
    if not found:  # otherwise all others would be consequences of these
        found = [*_usage(codebook, counts, codes.equal), *_geometry(size, dim, codebook.metric, codes)]
    if worst(found) != "act" or movement.since_initialized is False:  # a useless `since` is always reported
        found += _movement(movement)
    if worst(found) == "ok":
        perplexity = f"perplexity {_count(counts.perplexity)} of {size} ({100 * counts.perplexity / size:.0f}%)"
        usage = f"{perplexity}, {counts.dead} dead, {counts.dying} dying"
        found.append(Finding("ok", usage if size > 1 else "a single code: nothing to measure", ""))
    return tuple(sorted(found, key=lambda finding: -LEVELS.index(finding.level)))


def _fixed(size: int, codes: CodeMeasures, movement: MovementMeasures) -> tuple[Finding, ...]:
    """Return the finding on random codes that nothing trains, as in BEST-RQ."""
    if codes.not_finite:
        return (_act(f"{_share(codes.not_finite, size)} are not finite", "build the module again from its seed"),)
    if movement.drift:
        advice = "the targets have changed: build both modules from one seed, or load one state into both"
        return (_act(f"fixed random codes, but others than before (drift {movement.drift:.2g})", advice),)
    return (Finding("ok", f"{size} fixed random codes, as intended: their usage is not counted", ""),)


def _failures(size: int, counts: CountMeasures, codes: CodeMeasures) -> Iterator[Finding]:
    if codes.not_finite:
        yield _act(
            f"{_share(codes.not_finite, size)} hold NaN, infinities or values beyond 1e150",
            "codebooks of vqssl skip such tokens: load an older checkpoint, and check what wrote this one",
        )
    if counts.not_counts:
        yield _act(
            f"{_share(counts.not_counts, size, 'running counts')} are NaN, infinite or negative",
            "the state is damaged, so usage is unknown: load an older checkpoint, and check what wrote this one",
        )
    elif not counts.shares.any():
        yield _act("no tokens: all running counts are 0", "check that masks keep tokens, and that tokens are finite")
    if size - codes.not_finite > 1 and codes.used_spread <= COLLAPSED * codes.norm:
        relative = codes.used_spread / codes.norm if codes.norm else 0.0
        yield _act(
            f"all codes in use are nearly equal: their spread is {relative:.1g} of their length",
            "the tokens have collapsed, not the codebook: check the encoder's targets, and the projection before it",
        )


def _usage(codebook: FoundCodebook, counts: CountMeasures, equal: int) -> Iterator[Finding]:
    size = len(codebook.embed)
    if size < 2:
        return
    if counts.decay == 1:
        yield _look(
            "decay is 1: counts and codes never change, so usage cannot be measured",
            "write decay=0.99; to keep the codes fixed, call freeze()",
        )
        return
    unused_until = counts.dead_below or 0.1  # what an unused code must have fallen to before usage says anything
    if counts.start_share is not None and (not counts.updates or counts.start_share > unused_until):
        yield _look(
            f"too early to tell: after {counts.updates} updates a code that was never used still has "
            f"{100 * counts.start_share:.0f}% of the fair share (at decay {counts.decay:g})",
            f"look again after about {_updates_until(unused_until, size, counts)} updates",
        )
        return
    if counts.tokens_per_step is None:
        return
    remembered = tokens_per_code(counts.tokens_per_step, size, counts.decay)
    if few := remembered < FEW_TOKENS:
        yield _look(
            f"too few tokens to tell: {amount(counts.tokens_per_step)} a step, and the counts remember "
            f"{remembered:.2g} per code",
            f"use codebook_size={_power_below(size * remembered / FEW_TOKENS)} or less, larger batches, or a decay "
            "closer to 1; until then some codes are dead by chance",
        )
    uneven = _uneven(codebook, counts, counts.dead - equal, remembered, few)
    if uneven is None:
        return
    settled = math.ceil(round(SETTLED / (1 - counts.decay), 6))
    if counts.updates is None:
        yield uneven._replace(advice=f"{uneven.advice}; if training has just begun, look again after {settled} updates")
    elif counts.updates < settled:
        perplexity = f"perplexity {_count(counts.perplexity)} of {size} so far"
        yield _look(
            f"still settling: {counts.updates} of about {settled} updates, {perplexity}",
            f"look again after about {settled - counts.updates} more: until then revived codes come and go",
        )
    else:
        yield uneven


def _uneven(codebook: FoundCodebook, counts: CountMeasures, dead: int, remembered: float, few: bool) -> Finding | None:
    """Return what is wrong with the usage, if it has settled; ``dead`` is without copies, which are another finding."""
    size = len(codebook.embed)
    even_perplexity, chance_dead = even_use(remembered, counts.dead_below)
    even = counts.perplexity / (even_perplexity * size)
    excess = dead / size - chance_dead
    if even < EVEN_ACT:
        start = _unless_kmeans(codebook, "write initialization=KMeansInit(), which starts at the tokens", "; ")
        revival = "" if codebook.revives else "write revival=BatchRevival(); "
        return _act(
            f"codebook collapse: perplexity {_count(counts.perplexity)} of {size}",
            f"check that tokens differ, have unit scale and lie where the codes do; {start}{revival}if none of this "
            f"helps, lower codebook_size to {_power_above(max(counts.perplexity, 2))}",
        )
    if few:
        return None
    if excess > DEAD_LOOK:
        level: Level = "act" if excess > DEAD_ACT else "look"
        return Finding(level, f"{_share(dead, size)} are dead", _fewer_dead(codebook, counts))
    if even < EVEN_LOOK:
        start = _unless_kmeans(codebook, "; initialization=KMeansInit() starts more evenly")
        return _look(
            f"uneven usage: perplexity {_count(counts.perplexity)} of {size}",
            f"codebook_size={_power_above(counts.perplexity)} would hold as much{start}",
        )
    top = min(math.e * counts.dead_below, 1.0)
    chance_dying = even_use(remembered, top)[1] - chance_dead
    if counts.dying / size - chance_dying > DYING_LOOK:
        return _look(
            f"{_share(counts.dying, size)} are dying: below {top:.2f} of the fair share, and soon dead if not used",
            f"the data use fewer codes: lower codebook_size to {_power_below(size - 1)}, or accept revivals",
        )
    return None


def _unless_kmeans(codebook: FoundCodebook, advice: str, end: str = "") -> str:
    """Return advice to start with k-means, unless the codebook did."""
    if codebook.initialization == "KMeansInit":
        return ""
    return f"{advice}{'' if codebook.initialization else ' (if it was another)'}{end}"


def _fewer_dead(codebook: FoundCodebook, counts: CountMeasures) -> str:
    if codebook.revives is None:
        revival = f"revival=BatchRevival(threshold={max(counts.dead_below, 0.1):g})"
        cure = f"train with {revival} if there is no revival, with a higher threshold if there is"
    elif not codebook.revives:
        cure = f"write revival=BatchRevival(){_unless_kmeans(codebook, ' and initialization=KMeansInit()')}"
    else:
        cure = f"raise the revival's threshold above {counts.dead_below:g} (it acts in training mode, not frozen)"
    size = min(_power_above(max(counts.perplexity, 2)), len(codebook.embed) // 2 or 1)
    return f"{cure}, or lower codebook_size to {size}"


def _updates_until(share: float, size: int, counts: CountMeasures) -> int:
    """Return t from ``decay ** t * K / sum(N) = share``, where ``sum(N) = decay ** t * K + (1 - decay ** t) * T``."""
    if not 0 < counts.decay < 1 or share == 1:
        return 1
    fair = (counts.tokens_per_step or 0.0) / size or 1.0
    return max(math.ceil(math.log(share * fair / (1 - share + share * fair)) / math.log(counts.decay)), 1)


def _geometry(size: int, dim: int, metric: str | None, codes: CodeMeasures) -> Iterator[Finding]:
    places = codes.places
    if places is not None and not ONE_PLACE <= places <= min(PLACES_LOOK, size / 4):
        places = None
    if codes.near_duplicates > DUPLICATES_LOOK * size:
        yield Finding(
            "act" if codes.near_duplicates > DUPLICATES_ACT * size else "look",
            f"{_share(codes.near_duplicates, size)} have a near-duplicate"
            + (f", and {codes.equal} equal an earlier one" if codes.equal else ""),
            "two such codes do the work of one, and of equal ones the first gets all tokens: check that tokens differ, "
            "or lower codebook_size",
        )
    elif places is not None:
        yield _look(
            f"the {size} codes lie in about {places:.2g} clumps",
            "tokens differ far more between clumps than within: if what is within matters, find the token dimensions "
            f"that separate the clumps and scale them down; if not, codebook_size={_power_above(places)} is enough",
        )
    dimension = codes.effective_dimension
    if dimension is not None and dimension < LINE and places is None and min(dim, size - 1) > 2:
        # Not of clumps: two of them always lie on a line.
        yield _look(
            f"effective dimension {dimension:.1f} of {dim}: the codes lie nearly on a line",
            "one direction of the tokens outweighs the others: normalise each of their dimensions before the codebook"
            + ("" if metric == "cosine" else ', or write metric="cosine"'),
        )


def _movement(movement: MovementMeasures) -> Iterator[Finding]:
    resume = "call .train() and freeze(False), and update_() in loops that use quantize()"
    if movement.since_initialized is False:
        yield _look(
            "nothing to compare with: the earlier codebook was not trained yet",
            "give a state from after its first update in training mode",
        )
    elif movement.drift == 0 and movement.updates_since == 0:
        yield _look(
            "the same state twice: no update lies between, and the codes are equal",
            f"give an earlier state; if you trained in between, the codebook was frozen or in eval mode: {resume}",
        )
    elif movement.drift == 0:
        between = "" if movement.updates_since is None else f" in {movement.updates_since} updates"
        yield _look(f"the codes have not moved{between}", f"expected if frozen; otherwise {resume}")
    elif movement.turnover is not None and movement.turnover > TURNOVER_LOOK:
        yield _look(
            f"{100 * movement.turnover:.0f}% of the codes have changed places since (drift {movement.drift or 0:.2g})",
            "usual early in training; later raise decay, or lower the learning rate or the revival's threshold",
        )


def amount(tokens: float) -> str:
    """Format a number of tokens.

    >>> amount(8192.0), amount(0.5)
    ('8,192', '0.5')
    """
    return format(tokens, ",.0f" if tokens >= 10 else ".2g")


def _count(value: float) -> str:
    return format(value, ".0f" if value >= 100 else ".3g")


def _share(count: int, size: int, what: str = "codes") -> str:
    return f"{100 * count / size:.0f}% of the {what} ({count} of {size})"


def _power_above(value: float) -> int:
    below = _power_below(value)
    return below if below >= value else 2 * below


def _power_below(value: float) -> int:
    return 1 << max(math.frexp(value)[1] - 1, 0)
