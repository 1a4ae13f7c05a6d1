"""Examine codebooks: measure each one, judge the measures, and return the report."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from vqssl.checks import check_range
from vqssl.functional import codebook_usage
from vqssl.health.measures import (
    CodeMeasures,
    CountMeasures,
    MovementMeasures,
    code_spread,
    distinct_places,
    drift,
    dying_codes,
    effective_dimension,
    near_duplicate_distance,
    nearest_distances,
    spectrum,
    turnover,
)
from vqssl.health.sources import FoundCodebook, find_codebooks, short_names
from vqssl.health.verdict import Finding, Level, judge, worst
from vqssl.kernels.repeats import first_equal_rows

__all__ = ["CodebookHealth", "check_reports", "examine"]

PLACE = 0.05
"""Codes closer than this, in units of S, count as one of the ``places``: together as seen from the whole codebook."""

LARGEST = 1e150
"""Largest entry that is measured: its square, and sums of such squares, are finite in float64."""


@dataclass(frozen=True, eq=False)
class CodebookHealth:
    """Report of :func:`vqssl.health.examine` on one codebook: plain numbers, or None if there is nothing to measure.

    Geometry is that of the finite codes. It is None if all codes are equal or there is only one.

    >>> import vqssl, vqssl.health
    >>> vqssl.health.examine(vqssl.EMACodebook(codebook_size=8, dim=4))["codebook"].level
    'look'
    """

    codebook_size: int
    """K."""
    dim: int
    """D."""
    initialized: bool
    """True if the codes were initialised from data; otherwise they are random."""
    updates: int | None
    """Updates since the counts started at one each, one for each call in training mode; None if the state does not
    say, as for imported codes."""
    decay: float
    """Decay of the running counts, which remember about 1 / (1 - decay) updates."""
    revives: bool | None
    """True if dead codes are revived; None for a state, which does not say."""
    metric: str | None
    """``"euclidean"`` or ``"cosine"``. For a state: ``"cosine"`` if all codes have length 1, else None."""
    initialization: str | None
    """Class name of the initialisation, as ``"KMeansInit"``; None for a state."""
    tokens_per_step: float | None
    """Valid tokens per update, over all ranks: the sum of the running counts, without what remains of the initial
    counts of 1 (of unknown size if ``updates`` is None). None before the first update, and if the decay is 1."""
    start_share: float | None
    """Count, in units of the fair share, of a code that no token ever chose: ``decay ** updates * K / sum(N)``."""
    dead_below: float
    """tau: a code is dead below this fraction of the fair share ``sum(N) / K``."""
    perplexity: float
    """Effective number of codes in use, 1 to K (:func:`vqssl.functional.codebook_usage`)."""
    usage: float
    """Share of codes that are not dead, 0 to 1."""
    dead: int
    """Number of codes with less than ``dead_below`` of the fair share, or that equal an earlier one."""
    dying: int
    """Number of codes that are dead after 1 / (1 - decay) updates without tokens (:func:`vqssl.health.dying_codes`)."""
    not_finite: int
    """Number of codes with a NaN, an infinity, or a value whose square may overflow float64 (beyond 1e150)."""
    equal: int
    """Number of codes that equal an earlier one, which gets all their tokens. They are dead, whatever their count."""
    not_counts: int
    """Number of running counts that are NaN, infinite or negative; all measures take them as 0."""
    effective_dimension: float | None
    """Effective number of directions in which the codes spread, weighted by usage, 1 to D
    (:func:`vqssl.health.effective_dimension`)."""
    spread: float
    """S: root mean square distance of the codes from their mean (:func:`vqssl.health.code_spread`)."""
    used_spread: float
    """S of the codes that are not dead, as a dead one may lie anywhere; S itself if fewer than two are alive."""
    norm: float
    """Mean length of the codes."""
    norm_spread: float
    """Standard deviation of the lengths over their mean; 0 for the cosine metric."""
    nearest_min: float | None
    """Smallest distance between two codes, in units of S."""
    nearest_median: float | None
    """Median over codes of the distance to the nearest other one, in units of S."""
    near_duplicates: int
    """Number of codes with another one within a hundredth of the spacing of K codes in that many dimensions."""
    places: float | None
    """Effective number of places in which the codes lie, if codes within S / 20 share one: K if they are apart, m if
    they lie in m clumps (:func:`vqssl.health.distinct_places`)."""
    fixed: bool = False
    """True for the random codes of a :class:`vqssl.RandomProjectionQuantizer`, which nothing trains and whose usage
    nothing counts: ``perplexity`` and ``usage`` are those of even counts then."""
    part: str | None = None
    """Which of the codebooks of its quantiser it is, as in "level 0 of 3", "group 1 of 2" or "scale 0 of 3"; None for a
    single one, and for a state, which does not say."""
    since_initialized: bool | None = None
    """True if the earlier codes were initialised from data; None without ``since``."""
    updates_since: int | None = None
    """Updates between the two examinations; None without ``since``, if unknown, or if the count went down because codes
    were set in between."""
    drift: float | None = None
    """Root mean square distance that codes moved, in units of the earlier S (:func:`vqssl.health.drift`)."""
    turnover: float | None = None
    """Share of codes that now lie closer to another code's earlier place (:func:`vqssl.health.turnover`)."""
    findings: tuple[Finding, ...] = ()
    """The verdict, worst first; at least one finding."""
    codes: Tensor = field(repr=False, default_factory=lambda: torch.empty(0, 0))
    """``(K, D)``, a copy on the CPU, which a later ``examine(..., since=)`` compares with."""
    shares: Tensor = field(repr=False, default_factory=lambda: torch.empty(0))
    """``(K,)`` float64: the running counts in units of the fair share. Those of equal codes are added to the first."""
    nearest: Tensor = field(repr=False, default_factory=lambda: torch.empty(0))
    """``(K,)`` float64: distance of each finite code to the nearest other one, in units of S."""
    eigenvalues: Tensor = field(repr=False, default_factory=lambda: torch.empty(0))
    """``(D,)`` float64, largest first: :func:`vqssl.health.spectrum` of the codes, weighted by usage."""

    @property
    def level(self) -> Level:
        """The worst level of the findings: ``"ok"``, ``"look"`` or ``"act"``."""
        return worst(self.findings)

    def as_dict(self) -> dict[str, Any]:
        """Return all fields but the tensors, ready for ``json.dumps``, with the findings as dictionaries.

        >>> import json, vqssl, vqssl.health
        >>> codebook = vqssl.EMACodebook(codebook_size=8, dim=4)
        >>> json.loads(json.dumps(vqssl.health.examine(codebook)["codebook"].as_dict()))["perplexity"]
        8.0
        """
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        kept = {name: value for name, value in values.items() if not isinstance(value, Tensor)}
        return {**kept, "level": self.level, "findings": [finding._asdict() for finding in self.findings]}


def check_reports(reports: Any) -> None:
    """Raise TypeError unless ``reports`` are what :func:`examine` returns: a report for each name."""
    if isinstance(reports, Mapping) and all(isinstance(report, CodebookHealth) for report in reports.values()):
        return
    if isinstance(reports, CodebookHealth):
        cure = 'write {"codebook": report} for a single report'
    elif isinstance(reports, nn.Module | Mapping):
        cure = "write examine(it) in its place"
    else:
        cure = "write examine(module)"
    raise TypeError(f"reports must be the result of vqssl.health.examine, got {type(reports).__name__}: {cure}")


def examine(
    source: nn.Module | Mapping[Any, Any],
    *,
    since: nn.Module | Mapping[Any, Any] | Mapping[str, CodebookHealth] | None = None,
    decay: float = 0.99,
    dead_below: float | None = None,
) -> dict[str, CodebookHealth]:
    """Measure all codebooks of a module or a state, and judge them. Changes nothing; synchronises with the device.

    Args:
        source: a module that holds :class:`vqssl.EMACodebook` modules, wrapped or not; a state dict; or a checkpoint
            with state dicts in it. :func:`vqssl.health.find_codebooks` says which codebooks are found.
        since: the same model earlier, or what this function returned for it: adds ``drift`` and ``turnover``.
            Codebooks are matched by name; if no name is the same, by name without the prefix that all share, and a
            single codebook with a single one.
        decay: decay of codebooks in a state, which does not hold it; modules know their own.
        dead_below: a code is dead below this fraction of the fair share. None takes the threshold of a module's
            revival; 0.1 if there is none or ``source`` is a state, as :meth:`vqssl.EMACodebook.usage`.

    Returns:
        A report for the dotted name of each codebook, in the order of the source; shared codebooks once.

    Raises:
        TypeError: ``source`` or ``since`` is neither a module nor a mapping.
        ValueError: there is no codebook; a codebook has no values or another shape; ``since`` has none of the
            codebooks, or one of another shape; ``decay`` or ``dead_below`` is outside [0, 1].

    >>> import torch, vqssl
    >>> codebook = vqssl.EMACodebook(codebook_size=4, dim=2, decay=0.9, seed=1)
    >>> for _ in range(100):
    ...     _ = codebook(torch.randn(200, 2))
    >>> health = examine(codebook)["codebook"]
    >>> round(health.tokens_per_step), health.level
    (200, 'ok')
    """
    check_range("decay", decay, 0, 1, rule="the share of the old statistics that a step keeps")
    if dead_below is not None:
        check_range("dead_below", dead_below, 0, 1, rule="it is a fraction of the fair share")
    found = find_codebooks(source)
    earlier = {} if since is None else _match(_find_earlier(since), found)
    return {name: _examine(name, codebook, earlier.get(name), decay, dead_below) for name, codebook in found.items()}


def _find_earlier(since: Any) -> dict[str, FoundCodebook]:
    if isinstance(since, Mapping) and since and all(isinstance(value, CodebookHealth) for value in since.values()):
        return {name: FoundCodebook(r.codes, r.shares, r.initialized, r.updates) for name, r in since.items()}
    return find_codebooks(since)


def _match(earlier: dict[str, FoundCodebook], found: Mapping[str, FoundCodebook]) -> dict[str, FoundCodebook]:
    """Return the earlier codebooks under the names of those examined."""
    names = list(earlier)
    if not set(found) & set(earlier):  # a part of a model and the whole: names differ in a prefix that all have
        ours = {short: name for name, short in short_names(found)[1].items()}
        theirs = short_names(earlier)[1]
        single = next(iter(found)) if len(found) == len(earlier) == 1 else None
        earlier = {single or ours.get(theirs[name], name): value for name, value in earlier.items()}
    if not set(found) & set(earlier):
        raise ValueError(
            f"since must hold the same codebooks, got {', '.join(names)} for {', '.join(found)}: give an earlier state "
            "of the same model"
        )
    return earlier


def _examine(
    name: str, codebook: FoundCodebook, earlier: FoundCodebook | None, decay: float, dead_below: float | None
) -> CodebookHealth:
    embed = codebook.embed.detach()
    embed = embed.cpu() if embed.device.type == "mps" else embed  # which has no float64
    size, dim = embed.shape
    finite = _measurable(embed)
    sound = embed[finite]
    if codebook.metric is None and len(sound) and _have_length_1(sound):
        codebook = codebook._replace(metric="cosine")
    running = codebook.cluster_size.detach().cpu().double()
    broken = ~running.isfinite() | (running < 0)
    running = running.masked_fill(broken, 0.0)
    first = first_equal_rows(embed).cpu()
    running = torch.zeros_like(running).index_add_(0, first, running)  # of equal codes the first gets all tokens
    counts = _measure_counts(codebook, running, int(broken.sum()), decay, dead_below)
    codes = _measure_codes(sound, running.to(embed.device)[finite], size, counts.dead_below)
    codes = codes._replace(equal=int((first != torch.arange(size)).sum()))
    kept = embed.to("cpu", copy=True)
    movement = MovementMeasures() if earlier is None else _measure_movement(name, codebook, kept, earlier)
    return CodebookHealth(
        codebook_size=size,
        dim=dim,
        initialized=codebook.initialized,
        revives=codebook.revives,
        metric=codebook.metric,
        initialization=codebook.initialization,
        fixed=codebook.fixed,
        part=codebook.part,
        findings=judge(codebook, counts, codes, movement),
        codes=kept,
        **counts._asdict(),
        **codes._asdict(),
        **movement._asdict(),
    )


def _measure_counts(
    codebook: FoundCodebook, counts: Tensor, not_counts: int, decay: float, dead_below: float | None
) -> CountMeasures:
    """Measure the running counts ``(K,)``, of which ``not_counts`` were broken and are 0 here."""
    decay = decay if codebook.decay is None else codebook.decay
    if dead_below is None:
        dead_below = 0.1 if codebook.threshold is None else codebook.threshold
    total, size = counts.sum().item(), len(counts)
    usage = codebook_usage(counts, dead_below)
    counted = codebook.initialized and not codebook.fixed
    tokens, start = _tokens_per_step(total, size, decay, codebook.updates) if counted else (None, None)
    return CountMeasures(
        updates=codebook.updates,
        decay=decay,
        tokens_per_step=tokens,
        start_share=start,
        dead_below=dead_below,
        perplexity=usage.perplexity.item(),
        usage=usage.fraction.item(),
        dead=int(usage.dead),
        dying=int(dying_codes(counts, dead_below)) if total else 0,
        not_counts=not_counts,
        shares=counts / (total / size) if total else counts,
    )


def _tokens_per_step(total: float, size: int, decay: float, updates: int | None) -> tuple[float | None, float | None]:
    """Return tokens per step and the start share; None for what is not known."""
    if decay == 1:
        return None, None
    if updates is None:
        return total, None
    kept = decay**updates
    if updates == 0:
        return None, kept * size / total if total else None
    tokens = (total - kept * size) / (1 - kept)
    if tokens <= 0:  # impossible: the decay is another, or the counts were written by hand and their start is unknown
        return total, None
    return tokens, kept * size / total


def _measure_codes(codes: Tensor, weights: Tensor, size: int, dead_below: float) -> CodeMeasures:
    """Measure the finite codes, of ``size`` codes in all, with their running counts as weights."""
    not_finite = size - len(codes)
    if not len(codes):
        return CodeMeasures(not_finite)
    lengths = codes.double().norm(dim=1)
    norm = lengths.mean().item()
    norm_spread = lengths.std(correction=0).item() / norm if norm > 0 else 0.0
    eigenvalues = spectrum(codes, weights)
    spread = code_spread(codes).item()
    if spread == 0:
        duplicates = len(codes) if len(codes) > 1 else 0
        return CodeMeasures(
            not_finite, norm=norm, norm_spread=norm_spread, near_duplicates=duplicates, eigenvalues=eigenvalues.cpu()
        )
    used = codes[(weights > 0) & (weights >= dead_below * weights.mean())]
    dimension = effective_dimension(eigenvalues).item()
    nearest = (nearest_distances(codes) / spread).cpu()
    return CodeMeasures(
        not_finite,
        spread=spread,
        used_spread=code_spread(used).item() if len(used) > 1 else spread,
        norm=norm,
        norm_spread=norm_spread,
        near_duplicates=int((nearest < near_duplicate_distance(size, dimension)).sum()),
        effective_dimension=dimension,
        nearest_min=nearest.min().item(),
        nearest_median=nearest.median().item(),
        places=distinct_places(codes, PLACE * spread).item(),
        nearest=nearest,
        eigenvalues=eigenvalues.cpu(),
    )


def _measure_movement(name: str, codebook: FoundCodebook, codes: Tensor, earlier: FoundCodebook) -> MovementMeasures:
    old = earlier.embed.detach().cpu()
    if old.shape != codes.shape:
        raise ValueError(
            f"since must hold codes of the shape of those examined, got {tuple(old.shape)} for {tuple(codes.shape)} in "
            f"{name}: give an earlier state of the same model"
        )
    if not (earlier.initialized and codebook.initialized):
        return MovementMeasures(earlier.initialized)  # codes that replace random ones have not moved
    passed = None
    if codebook.updates is not None and earlier.updates is not None and codebook.updates >= earlier.updates:
        passed = codebook.updates - earlier.updates
    both = _measurable(old) & _measurable(codes)
    if not both.any():
        return MovementMeasures(True, passed)
    new, old = codes[both].double(), old[both].double()
    moved = drift(new, old).item()
    return MovementMeasures(True, passed, moved if moved < float("inf") else None, turnover(new, old).item())


def _measurable(codes: Tensor) -> Tensor:
    """Return which codes ``(K,)`` are finite, with squares that are finite in float64."""
    return codes.abs().amax(1) <= min(LARGEST, torch.finfo(codes.dtype).max)


def _have_length_1(codes: Tensor) -> bool:
    lengths = codes.float().norm(dim=1)
    # Half precision keeps three digits. In one dimension a length of 1 says nothing.
    return codes.shape[1] > 1 and bool(((lengths - 1).abs() < 5e-3).all())
