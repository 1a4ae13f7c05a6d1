"""What the use of the codes means: dead, dying, uneven, or too early to tell. Every threshold with its reason."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from vqssl.health.finding import Finding, Level, amount, count, power_above, power_below, share
from vqssl.health.measures import even_use

if TYPE_CHECKING:
    from vqssl.health.report import CodebookHealth

__all__ = ["tokens_per_code", "unused", "usage"]

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

SETTLED = 5.0
"""Memory lengths 1 / (1 - decay) until use has settled. A revived code enters with the fair share, and takes ln 10 of
them to lose it; on encoders that train, perplexity first falls below half of what it comes to, and lies within 15% of
that from 2 to 4 lengths on (``docs/health.md``)."""


def unused(health: CodebookHealth) -> Iterator[Finding]:
    if not health.not_counts and not health.shares.any():
        yield Finding("act", "no tokens: all running counts are 0", "check the masks, and that tokens are finite")


def usage(health: CodebookHealth) -> Iterator[Finding]:
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
            f"use codebook_size={power_below(size * remembered / FEW_TOKENS)} or less, larger batches, or a decay "
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
            f"still settling: {health.updates} updates of some {until}, perplexity {count(health.perplexity)} of "
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
            f"collapsed use: perplexity {count(health.perplexity)} of {size}",
            f"check that tokens differ, are of unit scale, and lie where the codes do; {start}{revival}if all that is "
            f"so, lower codebook_size to {power_above(max(health.perplexity, 2))}",
        )
    if few:
        return None
    if dead > DEAD_LOOK:
        level: Level = "act" if dead > DEAD_ACT else "look"
        return Finding(level, f"{share(health.dead, size)} are dead", _fewer_dead(health))
    if even < EVEN_LOOK:
        start = _start(health, "initialization=KMeansInit() starts more evenly")
        return Finding(
            "look",
            f"uneven use: perplexity {count(health.perplexity)} of {size}",
            f"codebook_size={power_above(health.perplexity)} would hold as much{start and '; ' + start}",
        )
    top = min(math.e * health.dead_below, 1.0)
    chance_dying = even_use(remembered, top)[1] - chance_dead
    if health.dying / size - chance_dying > DYING_LOOK:
        return Finding(
            "look",
            f"{share(health.dying, size)} are dying: below {top:.2f} of the fair share, and falling if idle",
            f"the data fill fewer codes than there are: lower codebook_size to {power_below(size - 1)}, or live with "
            "revivals",
        )
    return None


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
    smaller = f"lower codebook_size to {min(power_above(max(health.perplexity, 2)), health.codebook_size // 2 or 1)}"
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
