"""Tables and picture of an evaluation: `python -m examples.pretrain.evaluate --report`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from examples.pretrain.checkpoint import differences
from examples.pretrain.protocols import PROTOCOLS, Scores
from examples.pretrain.records import read_record
from examples.pretrain.reports.figure import new_figure, save_figure
from examples.pretrain.reports.outputs import Outputs
from examples.pretrain.reports.pairing import Key, device_note, key_of, order_of, pairs
from examples.pretrain.reports.text import caption, table_cell, write_text

Table = dict[str, dict[Key, Scores]]
"""Scores by encoder and run."""
NOTE = (
    "Mean and 95% interval of the mean (Student's t). With several pretraining runs, the interval is over runs, each "
    "the mean of its label subsets; with one run it is over its subsets. Differences are taken run by run and subset "
    "by subset."
)
MARKERS = "osD^vPX"
LINES = ("-", "--", ":")
"""Of the first, second and third encoders that share a colour and a marker."""
FIRST = ("random", "imagenet", "byol", "dissect", "full", "dissect_codes", "anchors")
"""Encoders that come first in a table."""


def load(folder: Path) -> list[dict[str, Any]]:
    """Return the records of a folder.

    Raises:
        ValueError: there are none, or two do not belong in one table.
    """
    records = [read_record(path) for path in sorted(folder.glob("*-seed*.json"))]
    if not records:
        raise ValueError(f"no results in {folder}: measure something first, or give another --out")
    check_together(records)
    return records


def check_together(records: Iterable[dict[str, Any]]) -> None:
    """Raise ValueError unless all records belong in one table.

    They must have the same settings, the same images for each seed, the same pretraining for each encoder, and the same
    checkpoint for each run.
    """
    first: dict[tuple[Any, ...], tuple[str, Any]] = {}
    for record in records:
        name = f"{record['protocol']} of {record['encoder']}, seed {record['seed']}"
        pretraining = {key: part for key, part in record["pretraining"].items() if key not in ("seed", "device")}
        parts: dict[tuple[Any, ...], Any] = {
            ("settings",): record["settings"],
            ("pretraining", record["encoder"]): pretraining,
            ("checkpoint", record["encoder"], key_of(record)): record.get("checkpoint"),
        }
        parts |= {("images", record["seed"], side): value for side, value in record["images"].items()}
        for key, value in parts.items():
            other, theirs = first.setdefault(key, (name, value))
            changed = [f"{entry} is {a} and {b}" for entry, a, b in differences(theirs, value, key[0])]
            if changed:
                raise ValueError(f"{other} and {name} do not belong in one table: {'; '.join(changed)}")


def tables_of(records: Iterable[dict[str, Any]]) -> dict[str, Table]:
    """Return a table for each protocol."""
    found: dict[str, Table] = {}
    for record in records:
        found.setdefault(record["protocol"], {}).setdefault(record["encoder"], {})[key_of(record)] = record["scores"]
    return {name: ordered(found[name]) for name in PROTOCOLS if name in found}


def ordered(table: Table) -> Table:
    """Return the table with the usual encoders first and runs by seed."""
    names = [name for name in FIRST if name in table] + sorted(set(table) - set(FIRST))
    return {name: {key: table[name][key] for key in sorted(table[name], key=order_of)} for name in names}


def interval(draws: Sequence[Sequence[float]]) -> tuple[float, float | None]:
    """Return mean and half width of the 95% interval; None as half width of a single figure.

    Args:
        draws: one sequence of label subsets for each pretraining run.
    """
    values = [float(np.mean(each)) for each in draws] if len(draws) > 1 else list(draws[0])
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, None
    return mean, float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5)


def cell(draws: Sequence[Sequence[float]], digits: int) -> str:
    """Return the text of a cell of the table."""
    if not draws:
        return "–"
    mean, half = interval(draws)
    # Without line breaks inside.
    return f"{mean:.{digits}f}" + ("" if half is None else f"\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}{half:.{digits}f}")


def difference(a: dict[Key, Scores], b: dict[Key, Scores], column: str) -> list[list[float]]:
    """Return a - b by draw, for each pair of runs with one seed and one device model that have the column."""
    return [
        [x - y for x, y in zip(a[ours][column], b[theirs][column], strict=True)]
        for ours, theirs in pairs(a, b)
        if column in a[ours] and column in b[theirs]
    ]


def table_of(table: Table, digits: int) -> str:
    """Return one protocol's table as markdown: scores of all encoders, then differences to BYOL and to random."""
    columns = list(dict.fromkeys(name for runs in table.values() for scores in runs.values() for name in scores))
    rows = [
        [
            name,
            str(len(runs)),
            *(cell([scores[column] for scores in runs.values() if column in scores], digits) for column in columns),
        ]
        for name, runs in table.items()
    ]
    for other in ("byol", "random"):
        for name in table:
            if other in table and name not in (other, "random"):
                shared = len(pairs(table[name], table[other]))
                gains = [cell(difference(table[name], table[other], column), digits) for column in columns]
                rows.append([f"{name} over {other}", str(shared), *gains])
    return markdown(["encoder", "runs", *columns], rows)


def upright_table(table: Table, digits: int, other: str = "byol") -> str:
    """Return one protocol's table as markdown, a row for each figure: scores of all encoders, then differences."""
    figures = list(dict.fromkeys(name for runs in table.values() for scores in runs.values() for name in scores))
    gains = [name for name in table if other in table and name not in (other, "random")]
    rows = [
        [
            figure,
            *(
                cell([scores[figure] for scores in runs.values() if figure in scores], digits)
                for runs in table.values()
            ),
            *(cell(difference(table[name], table[other], figure), digits) for name in gains),
        ]
        for figure in figures
    ]
    return markdown(["", *table, *(f"{name} over {other}" for name in gains)], rows)


def gap_of(linear: Table, finetune: Table) -> str:
    """Return the table of linear probe minus fine-tuning, for encoders with both; empty without any."""
    shared = {name: len(pairs(linear[name], finetune.get(name, {}))) for name in linear}
    names = [name for name, count in shared.items() if count]
    if not names:
        return ""
    columns = list(next(iter(linear[names[0]].values())))
    rows = [
        [name, str(shared[name])] + [cell(difference(linear[name], finetune[name], column), 1) for column in columns]
        for name in names
    ]
    return markdown(["encoder", "runs", *columns], rows)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a markdown table; header and first column may hold names from the data."""
    lines = ["| " + " | ".join(map(table_cell, header)) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join([table_cell(row[0]), *row[1:]]) + " |" for row in rows]) + "\n"


def drawn(records: Iterable[dict[str, Any]]) -> list[str]:
    """Return sentences with the number of images in each share, of the first seed: splits differ by a few images."""
    found: dict[str, dict[str, int]] = {}
    for record in records:
        for kind, counts in record.get("drawn", {}).items():
            found.setdefault(kind, counts)
    return [
        f"Images with {kind}: " + ", ".join(f"{count:,} are {share}" for share, count in counts.items()) + "."
        for kind, counts in found.items()
    ]


def tables(records: Sequence[dict[str, Any]]) -> str:
    """Return the tables of all protocols as markdown.

    Raises:
        ValueError: two records do not belong in one table.
    """
    check_together(records)
    by_protocol = tables_of(records)
    runs = {(record["encoder"], key_of(record)) for record in records}
    parts = [NOTE, device_note(key for _, key in runs), *drawn(records)]
    for name, table in by_protocol.items():
        parts.append(f"**{PROTOCOLS[name].title}**\n\n{table_of(table, 3 if name == 'codes' else 1)}")
    gap = gap_of(by_protocol.get("linear", {}), by_protocol.get("finetune", {}))
    if gap:
        parts.append(f"**Linear probe minus fine-tuning (points)**\n\n{gap}")
    return "\n\n".join(parts)


def draw_shares(records: Iterable[dict[str, Any]], path: Path, called: Mapping[str, str] | None = None) -> None:
    """Draw curves over the share of labels or masks, for the protocols that have them; nothing without any.

    Args:
        records: the results.
        path: of the picture.
        called: what the picture calls encoders, by name; the others have their names.
    """
    called = called or {}
    curves = {
        name: table
        for name, table in tables_of(records).items()
        if all(column.endswith("%") for seeds in table.values() for scores in seeds.values() for column in scores)
    }
    panels = [
        (name, part, table)
        for name, table in curves.items()
        for part in dict.fromkeys(
            column.rpartition(", ")[0] for seeds in table.values() for scores in seeds.values() for column in scores
        )
    ]
    if not panels:
        return
    lines, across = -(-len(panels) // 2), min(len(panels), 2)
    figure = new_figure(figsize=(3.3 * across + 2.0, 3.0 * lines), layout="constrained")
    grid = figure.subplots(lines, across, squeeze=False).ravel()
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    for axes, (name, part, table) in zip(grid, panels, strict=False):
        step = min(1.04, 1.3 ** (1 / len(table)))
        for number, (encoder, seeds) in enumerate(table.items()):
            columns = [c for c in next(iter(seeds.values())) if c.rpartition(", ")[0] == part]
            x = np.array([float(column.rpartition(", ")[2].rstrip("%")) for column in columns])
            found = [interval([scores[column] for scores in seeds.values()]) for column in columns]
            means = [mean for mean, _ in found]
            color = "#999999" if encoder == "random" else f"C{number}"
            # Shifted, so that the bars of two encoders do not overlap.
            axes.errorbar(
                x * step**number,
                means,
                [half or 0.0 for _, half in found],
                color=color,
                label=caption(called.get(encoder, encoder)),
                marker=MARKERS[number % len(MARKERS)],
                linestyle=LINES[number // len(MARKERS) % len(LINES)],
                markerfacecolor=color if number < len(MARKERS) else "white",
                markersize=4.5,
                linewidth=1.2,
                capsize=2,
            )
        axes.set_xscale("log")
        axes.set_xticks(x, [f"{value:g}" for value in x])
        axes.minorticks_off()
        axes.set(
            title=f"{name}{', ' if part else ''}{caption(part)}",
            xlabel="share (%) of labels" if "seg" not in name else "share (%) of masks",
        )
        axes.set_ylabel("Dice (%)" if "seg" in name else "macro AUC (%)")
        axes.grid()
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper")
    save_figure(figure, path, dpi=110)


def write(folder: Path, outputs: Outputs) -> str:
    """Write `table.md` and `shares.png` from the records of a folder; return the text of the former.

    Args:
        folder: of the records.
        outputs: collects what cannot be written.
    """
    records = load(folder)
    text = tables(records)
    outputs.add(lambda: write_text(folder / "table.md", text), folder / "table.md")
    outputs.add(lambda: draw_shares(records, folder / "shares.png"), folder / "shares.png")
    return text
