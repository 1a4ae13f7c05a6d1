"""The picture of a sweep: how far each variant is from BYOL, seed by seed, around a line at zero.

Each stroke has the number of its seed, so that a seed can be followed from variant to variant.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from examples.pretrain.reports.evaluation import interval
from examples.pretrain.reports.figure import new_figure, save_figure
from examples.pretrain.reports.judged import parts_of
from examples.pretrain.reports.pairing import pairs
from examples.pretrain.reports.sweep import Records, auc, ordered, shares_of
from examples.pretrain.reports.text import caption

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STYLES = (("C1", "o", "seeds that chose"), ("C0", "s", "seeds that judge"))
"""Color, marker and label of the two kinds of seeds."""


def draw(records: Records, path: Path, *, choosing: int = 0) -> None:
    """Draw AUC differences from BYOL with the two smallest shares of the labels.

    Args:
        records: of the sweep.
        path: of the PNG.
        choosing: seeds below it chose the variants, and are drawn apart from those that judge.
    """
    names = [name for name in ordered(records) if name not in ("byol", "random")]
    shares = shares_of(records)[:2]
    figure = new_figure(figsize=(8, 1.4 + 0.5 * len(names)), layout="constrained")
    panels = figure.subplots(1, len(shares), sharey=True, squeeze=False)[0]
    kinds = [part for part in zip(parts_of(records, choosing), STYLES, strict=True) if any(part[0].values())]
    for axes, share in zip(panels, shares, strict=True):
        axes.axvline(0, color="black", linewidth=0.8)
        for row, name in enumerate(names):
            for at, (part, style) in zip((-0.2, 0.22) if len(kinds) == 2 else (0.0,), kinds, strict=True):
                _draw_row(axes, row + at, part, name, share, style)
        axes.set_title(f"AUC over BYOL, {100 * float(share):g}% of the labels")
        axes.set_yticks(range(len(names)), [caption(name) for name in names])
        axes.set_xlabel("points")
        axes.grid()
    panels[0].set_ylim(len(names) - 0.4, -0.6)
    if len(kinds) == 2:
        for color, marker, label in STYLES:
            panels[0].plot([], [], marker, color=color, label=f"mean and 95% interval, {label}")
        figure.legend(loc="outside lower center", ncols=2)
    save_figure(figure, path, dpi=110)


def _draw_row(axes: Axes, row: float, records: Records, name: str, share: str, style: tuple[str, str, str]) -> None:
    """Draw one variant: the number of each seed where its difference lies, their mean and its interval."""
    color, marker, _ = style
    ours, theirs = records.get(name, {}), records.get("byol", {})
    found = {a: auc(ours[a], share) - auc(theirs[b], share) for a, b in pairs(ours, theirs)}
    if not found:
        return
    for key, value in found.items():
        axes.plot(value, row, "|", color=color, markersize=5)
        axes.text(value, row - 0.08, str(key.seed), fontsize=9, color="0.25", ha="center", va="bottom", clip_on=True)
    mean, half = interval([[value] for value in found.values()])
    axes.errorbar(mean, row, xerr=half, fmt=marker, color=color, alpha=0.75, capsize=2, markersize=4, zorder=3)
