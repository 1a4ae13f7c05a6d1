"""Tables and pictures of an evaluation, from the JSON of its protocols."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from scipy import stats

from examples.pretrain.protocols import PROTOCOLS, Scores
from examples.pretrain.train import differences

matplotlib.use("Agg")
from matplotlib.figure import Figure

Table = dict[str, dict[int, Scores]]
"""By encoder and pretraining seed."""
NOTE = (
    "Mean and 95% interval of the mean (Student's t): over pretraining seeds, each the mean of its label subsets; over "
    "the subsets where there is one seed. Differences are taken seed by seed and subset by subset."
)
FIRST = ("random", "byol", "dissect", "full")


def load(folder: Path) -> list[dict[str, Any]]:
    """The records of a folder.

    Raises:
        ValueError: there are none, or two do not belong in one table: they differ in the settings, in the images of
            one seed, or in what one encoder was pretrained with.
    """
    records: list[dict[str, Any]] = []
    first: dict[tuple[Any, ...], tuple[Path, Any]] = {}
    for path in sorted(folder.glob("*-seed*.json")):
        record = json.loads(path.read_text())
        pretraining = {name: part for name, part in record["pretraining"].items() if name not in ("seed", "device")}
        parts: dict[tuple[Any, ...], Any] = {
            ("settings",): record["settings"],
            ("pretraining", record["encoder"]): pretraining,
            ("checkpoint", record["encoder"], record["seed"]): record.get("checkpoint"),
        }
        parts |= {("images", record["seed"], side): value for side, value in record["images"].items()}
        for key, value in parts.items():
            other, theirs = first.setdefault(key, (path, value))
            changed = [f"{name} is {a} and {b}" for name, a, b in differences(theirs, value, key[0])]
            if changed:
                raise ValueError(f"{other} and {path} do not belong in one table: {'; '.join(changed)}")
        records.append(record)
    if not records:
        raise ValueError(f"no results in {folder}: measure something first, or give another --out")
    return records


def tables_of(records: Sequence[dict[str, Any]]) -> dict[str, Table]:
    """By protocol."""
    found: dict[str, Table] = {}
    for record in records:
        found.setdefault(record["protocol"], {}).setdefault(record["encoder"], {})[record["seed"]] = record["scores"]
    return {name: ordered(found[name]) for name in PROTOCOLS if name in found}


def ordered(table: Table) -> Table:
    names = [name for name in FIRST if name in table] + sorted(set(table) - set(FIRST))
    return {name: dict(sorted(table[name].items())) for name in names}


def interval(draws: Sequence[Sequence[float]]) -> tuple[float, float | None]:
    """Mean and half width; None where one figure alone is known. One sequence of draws for each pretraining seed."""
    values = [float(np.mean(each)) for each in draws] if len(draws) > 1 else list(draws[0])
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, None
    return mean, float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5)


def cell(draws: Sequence[Sequence[float]], digits: int) -> str:
    if not draws:
        return "–"
    mean, half = interval(draws)
    # a line is never broken within
    return f"{mean:.{digits}f}" + ("" if half is None else f"\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}{half:.{digits}f}")


def difference(a: dict[int, Scores], b: dict[int, Scores], column: str) -> list[list[float]]:
    """a - b by seed and draw, of the seeds that both have."""
    seeds = [seed for seed in a if seed in b and column in a[seed] and column in b[seed]]
    return [[x - y for x, y in zip(a[seed][column], b[seed][column], strict=True)] for seed in seeds]


def table_of(table: Table, digits: int) -> str:
    columns = list(dict.fromkeys(name for seeds in table.values() for scores in seeds.values() for name in scores))
    rows = [
        [
            name,
            str(len(seeds)),
            *(cell([s[column] for s in seeds.values() if column in s], digits) for column in columns),
        ]
        for name, seeds in table.items()
    ]
    for other in ("byol", "random"):
        for name in table:
            if other in table and name not in (other, "random"):
                shared = sum(seed in table[other] for seed in table[name])
                gains = [cell(difference(table[name], table[other], column), digits) for column in columns]
                rows.append([f"{name} over {other}", str(shared), *gains])
    return markdown(["encoder", "seeds", *columns], rows)


def gap_of(linear: Table, finetune: Table) -> str:
    """What fine-tuning adds: linear probe minus fine-tuning, of the encoders that have both; empty without any."""
    names = [name for name in linear if set(linear[name]) & set(finetune.get(name, {}))]
    if not names:
        return ""
    columns = list(next(iter(linear[names[0]].values())))
    rows = [
        [name, str(len(set(linear[name]) & set(finetune[name])))]
        + [cell(difference(linear[name], finetune[name], column), 1) for column in columns]
        for name in names
    ]
    return markdown(["encoder", "seeds", *columns], rows)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def shares_picture(tables: dict[str, Table], path: Path) -> None:
    """Curves over the share of labels or masks, for the protocols that have them."""
    curves = {
        name: table
        for name, table in tables.items()
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
    figure = Figure(figsize=(4.2 * len(panels), 3.6), layout="constrained")
    for axes, (name, part, table) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for number, (encoder, seeds) in enumerate(table.items()):
            columns = [c for c in next(iter(seeds.values())) if c.rpartition(", ")[0] == part]
            x = np.array([float(column.rpartition(", ")[2].rstrip("%")) for column in columns])
            found = [interval([scores[column] for scores in seeds.values()]) for column in columns]
            means = [mean for mean, _ in found]
            color = "#999999" if encoder == "random" else f"C{number}"
            # side by side, or the bars of two encoders hide each other
            axes.errorbar(x * 1.04**number, means, [half or 0.0 for _, half in found], color=color, label=encoder,
                          marker="o", markersize=3.5, linewidth=1.2, capsize=2)  # fmt: skip
        axes.set_xscale("log")
        axes.set_xticks(x, [f"{value:g}" for value in x], fontsize=8)
        axes.minorticks_off()
        axes.set(
            title=f"{name}{', ' if part else ''}{part}",
            xlabel="share (%) of labels" if "seg" not in name else "share (%) of masks",
        )
        axes.set_ylabel("Dice (%)" if "seg" in name else "macro AUC (%)")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def drawn(records: Sequence[dict[str, Any]]) -> list[str]:
    """How many images a share is, in words; of the first seed, since splits by patient differ by a few images."""
    found: dict[str, dict[str, int]] = {}
    for record in records:
        for kind, counts in record.get("drawn", {}).items():
            found.setdefault(kind, counts)
    return [
        f"Images with {kind}: " + ", ".join(f"{count:,} are {share}" for share, count in counts.items()) + "."
        for kind, counts in found.items()
    ]


def write(folder: Path) -> str:
    """`table.md` and `shares.png`; returns the former."""
    records = load(folder)
    tables = tables_of(records)
    parts = [NOTE, *drawn(records)]
    for name, table in tables.items():
        parts.append(f"**{PROTOCOLS[name].title}**\n\n{table_of(table, 3 if name == 'codes' else 1)}")
    gap = gap_of(tables.get("linear", {}), tables.get("finetune", {}))
    if gap:
        parts.append(f"**Linear probe minus fine-tuning (points)**\n\n{gap}")
    text = "\n\n".join(parts)
    (folder / "table.md").write_text(text)
    shares_picture(tables, folder / "shares.png")
    return text
