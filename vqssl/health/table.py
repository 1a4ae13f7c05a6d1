"""The terminal's view: a table of measures and the verdict below it."""

from collections.abc import Callable, Mapping
from typing import IO, Any

from vqssl.health.finding import amount, worst
from vqssl.health.report import CodebookHealth
from vqssl.health.sources import short_names
from vqssl.health.use import tokens_per_code

__all__ = ["MEASURES", "show"]

COLOURS = {"ok": "green", "look": "yellow", "act": "bold red"}
SIDE_BY_SIDE = 4
"""Codebooks that one table takes: with their names shortened they fit a terminal of 80."""


def _number(value: float | None, form: str = ".3g") -> str:
    return "–" if value is None else format(value, form)


def _of(count: int, health: CodebookHealth) -> str:
    return f"{count} ({100 * count / health.codebook_size:.0f}%)"


def _if_trained(health: CodebookHealth, text: str) -> str:
    return text if health.initialized else "–"


def _amount(value: float | None) -> str:
    return "–" if value is None else amount(value)


MEASURES: dict[str, Callable[[CodebookHealth], str]] = {
    "codes × width": lambda h: f"{h.codebook_size} × {h.dim}",
    "updates": lambda h: _number(h.updates, "d"),
    "decay γ": lambda h: f"{h.decay:g}" + (" assumed" if h.revives is None else ""),  # a state does not hold it
    "tokens a step": lambda h: _amount(h.tokens_per_step),
    "remembered a code": lambda h: _amount(tokens_per_code(h)),
    "usage": lambda h: _if_trained(h, f"{100 * h.usage:.0f}%"),
    "perplexity": lambda h: _if_trained(h, f"{h.perplexity:.4g} ({100 * h.perplexity / h.codebook_size:.0f}%)"),
    "dead": lambda h: _if_trained(h, _of(h.dead, h)),
    "dying": lambda h: _if_trained(h, _of(h.dying, h)),
    "effective dimension": lambda h: _number(h.effective_dimension),
    "nearest pair / S": lambda h: _number(h.nearest_min),
    "  median / S": lambda h: _number(h.nearest_median),
    "near-duplicates": lambda h: _of(h.near_duplicates, h),
    "spread S": lambda h: _number(h.spread),
    "norm ± share": lambda h: f"{h.norm:.3g} ± {100 * h.norm_spread:.0f}%",
    "drift / S": lambda h: _number(h.drift),
    "turnover": lambda h: "–" if h.turnover is None else f"{100 * h.turnover:.0f}%",
}
"""What the table shows, in its order: label, and how a report is written there."""


def show(reports: Mapping[str, CodebookHealth], *, file: IO[str] | None = None, width: int | None = None) -> None:
    """Print reports as a rich table, with the verdict and what to do.

    Distances are in units of S, the root mean square distance of the codes from their mean.

    Args:
        reports: what :func:`vqssl.health.examine` returned.
        file: where to; None is the standard output.
        width: in characters; None asks the terminal.

    Raises:
        ImportError: rich is not installed.

    >>> import vqssl
    >>> from vqssl.health import examine
    >>> show(examine(vqssl.EMACodebook(8, 4)), width=60)
    <BLANKLINE>
    ...
    look  codebook: not trained yet: the codes are random
    ...
    """
    rich = _rich()
    console = rich["Console"](file=file, width=width, highlight=False)
    prefix, names = short_names(reports)
    listed = list(reports)
    optional = {"drift / S": "drift", "turnover": "turnover"}
    labels = [
        label
        for label in MEASURES
        if label not in optional or any(getattr(h, optional[label]) is not None for h in reports.values())
    ]
    for start in range(0, len(listed), SIDE_BY_SIDE):
        table = rich["Table"](title=rich["Text"](prefix) if prefix else None, title_justify="left", box=rich["SIMPLE"])
        table.add_column("")
        shown = listed[start : start + SIDE_BY_SIDE]
        for name in shown:
            table.add_column(rich["Text"](names[name]), justify="right")
        for label in labels:
            table.add_row(label, *(MEASURES[label](reports[name]) for name in shown))
        console.print(table)
    verdict = rich["Table"].grid(padding=(0, 2, 0, 0))
    for name in listed:
        for finding in reports[name].findings:
            text = rich["Text"](f"{names[name]}: ", style="bold").append(finding.says, style="not bold")
            if finding.advice:
                text.append(f"\n{finding.advice}", style="not bold dim")
            verdict.add_row(rich["Text"](finding.level, style=COLOURS[finding.level]), text)
    console.print(verdict)
    level = worst(finding for report in reports.values() for finding in report.findings)
    console.print(rich["Text"](f"verdict: {level}", style=COLOURS[level]))


def _rich() -> dict[str, Any]:
    try:
        from rich.box import SIMPLE
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError as error:
        raise ImportError("the table needs rich: pip install rich, or ask for --json") from error
    return {"SIMPLE": SIMPLE, "Console": Console, "Table": Table, "Text": Text}
