"""One page that shows how codes are used and where they lie."""

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vqssl.health.finding import worst
from vqssl.health.report import CodebookHealth
from vqssl.health.sources import short_names

__all__ = ["draw"]

COLOURS = {"ok": "#2a7f3f", "look": "#a86a00", "act": "#b3261e"}
LINES = 140
"""Characters a line of the verdict."""
FLOOR = 1e-3
"""Shares of the fair share and eigenvalues below are drawn here."""


def draw(reports: Mapping[str, CodebookHealth], path: str | Path, *, title: str = "Codebook health") -> None:
    """Write a one-page picture of reports: use by rank, nearest-pair distances, eigenvalues, and the verdict as text.

    Args:
        reports: what :func:`vqssl.health.examine` returned.
        path: the file; its ending says the format (``.png``, ``.pdf``, ``.svg``).
        title: of the page.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: matplotlib knows no format of that ending.

    >>> import vqssl
    >>> from vqssl.health import examine
    >>> draw(examine(vqssl.EMACodebook(8, 4)), "health.unknown")
    Traceback (most recent call last):
    ValueError: path must end in a format that matplotlib writes, got 'health.unknown': ...
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the picture needs matplotlib: pip install matplotlib") from error
    path = Path(path)
    lines = _verdict(reports)
    figure = Figure(figsize=(11.7, 4.9 + 0.19 * len(lines)), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    if path.suffix.removeprefix(".").lower() not in canvas.get_supported_filetypes():
        raise ValueError(
            f"path must end in a format that matplotlib writes, got {str(path)!r}: write {path.stem}.png, .pdf or .svg"
        )
    parts: Any = figure.subfigures(2, 1, height_ratios=[4.6, 0.3 + 0.19 * len(lines)])
    above, below = parts
    # Names and titles are no formulas, whatever dollars they hold.
    above.suptitle(title, x=0.01, ha="left", weight="bold", parse_math=False)
    axes = above.subplots(1, 3)
    _use(axes[0], reports)
    _nearest(axes[1], reports)
    _spectrum(axes[2], reports)
    prefix, _ = short_names(reports)
    # Matplotlib leaves out labels that begin with an underscore, as names may, unless it is handed them.
    handles = axes[0].lines[: len(reports)]
    labels = [handle.get_label() for handle in handles]
    legend = above.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, title=prefix or None)
    for text in (*legend.get_texts(), legend.get_title()):
        text.set_parse_math(False)
    for row, (text, colour) in enumerate(lines):
        height = 1 - (row + 0.6) / (len(lines) + 1)
        below.text(0.02, height, text, color=colour, family="monospace", fontsize=9, va="center", parse_math=False)
    figure.savefig(path, dpi=150)


def _lines(reports: Mapping[str, CodebookHealth]) -> list[tuple[str, CodebookHealth, dict[str, Any]]]:
    """Name, report and how it is drawn: alike in all panels."""
    _, names = short_names(reports)
    styles = ["-", "--", ":", "-."]
    return [
        (names[name], report, {"color": f"C{number % 10}", "linestyle": styles[number // 10 % 4], "linewidth": 1.6})
        for number, (name, report) in enumerate(reports.items())
    ]


def _use(axis: Any, reports: Mapping[str, CodebookHealth]) -> None:
    for name, report, style in _lines(reports):
        shares = report.shares.sort(descending=True).values.clamp_min(FLOOR)
        rank = torch.arange(1, len(shares) + 1) / len(shares)
        said = (
            f"perplexity {report.perplexity:.0f} of {report.codebook_size}" if report.initialized else "not trained yet"
        )
        label = f"{name}: {said}"
        axis.plot(rank.tolist(), shares.tolist(), drawstyle="steps-pre", label=label, **style)
    axis.axhline(1, color="0.6", linewidth=0.8)
    axis.text(0.99, 1, "fair share", color="0.4", fontsize=8, va="bottom", ha="right")
    for bound in sorted({report.dead_below for report in reports.values()} - {0.0}):
        axis.axhspan(FLOOR / 2, bound, color=COLOURS["act"], alpha=0.08, linewidth=0)
        axis.text(0.01, bound, "dead below", color=COLOURS["act"], fontsize=8, va="top")
    axis.set(
        yscale="log", xlim=(0, 1), xlabel="codes, most used first (share of K)", ylabel="tokens / fair share",
        title="Use, and perplexity", ylim=(min(FLOOR / 2, 1), None),
    )  # fmt: skip
    lowest = min((report.shares.min().item() for report in reports.values()), default=1)
    axis.set_ylim(bottom=max(min(lowest, 0.1) / 2, FLOOR / 2))


def _nearest(axis: Any, reports: Mapping[str, CodebookHealth]) -> None:
    drawn = [(report, style) for _, report, style in _lines(reports) if len(report.nearest)]
    top = max((report.nearest.max().item() for report, _ in drawn), default=1.0) * 1.02 or 1.0
    for report, style in drawn:
        bins = 40
        share = torch.histc(report.nearest, bins, 0, top) / len(report.nearest)
        edges = torch.linspace(0, top, bins + 1)
        axis.stairs(share.tolist(), edges.tolist(), **style)
    axis.set(
        xlim=(0, top), xlabel="distance to the nearest other code / S", ylabel="share of codes",
        title="Nearest pairs", ylim=(0, None),
    )  # fmt: skip
    if not drawn:
        _say_nothing(axis)


def _spectrum(axis: Any, reports: Mapping[str, CodebookHealth]) -> None:
    drawn = [(report, style) for _, report, style in _lines(reports) if report.effective_dimension is not None]
    for report, style in drawn:
        shares = (report.eigenvalues / report.eigenvalues.sum()).clamp_min(FLOOR * 1e-2)
        where = range(1, len(shares) + 1)
        axis.plot(where, shares.tolist(), **style)
        axis.axvline(report.effective_dimension, color=style["color"], linewidth=0.8, alpha=0.6)
    axis.set(
        xscale="log", yscale="log", xlabel="direction (upright: effective dimension)", ylabel="share of the variance",
        title="Spectrum of the codes, by use",
    )  # fmt: skip
    if drawn:
        axis.set_ylim(bottom=FLOOR * 1e-1)
    else:
        _say_nothing(axis)


def _say_nothing(axis: Any) -> None:
    axis.text(0.5, 0.5, "all codes are equal", transform=axis.transAxes, ha="center", color="0.4")


def _verdict(reports: Mapping[str, CodebookHealth]) -> list[tuple[str, str]]:
    _, names = short_names(reports)
    level = worst(finding for report in reports.values() for finding in report.findings)
    lines = [(f"verdict: {level}", COLOURS[level])]
    for name, report in reports.items():
        for finding in report.findings:
            first = f"{finding.level:<5} {names[name]}: {finding.says}"
            lines += [(line, COLOURS[finding.level]) for line in textwrap.wrap(first, LINES, subsequent_indent=" " * 6)]
            advice = textwrap.wrap(finding.advice, LINES, initial_indent=" " * 6, subsequent_indent=" " * 6)
            lines += [(line, "0.3") for line in advice]
    return lines
