"""Table and picture of the sweep: `python -m examples.pretrain.ablate --report`."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from examples.pretrain.records import read_record
from examples.pretrain.reports.figure import new_figure, save_figure
from examples.pretrain.reports.outputs import Outputs
from examples.pretrain.reports.pairing import Key, device_note, key_of, pairs
from examples.pretrain.reports.text import caption, table_cell, write_text
from examples.pretrain.variants import VARIANTS

Records = dict[str, dict[Key, dict[str, Any]]]
"""Records by variant and run."""
FIRST = 3
"""Seeds below it took part in choosing which variants run again with other seeds."""


def load(folder: Path) -> list[dict[str, Any]]:
    """Return the records of a folder; an empty list if there are none."""
    return [read_record(path) for path in sorted(folder.glob("*-seed*.json"))]


def by_variant(records: Iterable[dict[str, Any]]) -> Records:
    """Return records by variant and run.

    Raises:
        ValueError: two records are of one variant, seed and device model.
    """
    found: Records = {}
    for record in records:
        runs = found.setdefault(record["variant"], {})
        key = key_of(record)
        if key in runs:
            raise ValueError(
                f"each variant must have one record a seed and device model, got two of {record['variant']}, seed "
                f"{key.seed}, on {key.device or 'an unknown model'}: give the records of one sweep"
            )
        runs[key] = record
    return {name: found[name] for name in ordered(found)}


def ordered(names: Iterable[str]) -> list[str]:
    """Return names of variants in the order of the table: random, then as in `VARIANTS`, then others by name."""
    names = set(names)
    known = [name for name in ("random", *VARIANTS) if name in names]
    return known + sorted(names - set(known))


def auc(record: dict[str, Any], share: str) -> float:
    """Return the AUC in percent, averaged over label subsets."""
    return 100 * float(np.mean(record["auc"][share]))


def interval(values: list[float]) -> str:
    """Return mean and 95% interval of the mean, by Student's t over pretraining runs."""
    mean = np.mean(values)
    if len(values) < 2:
        return f"{mean:.1f}"
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return f"{mean:.1f}\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}{half:.1f}"


def gains(records: Records, name: str, share: str, over: str = "byol") -> list[float]:
    """Return AUC differences of a variant over another, for pairs of one seed and one device model.

    The two runs of a pair started from the same weights and drew the same batches.
    """
    ours, theirs = records[name], records.get(over, {})
    return [auc(ours[a], share) - auc(theirs[b], share) for a, b in pairs(ours, theirs)]


def table(records: Records) -> str:
    """Return the table of all variants as markdown, and a sentence on the device models."""
    shares = shares_of(records)
    header = ["variant", "runs", *(f"{100 * float(share):g}%" for share in shares)]
    header += [f"over {other}, {100 * float(share):g}%" for other in ("BYOL", "full", "random") for share in shares[:2]]
    header += ["L(p, z_c)", "L(p, z_s)", "L(z_s, z_c)", "target spread", "perplexity", "dead codes"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for name in ordered(records):
        own = list(records[name].values())
        cells = [
            table_cell(name),
            str(len(own)),
            *(interval([auc(record, share) for record in own]) for share in shares),
        ]
        for other in ("byol", "full", "random"):
            for share in shares[:2]:
                gain = gains(records, name, share, other)
                # BYOL over full is full over BYOL with the other sign, which the table has already.
                shown = gain and name not in (other, "random") and (name, other) != ("byol", "full")
                cells.append(interval(gain) if shown else "–")
        lines.append("| " + " | ".join([*cells, *_figures(own)]) + " |")
    keys = [key for runs in records.values() for key in runs]
    return "\n".join(lines) + f"\n\n{device_note(keys)}\n"


def _figures(own: list[dict[str, Any]]) -> list[str]:
    """Return the cells of the last epoch: losses, spread, perplexity and dead codes."""
    cells = []
    for measure, digits in (
        ("alignment_global", 2),
        ("alignment_refined", 2),
        ("refinement", 4),
        ("target_spread", 2),
    ):
        values = [record["last_epoch"].get(measure, 0.0) for record in own]
        cells.append(f"{np.mean(values):.{digits}f}" if any(values) else "–")
    for measure in ("perplexity_", "dead_"):
        per_scale = [
            [value for key, value in record["last_epoch"].items() if key.startswith(measure)] for record in own
        ]
        cells.append(" / ".join(f"{value:.0f}" for value in np.mean(per_scale, 0)) if per_scale[0] else "–")
    return cells


def again(records: Records) -> str:
    """Return a table of the variants that ran again with other seeds than the first three; empty without any.

    It shows whether a difference that chose a variant repeats with new seeds.
    """
    names = [
        name
        for name in ordered(records)
        if name not in ("random", "byol") and max(key.seed for key in records[name]) >= FIRST
    ]
    if not names:
        return ""
    shares = shares_of(records)[:2]
    columns = [(other, share) for other in ("byol", "full") for share in shares]
    titles = [f"over {'BYOL' if other == 'byol' else other}, {100 * float(share):g}%" for other, share in columns]
    header = ["variant", *(f"{title}, {which} seeds" for title in titles for which in ("first", "other"))]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    parts = [
        {name: {key: run for key, run in runs.items() if (key.seed < FIRST) == first} for name, runs in records.items()}
        for first in (True, False)
    ]
    for name in names:
        cells = [table_cell(name)]
        for other, share in columns:
            for part in parts:
                gain = gains(part, name, share, other)
                cells.append(interval(gain) if gain and name != other else "–")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def shares_of(records: Records) -> list[str]:
    """Return the shares of labels that the records hold."""
    return list(next(iter(next(iter(records.values())).values()))["auc"])


def draw(records: Records, path: Path) -> None:
    """Draw each variant's AUC with few labels: one dot a run, and their mean."""
    names = ordered(records)
    shares = shares_of(records)[:2]
    figure = new_figure(figsize=(10, 1.2 + 0.28 * len(names)), layout="constrained")
    axes = figure.subplots(1, len(shares), sharey=True, squeeze=False)
    for ax, share in zip(axes[0], shares, strict=True):
        for row, name in enumerate(names):
            values = [auc(record, share) for record in records[name].values()]
            ax.plot(values, [row] * len(values), "o", color="tab:blue", alpha=0.45, markersize=5)
            ax.plot(np.mean(values), row, "|", color="black", markersize=14, markeredgewidth=2)
        for reference, style in (("byol", "-"), ("random", ":")):
            if reference in records:
                mean = np.mean([auc(record, share) for record in records[reference].values()])
                ax.axvline(mean, color="tab:gray", linestyle=style, zorder=0, label=f"mean of {reference}")
        ax.set(title=f"macro AUC (%) with {100 * float(share):g}% of the labels", yticks=range(len(names)))
        ax.set_yticklabels([caption(name) for name in names])
        ax.grid(alpha=0.3)
    axes[0][0].invert_yaxis()
    axes[0][0].legend(loc="lower left", fontsize=8)
    save_figure(figure, path, dpi=110)


def write(folder: Path) -> None:
    """Write `table.md`, `again.md` and `auc.png` from the records of a folder.

    Raises:
        ValueError: there are none.
        Unwritten: one of the files cannot be written; the others are.
    """
    records = by_variant(load(folder))
    if not records:
        raise ValueError(f"no runs in {folder}: give --data first")
    outputs = Outputs()
    texts = {"table.md": table(records), "again.md": again(records)}
    for name, text in texts.items():
        if text:
            print(text)
            outputs.add(partial(write_text, folder / name, text), folder / name)
    outputs.add(lambda: draw(records, folder / "auc.png"), folder / "auc.png")
    outputs.check()
