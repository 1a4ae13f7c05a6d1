"""The sweep's table and picture, from the runs that are there: `python -m examples.pretrain.ablate --report`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from scipy import stats

Records = dict[str, dict[int, dict[str, Any]]]
FIRST = 3
"""Seeds below it had a part in choosing what is run again with others."""


def load(folder: Path) -> Records:
    """Records by variant and seed."""
    found: Records = {}
    for path in sorted(folder.glob("*-seed*.json")):
        record = json.loads(path.read_text())
        found.setdefault(record["variant"], {})[record["seed"]] = record
    return found


def auc(record: dict[str, Any], share: str) -> float:
    """Percent, the mean over label subsets."""
    return 100 * float(np.mean(record["auc"][share]))


def interval(values: list[float]) -> str:
    """Mean and 95% interval of the mean by Student's t over pretraining seeds."""
    mean = np.mean(values)
    if len(values) < 2:
        return f"{mean:.1f}"
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return f"{mean:.1f}\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}{half:.1f}"  # a line is never broken within


def gains(records: Records, name: str, share: str, over: str = "byol") -> list[float]:
    """Of a variant over another by seed: both drew the same first weights and batches."""
    seeds = sorted(set(records[name]) & set(records.get(over, {})))
    return [auc(records[name][seed], share) - auc(records[over][seed], share) for seed in seeds]


def table(records: Records) -> str:
    shares = list(next(iter(next(iter(records.values())).values()))["auc"])
    header = ["variant", "seeds", *(f"{100 * float(share):g}%" for share in shares)]
    header += [f"over {other}, {100 * float(share):g}%" for other in ("BYOL", "full", "random") for share in shares[:2]]
    header += ["L(p, z_c)", "L(p, z_s)", "L(z_s, z_c)", "target spread", "perplexity", "dead codes"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for name in order(records):
        own = list(records[name].values())
        cells = [name, str(len(own)), *(interval([auc(record, share) for record in own]) for share in shares)]
        for other in ("byol", "full", "random"):
            for share in shares[:2]:
                gain = gains(records, name, share, other)
                # BYOL beside full is full beside BYOL, and is there already
                told = gain and name not in (other, "random") and (name, other) != ("byol", "full")
                cells.append(interval(gain) if told else "–")
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
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def again(records: Records) -> str:
    """Of variants run again with other seeds than the first three: does a difference come back? Empty without any."""
    names = [name for name in order(records) if name not in ("random", "byol") and max(records[name]) >= FIRST]
    if not names:
        return ""
    shares = list(next(iter(records[names[0]].values()))["auc"])[:2]
    columns = [(other, share) for other in ("byol", "full") for share in shares]
    titles = [f"over {'BYOL' if other == 'byol' else other}, {100 * float(share):g}%" for other, share in columns]
    header = ["variant", *(f"{title}, {which} seeds" for title in titles for which in ("first", "other"))]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    parts = [
        {name: {seed: run for seed, run in runs.items() if (seed < FIRST) == first} for name, runs in records.items()}
        for first in (True, False)
    ]
    for name in names:
        cells = [name]
        for other, share in columns:
            for part in parts:
                gain = gains(part, name, share, other)
                cells.append(interval(gain) if gain and name != other else "–")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def order(records: Records) -> list[str]:
    from examples.pretrain.ablate import VARIANTS

    return [name for name in ("random", *VARIANTS) if name in records]


def draw(records: Records, path: Path) -> None:
    """Each variant's AUC with few labels: a dot a seed, and their mean."""
    names = order(records)
    shares = list(next(iter(records[names[0]].values()))["auc"])[:2]
    figure, axes = plt.subplots(
        1, len(shares), figsize=(10, 1.2 + 0.28 * len(names)), sharey=True, constrained_layout=True, squeeze=False
    )
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
        ax.set_yticklabels(names)
        ax.grid(alpha=0.3)
    axes[0][0].invert_yaxis()
    axes[0][0].legend(loc="lower left", fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write(folder: Path) -> None:
    records = load(folder)
    if not records:
        raise SystemExit(f"error: no runs in {folder}: give --data first")
    texts = {"table.md": table(records), "again.md": again(records)}
    for name, text in texts.items():
        if text:
            (folder / name).write_text(text)
            print(text)
    draw(records, folder / "auc.png")
