"""Show reports: as a table in a terminal, and as a picture of one page. Imports rich and matplotlib on first use."""

import io
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import torch

from vqssl.atomic_file import write_atomically
from vqssl.health.examine import CodebookHealth, check_reports
from vqssl.health.measures import tokens_per_code
from vqssl.health.sources import printable, short_names
from vqssl.health.verdict import amount, worst

__all__ = ["canvas_for", "draw", "show"]

# ---- table ----

STYLES = {"ok": "green", "look": "yellow", "act": "bold red"}
SIDE_BY_SIDE = 4
"""Codebooks in one table: with short names they fit a terminal of 80 characters."""


def _or_dash(value: float | None, write: Callable[[float], str] = "{:.3g}".format) -> str:
    return "–" if value is None else write(value)


def _remembered(report: CodebookHealth) -> float | None:
    if report.tokens_per_step is None:
        return None
    return tokens_per_code(report.tokens_per_step, report.codebook_size, report.decay)


def _of_all(count: int, report: CodebookHealth) -> str:
    return f"{count} ({100 * count / report.codebook_size:.0f}%)"


def _if_trained(report: CodebookHealth, text: str) -> str:
    return text if report.initialized and not report.fixed else "–"


ROWS: dict[str, Callable[[CodebookHealth], str]] = {
    "part": lambda r: r.part or "–",
    "codes × width": lambda r: f"{r.codebook_size} × {r.dim}",
    "updates": lambda r: _or_dash(r.updates, str),
    "decay γ": lambda r: (
        "–" if r.fixed else f"{r.decay:g}" + (" assumed" if r.revives is None else "")
    ),  # not in a state
    "tokens a step": lambda r: _or_dash(r.tokens_per_step, amount),
    "remembered a code": lambda r: _or_dash(_remembered(r), amount),
    "usage": lambda r: _if_trained(r, f"{100 * r.usage:.0f}%"),
    "perplexity": lambda r: _if_trained(r, f"{r.perplexity:.4g} ({100 * r.perplexity / r.codebook_size:.0f}%)"),
    "dead": lambda r: _if_trained(r, _of_all(r.dead, r)),
    "dying": lambda r: _if_trained(r, _of_all(r.dying, r)),
    "effective dimension": lambda r: _or_dash(r.effective_dimension),
    "nearest pair / S": lambda r: _or_dash(r.nearest_min),
    "  median / S": lambda r: _or_dash(r.nearest_median),
    "near-duplicates": lambda r: _of_all(r.near_duplicates, r) + (f", {r.equal} equal" if r.equal else ""),
    "spread S": lambda r: _or_dash(r.spread),
    "norm ± share": lambda r: f"{r.norm:.3g} ± {100 * r.norm_spread:.0f}%",
    "drift / S": lambda r: _or_dash(r.drift),
    "turnover": lambda r: _or_dash(r.turnover, "{:.0%}".format),
}
"""Rows of the table: label, and how the value of a report is written."""

OPTIONAL_ROWS = ("part", "drift / S", "turnover")
"""Rows that need a quantiser of several codebooks, or an earlier state; left out if no report has a value."""


def show(reports: Mapping[str, CodebookHealth], *, file: IO[str] | None = None, width: int | None = None) -> None:
    """Print reports as a rich table, with the verdict and what to do.

    Distances are in units of S, the root mean square distance of the codes from their mean.

    Args:
        reports: result of :func:`vqssl.health.examine`.
        file: where to print; None is the standard output.
        width: in characters; None is that of the terminal.

    Raises:
        TypeError: ``reports`` are something else.
        ImportError: rich is not installed.

    >>> import vqssl
    >>> from vqssl.health import examine
    >>> show(examine(vqssl.EMACodebook(codebook_size=8, dim=4)), width=60)
    <BLANKLINE>
    ...
    look  codebook: not trained yet: the codes are random
    ...
    """
    check_reports(reports)
    try:
        from rich.box import SIMPLE
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text  # names and findings are plain text, whatever brackets they contain
    except ImportError as error:
        raise ImportError("the table needs rich: pip install rich, or write --json") from error
    console = Console(file=file, width=width, highlight=False)
    prefix, short = _printable_names(reports)
    names = list(reports)
    rows = {
        label: write
        for label, write in ROWS.items()
        if label not in OPTIONAL_ROWS or any(write(report) != "–" for report in reports.values())
    }
    for start in range(0, len(names), SIDE_BY_SIDE):
        shown = names[start : start + SIDE_BY_SIDE]
        table = Table(title=Text(prefix) if prefix else None, title_justify="left", box=SIMPLE)
        table.add_column("")
        for name in shown:
            table.add_column(Text(short[name]), justify="right")
        for label, write in rows.items():
            table.add_row(label, *(write(reports[name]) for name in shown))
        console.print(table)
    verdict = Table.grid(padding=(0, 2, 0, 0))
    for name, report in reports.items():
        for finding in report.findings:
            text = Text(f"{short[name]}: ", style="bold").append(finding.says, style="not bold")
            if finding.advice:
                text.append(f"\n{finding.advice}", style="not bold dim")
            verdict.add_row(Text(finding.level, style=STYLES[finding.level]), text)
    console.print(verdict)
    level = worst(finding for report in reports.values() for finding in report.findings)
    console.print(Text(f"verdict: {level}", style=STYLES[level]))


def _printable_names(reports: Mapping[str, CodebookHealth]) -> tuple[str, dict[str, str]]:
    """Return :func:`short_names` as a terminal or a picture takes them."""
    prefix, short = short_names(reports)
    return printable(prefix), {name: printable(text) for name, text in short.items()}


# ---- picture ----

COLOURS = {"ok": "#2a7f3f", "look": "#a86a00", "act": "#b3261e"}
LINE_LENGTH = 140
"""Characters in a line of the verdict."""
FLOOR = 1e-3
"""Smallest share of the fair share that is drawn; smaller ones are drawn here."""


def draw(reports: Mapping[str, CodebookHealth], path: str | Path, *, title: str = "Codebook health") -> None:
    """Write a picture of one page: usage by rank, nearest-pair distances, eigenvalues, and the verdict as text.

    Args:
        reports: result of :func:`vqssl.health.examine`.
        path: the file; its ending sets the format (``.png``, ``.pdf``, ``.svg``).
        title: of the page.

    Raises:
        TypeError: ``reports`` are something else.
        ImportError: matplotlib is not installed.
        ValueError: matplotlib has no format of that ending.
        OSError: the file cannot be written; what it held before is kept.

    >>> import vqssl
    >>> from vqssl.health import examine
    >>> draw(examine(vqssl.EMACodebook(codebook_size=8, dim=4)), "health.unknown")
    Traceback (most recent call last):
    ValueError: path must end in a format that matplotlib writes, got 'health.unknown': ...
    """
    check_reports(reports)
    prefix, short = _printable_names(reports)
    lines = _verdict_lines(reports, short)
    figure, save = canvas_for(path, (11.7, 4.9 + 0.19 * len(lines)))
    parts: Any = figure.subfigures(2, 1, height_ratios=[4.6, 0.3 + 0.19 * len(lines)])
    above, below = parts
    # parse_math=False: names and titles are not formulas, whatever dollar signs they contain.
    above.suptitle(title, x=0.01, ha="left", weight="bold", parse_math=False)
    axes = above.subplots(1, 3)
    dashes = ["-", "--", ":", "-."]
    curves = [  # each codebook looks the same in all panels
        (report, {"color": f"C{number % 10}", "linestyle": dashes[number // 10 % 4], "linewidth": 1.6})
        for number, report in enumerate(reports.values())
    ]
    _draw_usage(axes[0], curves)
    _draw_nearest(axes[1], curves)
    _draw_spectrum(axes[2], curves)
    labels = [f"{short[name]}: {_perplexity(report)}" for name, report in reports.items()]
    # With the handles given, matplotlib keeps labels that begin with an underscore, as names may.
    handles = axes[0].lines[: len(reports)]
    legend = above.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, title=prefix or None)
    for text in (*legend.get_texts(), legend.get_title()):
        text.set_parse_math(False)
    for row, (line, colour) in enumerate(lines):
        height = 1 - (row + 0.6) / (len(lines) + 1)
        below.text(0.02, height, line, color=colour, family="monospace", fontsize=9, va="center", parse_math=False)
    save()


def canvas_for(path: str | Path, size: tuple[float, float]) -> tuple[Any, Callable[[], None]]:
    """Return an empty figure, and the function that writes it to a file.

    Args:
        path: the file; its ending sets the format.
        size: in inches, width and height.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: matplotlib has no format of that ending.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the picture needs matplotlib: pip install matplotlib") from error
    path = Path(path)
    figure = Figure(figsize=size, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    if path.suffix.removeprefix(".").lower() not in canvas.get_supported_filetypes():
        raise ValueError(
            f"path must end in a format that matplotlib writes, got {str(path)!r}: write {path.stem}.png, .pdf or .svg"
        )

    def save() -> None:
        content = io.BytesIO()
        figure.savefig(content, dpi=150, format=path.suffix.removeprefix(".").lower())
        write_atomically(path, content.getvalue())

    return figure, save


Curve = tuple[CodebookHealth, dict[str, Any]]
"""A report, and the colour and dashes of its lines."""


def _perplexity(report: CodebookHealth) -> str:
    if not report.initialized:
        return "not trained yet"
    if report.fixed:
        return "fixed random codes"
    return f"perplexity {report.perplexity:.0f} of {report.codebook_size}"


def _draw_usage(axis: Any, curves: list[Curve]) -> None:
    for report, style in curves:
        shares = report.shares.sort(descending=True).values.clamp_min(FLOOR)
        rank = torch.arange(1, len(shares) + 1) / len(shares)
        axis.plot(rank.tolist(), shares.tolist(), drawstyle="steps-pre", **style)
    axis.axhline(1, color="0.6", linewidth=0.8)
    axis.text(0.99, 1, "fair share", color="0.4", fontsize=9, va="bottom", ha="right")
    for bound in sorted({report.dead_below for report, _ in curves} - {0.0}):
        axis.axhspan(FLOOR / 2, bound, color=COLOURS["act"], alpha=0.08, linewidth=0)
        axis.text(0.01, bound, "dead below", color=COLOURS["act"], fontsize=9, va="top")
    lowest = min((report.shares.min().item() for report, _ in curves), default=1)
    axis.set(
        yscale="log", xlim=(0, 1), xlabel="codes, most used first (share of K)", ylabel="tokens / fair share",
        title="Usage, and perplexity", ylim=(max(min(lowest, 0.1), FLOOR) / 2, None),
    )  # fmt: skip


def _draw_nearest(axis: Any, curves: list[Curve]) -> None:
    curves = [(report, style) for report, style in curves if len(report.nearest)]
    top = max((report.nearest.max().item() for report, _ in curves), default=1.0) * 1.02 or 1.0
    bins = 40
    for report, style in curves:
        share = torch.histc(report.nearest, bins, 0, top) / len(report.nearest)
        axis.stairs(share.tolist(), torch.linspace(0, top, bins + 1).tolist(), **style)
    axis.set(
        xlim=(0, top), xlabel="distance to the nearest other code / S", ylabel="share of codes",
        title="Nearest pairs", ylim=(0, None),
    )  # fmt: skip
    if not curves:
        _write_that_codes_are_equal(axis)


def _draw_spectrum(axis: Any, curves: list[Curve]) -> None:
    curves = [(report, style) for report, style in curves if report.effective_dimension is not None]
    for report, style in curves:
        shares = (report.eigenvalues / report.eigenvalues.sum()).clamp_min(FLOOR * 1e-2)
        axis.plot(range(1, len(shares) + 1), shares.tolist(), **style)
        axis.axvline(report.effective_dimension, color=style["color"], linewidth=0.8, alpha=0.6)
    axis.set(
        xscale="log", yscale="log", xlabel="direction (vertical line: effective dimension)",
        ylabel="share of the variance", title="Spectrum of the codes, by usage",
    )  # fmt: skip
    if curves:
        axis.set_ylim(bottom=FLOOR * 1e-1)
    else:
        _write_that_codes_are_equal(axis)


def _write_that_codes_are_equal(axis: Any) -> None:
    axis.text(0.5, 0.5, "all codes are equal", transform=axis.transAxes, ha="center", color="0.4")


def _verdict_lines(reports: Mapping[str, CodebookHealth], short: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return the lines of the verdict with their colours."""
    level = worst(finding for report in reports.values() for finding in report.findings)
    lines = [(f"verdict: {level}", COLOURS[level])]
    for name, report in reports.items():
        for finding in report.findings:
            first = f"{finding.level:<5} {short[name]}: {finding.says}"
            advice = textwrap.wrap(finding.advice, LINE_LENGTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
            wrapped = textwrap.wrap(first, LINE_LENGTH, subsequent_indent=" " * 6)
            lines += [(line, COLOURS[finding.level]) for line in wrapped] + [(line, "0.3") for line in advice]
    return lines
