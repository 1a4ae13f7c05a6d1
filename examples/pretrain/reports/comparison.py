"""Table and picture of the comparison: `python -m examples.pretrain.compare --report`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from examples.pretrain.checkpoint import write_whole
from examples.pretrain.finished_runs import UNTRAINED
from examples.pretrain.records import read_record
from examples.pretrain.reports import evaluation
from examples.pretrain.reports.evaluation import Table, cell, difference, interval, markdown
from examples.pretrain.reports.figure import new_figure, save_figure
from examples.pretrain.reports.outputs import Outputs
from examples.pretrain.reports.text import caption, write_text

Record = dict[str, Any]
PAPERS = ("FT", "LP", "LP-FT")
"""The paper's columns for each share: fine-tuning, linear probe, and the gap between them."""


def load_runs(folder: Path) -> list[Record]:
    """Return the records of all pretraining runs of a comparison.

    Raises:
        ValueError: there are none.
    """
    records = [read_record(path) for path in sorted(folder.glob("runs/*-seed*/run.json"))]
    if not records:
        raise ValueError(f"no finished runs in {folder}: run the comparison first, or give its --out")
    return records


def titles(runs: Sequence[Record]) -> dict[str, str]:
    """Return what the table calls each encoder, by name."""
    return {"random": "untrained", "imagenet": "ImageNet"} | {run["variant"]: run["title"] for run in runs}


def systems_table(runs: Sequence[Record]) -> str:
    """Return the table of methods: what was chosen, and what a run costs."""
    rows = []
    for name in dict.fromkeys(run["variant"] for run in runs):
        own = [run for run in runs if run["variant"] == name]
        first = own[0]
        chosen = ", ".join(f"{key} {_shown(value)}" for key, value in first["chosen"].items())
        seconds = np.mean([run["seconds"] for run in own])
        cells = [str(len(own)), str(first["trials"]), chosen, f"{first['steps']:,}", f"{first['forward_passes']:g}"]
        rows.append([first["title"], *cells, f"{seconds / 60:.1f}"])
    return markdown(
        ["system", "runs", "trials", "chosen", "steps", "forward passes an image and step", "minutes"], rows
    )


def _shown(value: Any) -> str:
    return " : ".join(f"{each:g}" for each in value) if isinstance(value, list) else f"{value:g}"


def papers_table(linear: Table, finetune: Table, called: dict[str, str]) -> str:
    """Return the table as the paper's Tables I to III have it: FT, LP and their gap for each share of the labels."""
    columns = list(dict.fromkeys(column for runs in linear.values() for scores in runs.values() for column in scores))
    rows = []
    for name in linear:
        cells = [called.get(name, name), str(len(linear[name]))]
        for column in columns:
            for table in (finetune, linear):
                cells.append(cell([scores[column] for scores in table.get(name, {}).values() if column in scores], 1))
            cells.append(cell(difference(linear[name], finetune.get(name, {}), column), 1))
        rows.append(cells)
    header = [f"{column}, {kind}" for column in columns for kind in PAPERS]
    return markdown(["system", "runs", *header], rows)


def draw_gap(linear: Table, finetune: Table, called: dict[str, str], path: Path) -> None:
    """Draw linear probe, fine-tuning and their gap with the smallest share of labels, one row a system."""
    names = list(linear)
    column = next(iter(next(iter(linear[names[0]].values()))))
    figure = new_figure(figsize=(8, 1.2 + 0.28 * len(names)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for row, name in enumerate(names):
        # Side by side, so that neither interval hides the other.
        parts = (("linear probe", linear, "C0", -0.15), ("fine-tuning", finetune, "C1", 0.15))
        for label, table, color, beside in parts:
            draws = [scores[column] for scores in table.get(name, {}).values()]
            if draws:
                mean, half = interval(draws)
                left.errorbar(
                    mean, row + beside, xerr=half, fmt="o", color=color, label=label if row == 0 else None, capsize=2
                )
        gaps = difference(linear[name], finetune.get(name, {}), column)
        if gaps:
            mean, half = interval(gaps)
            right.errorbar(mean, row, xerr=half, fmt="o", color="black", capsize=2)
    left.set_yticks(range(len(names)), [caption(called.get(name, name)) for name in names])
    left.invert_yaxis()
    left.set(title=f"macro AUC (%) with {column} of the labels")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower left", ncols=2)
    right.set(title="linear probe minus fine-tuning (points)")
    right.axvline(0, color="tab:gray", linewidth=0.8)
    for axes in (left, right):
        axes.grid()
    save_figure(figure, path, dpi=110)


def lines(runs: Sequence[Record], results: Sequence[Record]) -> list[Record]:
    """Return one record a run with its scores by protocol; untrained encoders have one for each seed."""
    scores: dict[tuple[str, int], dict[str, Any]] = {}
    for result in results:
        scores.setdefault((result["encoder"], result["seed"]), {})[result["protocol"]] = result["scores"]
    found = [{**run, "scores": scores.pop((run["variant"], run["seed"]), {})} for run in runs]
    keys = ("command", "date", "commit", "device", "cores", "versions")
    for name, seed in sorted(key for key in scores if key[0] in UNTRAINED):
        first = next(result for result in results if (result["encoder"], result["seed"]) == (name, seed))
        about = {key: first[key] for key in keys}
        own = {"pretrained_on": [], "kind": "comparison", "variant": name, "title": titles(())[name], "seed": seed}
        found.append({**about, **own, "scores": scores[name, seed]})
    return found


def write(folder: Path, outputs: Outputs) -> str:
    """Write `table.md`, `runs.jsonl` and pictures from the records of a folder; return the text of the first.

    Args:
        folder: of the records.
        outputs: collects what cannot be written.

    Raises:
        ValueError: there are no finished runs, or no results.
    """
    runs = load_runs(folder)
    results = evaluation.load(folder / "evaluation")
    called = titles(runs)
    tables = evaluation.tables_of(results)
    parts = [f"**Systems**\n\n{systems_table(runs)}"]
    linear, finetune = tables.get("linear", {}), tables.get("finetune", {})
    if linear:
        about = "Macro AUC (%) by share of the labels: fine-tuning (FT), linear probe (LP), and LP-FT (points)"
        parts.append(f"**{about}**\n\n{papers_table(linear, finetune, called)}")
        outputs.add(lambda: draw_gap(linear, finetune, called, folder / "gap.png"), folder / "gap.png")
    parts.append(evaluation.tables(results))
    outputs.add(lambda: evaluation.draw_shares(results, folder / "shares.png", called), folder / "shares.png")
    text = "\n".join(parts)
    outputs.add(lambda: write_text(folder / "table.md", text), folder / "table.md")
    jsonl = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines(runs, results))
    outputs.add(lambda: write_whole(folder / "runs.jsonl", jsonl.encode()), folder / "runs.jsonl")
    return text
