"""CodebookHealth: what was found about one codebook."""

from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from vqssl.health.finding import Finding, Level, worst

__all__ = ["CodebookHealth"]


@dataclass(frozen=True, eq=False)
class CodebookHealth:
    """What :func:`vqssl.health.examine` says of one codebook. Plain numbers; None where there is nothing to measure.

    Geometry is that of the finite codes, and None where all codes are equal or there is only one.

    >>> import vqssl, vqssl.health
    >>> vqssl.health.examine(vqssl.EMACodebook(8, 4))["codebook"].level
    'look'
    """

    codebook_size: int
    """K."""
    dim: int
    """D."""
    initialized: bool
    """Whether the codes have had their first values from data; False: they are random."""
    updates: int | None
    """How often the codes were updated since, one for each call in training mode; None where the state does not say,
    as where codes and counts were imported."""
    decay: float
    """Of the running counts: they remember some 1 / (1 - decay) updates."""
    revives: bool | None
    """Whether dead codes are revived; None where a state was examined, which does not say."""
    metric: str | None
    """``"euclidean"`` or ``"cosine"``; of a state ``"cosine"`` where all codes have length 1, else None."""
    initialization: str | None
    """Name of the class that gave the first codes, as ``"KMeansInit"``; None where a state was examined."""
    tokens_per_step: float | None
    """How many valid tokens an update has had, over all ranks: the sum of the running counts, without what the counts
    of 1 that a codebook starts with still add. Where ``updates`` is None the sum alone, which is right once the counts
    have forgotten what they started from. None before the first update, and where the decay is 1."""
    start_share: float | None
    """How much of the fair share a code still holds that no token ever chose: ``decay ** updates * K / sum(N)``."""
    dead_below: float
    """tau: a code is dead below this fraction of the fair share ``sum(N) / K``."""
    perplexity: float
    """1 to K: how many codes are in use, in effect (:func:`vqssl.functional.codebook_usage`)."""
    usage: float
    """Share of codes that are not dead, 0 to 1."""
    dead: int
    """How many codes get less than ``dead_below`` of the fair share."""
    dying: int
    """How many will be dead after another 1 / (1 - decay) updates without tokens
    (:func:`vqssl.health.dying_codes`)."""
    not_finite: int
    """How many codes hold a NaN, an infinity, or a value whose square may be one in float64 (beyond 1e150)."""
    not_counts: int
    """How many running counts are NaN, infinite or negative; taken as 0 in all that is measured."""
    effective_dimension: float | None
    """1 to D: in how many directions the codes spread, weighted by use
    (:func:`vqssl.health.effective_dimension`)."""
    spread: float
    """S: root mean square distance of the codes from their mean (:func:`vqssl.health.code_spread`)."""
    norm: float
    """Mean length of the codes."""
    norm_spread: float
    """Standard deviation of the lengths over their mean; 0 where the metric is cosine."""
    nearest_min: float | None
    """Smallest distance between two codes, in units of S."""
    nearest_median: float | None
    """Median over codes of the distance to the nearest other one, in units of S."""
    near_duplicates: int
    """How many codes have another so near that one of the two would do:
    within a hundredth of the spacing that K codes in so many dimensions have."""
    places: float | None
    """In how many places the codes lie, in effect, where what is nearer than a twentieth of S is one place: K where
    they are apart, m where they sit in m clumps (:func:`vqssl.health.distinct_places`)."""
    since_initialized: bool | None = None
    """Whether the earlier codes had their first values from data; None without ``since``."""
    updates_since: int | None = None
    """How many updates lie between the two examinations; None without ``since``, where a state does not say, or where
    codes were set in between."""
    drift: float | None = None
    """Root mean square move of the codes between the two, in units of the earlier S (:func:`vqssl.health.drift`)."""
    turnover: float | None = None
    """Share of codes that now lie nearer another code's earlier place (:func:`vqssl.health.turnover`)."""
    findings: tuple[Finding, ...] = ()
    """The verdict, worst first; never empty."""
    codes: Tensor = field(repr=False, default_factory=lambda: torch.empty(0, 0))
    """``(K, D)``, a copy on the CPU: what a later ``examine(..., since=)`` compares with."""
    shares: Tensor = field(repr=False, default_factory=lambda: torch.empty(0))
    """``(K,)`` float64: the running counts in units of the fair share."""
    nearest: Tensor = field(repr=False, default_factory=lambda: torch.empty(0))
    """``(K,)`` float64: distance to the nearest other code in units of S, of the finite codes."""
    eigenvalues: Tensor = field(repr=False, default_factory=lambda: torch.empty(0))
    """``(D,)`` float64, largest first: :func:`vqssl.health.spectrum` of the codes, weighted by use."""

    @property
    def level(self) -> Level:
        """The worst of the findings' levels: ``"ok"``, ``"look"`` or ``"act"``."""
        return worst(self.findings)

    def as_dict(self) -> dict[str, Any]:
        """Everything but the tensors, ready for ``json.dumps``: numbers, None, and the findings as dictionaries.

        >>> import json, vqssl, vqssl.health
        >>> json.loads(json.dumps(vqssl.health.examine(vqssl.EMACodebook(8, 4))["codebook"].as_dict()))["perplexity"]
        8.0
        """
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        kept = {name: value for name, value in values.items() if not isinstance(value, Tensor)}
        return {**kept, "level": self.level, "findings": [finding._asdict() for finding in self.findings]}
