"""examine: what codebooks are doing, in numbers and findings."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vqssl.checks import check_range
from vqssl.functional.usage import codebook_usage
from vqssl.health.measures import (
    code_spread,
    distinct_places,
    drift,
    dying_codes,
    effective_dimension,
    nearest_distances,
    spectrum,
    turnover,
)
from vqssl.health.report import CodebookHealth
from vqssl.health.sources import Found, find_codebooks, short_names
from vqssl.health.verdict import PLACE, judge, near_duplicate_below

__all__ = ["examine"]


def examine(
    source: nn.Module | Mapping[Any, Any],
    *,
    since: nn.Module | Mapping[Any, Any] | Mapping[str, CodebookHealth] | None = None,
    decay: float = 0.99,
    dead_below: float | None = None,
) -> dict[str, CodebookHealth]:
    """Measure all codebooks of a module or a state, and judge them. Changes nothing, and waits for the device.

    Args:
        source: any module that holds :class:`vqssl.EMACodebook` modules, wrapped or not; a state dict; or a
            checkpoint with state dicts in it. Found are those that :func:`vqssl.health.find_codebooks` finds.
        since: the same, earlier, or what this function returned for it: gives ``drift`` and ``turnover``. Codebooks are
            matched by name, or, where none is the same, by name without the prefix that all have; one and one match.
        decay: of codebooks that come as a state, which does not hold it; modules know their own.
        dead_below: a code is dead below this fraction of the fair share. None: the threshold of a module's revival;
            0.1 where there is none or a state is examined, as :meth:`vqssl.EMACodebook.usage` has it.

    Returns:
        By the dotted name of each codebook, in the order of the source; shared codebooks once.

    Raises:
        TypeError: ``source`` or ``since`` is neither module nor mapping.
        ValueError: there is no codebook in it; a codebook has no values or odd shapes; ``since`` has none of the
            codebooks, or one of another shape; ``decay`` or ``dead_below`` is outside [0, 1].

    >>> import torch, vqssl
    >>> codebook = vqssl.EMACodebook(4, 2, decay=0.9, seed=1)
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
    before = {} if since is None else _earlier(since)
    if not set(found) & set(before):
        # A part of a model next to the whole: names differ in what stands before all of them.
        ours = {short: name for name, short in short_names(found)[1].items()}
        theirs = short_names(before)[1]
        single = next(iter(found)) if len(found) == len(before) == 1 else None
        before = {single or ours.get(theirs[name], name): value for name, value in before.items()}
    if since is not None and not set(found) & set(before):
        raise ValueError(
            f"since must hold the same codebooks, got {', '.join(before)} for {', '.join(found)}: give an earlier "
            "state of the same model"
        )
    return {name: _examine_one(name, codebook, before.get(name), decay, dead_below) for name, codebook in found.items()}


def _earlier(since: Any) -> dict[str, tuple[Tensor, bool, int | None]]:
    """Codes, whether they were initialised, and updates."""
    if isinstance(since, Mapping) and since and all(isinstance(value, CodebookHealth) for value in since.values()):
        return {name: (health.codes, health.initialized, health.updates) for name, health in since.items()}
    found = find_codebooks(since)
    return {name: (codebook.embed, codebook.initialized, codebook.updates) for name, codebook in found.items()}


def _examine_one(
    name: str,
    found: Found,
    before: tuple[Tensor, bool, int | None] | None,
    decay: float,
    dead_below: float | None,
) -> CodebookHealth:
    decay = decay if found.decay is None else found.decay
    if dead_below is None:
        dead_below = 0.1 if found.threshold is None else found.threshold
    counts = found.cluster_size.detach().cpu().double()
    not_counts = int((~counts.isfinite() | (counts < 0)).sum())
    counts = counts.nan_to_num(0.0, 0.0, 0.0).clamp_min(0)  # such statistics are no use of a code
    usage = codebook_usage(counts, dead_below)
    codes = found.embed.detach()
    size, dim = codes.shape
    finite = _measurable(codes)
    sound = codes if bool(finite.all()) else codes[finite]
    geometry = _geometry(sound, counts.to(codes.device)[finite], size) if len(sound) else NO_GEOMETRY
    total = counts.sum().item()
    metric = found.metric
    if metric is None and len(sound) and _of_length_1(sound):
        metric = "cosine"
    tokens, start = _tokens(total, size, decay, found) if found.initialized else (None, None)
    health = CodebookHealth(
        codebook_size=size,
        dim=dim,
        initialized=found.initialized,
        updates=found.updates,
        decay=decay,
        revives=found.revives,
        metric=metric,
        initialization=found.initialization,
        tokens_per_step=tokens,
        start_share=start,
        dead_below=dead_below,
        perplexity=usage.perplexity.item(),
        usage=usage.fraction.item(),
        dead=int(usage.dead),
        dying=int(dying_codes(counts, dead_below)) if total else 0,
        not_finite=size - len(sound),
        not_counts=not_counts,
        codes=codes.to("cpu", copy=True),
        shares=counts / (total / size) if total else counts,
        **geometry,
    )
    if before is not None:
        health = replace(health, **_compare(name, health, *before))
    return replace(health, findings=judge(health))


def _tokens(total: float, size: int, decay: float, found: Found) -> tuple[float | None, float | None]:
    """Tokens a step, and the start share; None where they are not known."""
    if decay == 1:
        return None, None
    if found.updates is None:
        return total, None
    kept = decay**found.updates
    if found.updates == 0:
        return None, kept * size / total if total else None
    tokens = (total - kept * size) / (1 - kept)
    if tokens <= 0:
        # No update has so few: the decay is another, or somebody wrote the counts, and nothing is known of their start.
        return total, None
    return tokens, kept * size / total


LARGEST = 1e150
"""Its square, and sums of those, are float64."""


def _measurable(codes: Tensor) -> Tensor:
    """``(K,)`` bool: finite, and so are the squares in float64."""
    return codes.abs().amax(1) <= min(LARGEST, torch.finfo(codes.dtype).max)


def _of_length_1(codes: Tensor) -> bool:
    lengths = codes.float().norm(dim=1)
    # Half precision keeps three digits. In one dimension length 1 says nothing.
    return codes.shape[1] > 1 and bool(((lengths - 1).abs() < 5e-3).all())


NO_GEOMETRY: dict[str, Any] = {
    "spread": 0.0,
    "norm": 0.0,
    "norm_spread": 0.0,
    "effective_dimension": None,
    "nearest_min": None,
    "nearest_median": None,
    "near_duplicates": 0,
    "places": None,
}


def _geometry(codes: Tensor, counts: Tensor, size: int) -> dict[str, Any]:
    lengths = codes.double().norm(dim=1) if codes.device.type != "mps" else codes.cpu().double().norm(dim=1)
    norm = lengths.mean().item()
    spread = code_spread(codes).item()
    eigenvalues = spectrum(codes, counts)
    found = {
        **NO_GEOMETRY,
        "spread": spread,
        "norm": norm,
        "norm_spread": lengths.std(correction=0).item() / norm if norm > 0 else 0.0,
        "eigenvalues": eigenvalues.cpu(),
    }
    if spread > 0:
        nearest = (nearest_distances(codes) / spread).cpu()
        dimension = effective_dimension(eigenvalues).item()
        found |= {
            "effective_dimension": dimension,
            "nearest": nearest,
            "nearest_min": nearest.min().item(),
            "nearest_median": nearest.median().item(),
            "near_duplicates": int((nearest < near_duplicate_below(size, dimension)).sum()),
            "places": distinct_places(codes, PLACE * spread).item(),
        }
    elif len(codes) > 1:
        found["near_duplicates"] = len(codes)
    return found


def _compare(
    name: str, health: CodebookHealth, old: Tensor, was_initialized: bool, updates: int | None
) -> dict[str, Any]:
    old = old.detach().cpu()
    if old.shape != health.codes.shape:
        raise ValueError(
            f"since must hold codes of one shape with those examined, got {tuple(old.shape)} for "
            f"{tuple(health.codes.shape)} in {name}: give an earlier state of the same model"
        )
    known = health.updates is not None and updates is not None
    passed = health.updates - updates if known else -1  # type: ignore[operator]
    between = {"since_initialized": was_initialized, "updates_since": passed if passed >= 0 else None}
    both = _measurable(old) & _measurable(health.codes)
    if not (was_initialized and health.initialized and both.any()):
        return between  # from random codes to codes is no drift
    new, old = health.codes[both].double(), old[both].double()
    moved = drift(new, old).item()
    return {**between, "drift": moved if moved < float("inf") else None, "turnover": turnover(new, old).item()}
