"""Who should train φ, ψ, α and the SERF MLP? A small comparison on real images; resumable, one JSON a run.

    python -m examples.dissect.study --data kermany_cxr_64.npz --out runs/study
    python -m examples.dissect.study --out runs/study --table docs/study.json   # only the table, from what is done

Every variant gets the same images, split, augmentations, encoder and steps; pretraining sees neither labels nor test
images. Run it twice at once with different --variants to use two cores: each process takes one.
"""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro

import vqssl
from examples.dissect.data import ImageSet, load_images, train_test_split
from examples.dissect.model import Encoder, Model
from examples.dissect.presets import PRESETS
from examples.dissect.probe import probe_encoder
from examples.dissect.train import Pretraining, Run

SMALL = PRESETS["small"][1]

VARIANTS: dict[str, tuple[str, Model]] = {
    "BYOL": ("byol", SMALL.model),
    "spatial + residual, head predicts z_c, φ fixed": ("dissect", SMALL.model),
    "channel, gradients of the alignment into head and φ (literal)": (
        "dissect",
        replace(SMALL.model, operator="channel", residual=False, refinement="align", projection="learned"),
    ),
    "spatial + residual, head predicts z_c, φ learned": ("dissect", replace(SMALL.model, projection="learned")),
    "spatial, no residual, head predicts z_c, φ fixed": ("dissect", replace(SMALL.model, residual=False)),
    "pooled codes only, head predicts z_c, φ fixed": (
        "dissect",
        replace(SMALL.model, operator="pooled", residual=False),
    ),
    "channel + residual, head predicts z_c, φ fixed": ("dissect", replace(SMALL.model, operator="channel")),
}


@dataclass(frozen=True)
class Study:
    data: Path | None = None
    """Images with labels, and groups to split by."""
    out: Path = Path("runs/study")
    variants: tuple[int, ...] = tuple(range(len(VARIANTS)))
    """Which of the variants to run, by number."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of pretraining; the split is the same for all."""
    epochs: int = SMALL.optimization.epochs
    subsets: int = 10
    """Random label subsets for each share below 100%."""
    table: Path | None = None
    """Where to write the table: this JSON, and markdown beside it."""


def main(study: Study) -> None:
    study.out.mkdir(parents=True, exist_ok=True)
    if study.data is not None:
        torch.set_num_threads(1)
        data = load_images(study.data, SMALL.image_size)
        train, test = (data.subset(index) for index in train_test_split(data))
        for seed in study.seeds:
            for number in study.variants:
                one(study, list(VARIANTS)[number], seed, train, test)
            random_encoder(study, seed, train, test)
    if study.table is not None:
        write_table(study)


def one(study: Study, name: str, seed: int, train: ImageSet, test: ImageSet) -> None:
    method, model = VARIANTS[name]
    result = study.out / f"{list(VARIANTS).index(name)}-seed{seed}.json"
    if result.exists():
        return
    optimization = replace(SMALL.optimization, epochs=study.epochs)
    config = Pretraining(method, model, SMALL.augmentation, optimization, seed)
    run = Run(train, config, study.out / result.stem)
    run.resume()
    print(f"== {name}, seed {seed}", flush=True)
    run.train()
    keep(result, name, seed, run, run.model.student.encoder, study, train, test, run.rows[-1])


def random_encoder(study: Study, seed: int, train: ImageSet, test: ImageSet) -> None:
    result = study.out / f"random-seed{seed}.json"
    if not result.exists():
        run = Run(train, Pretraining("byol", SMALL.model, optimization=SMALL.optimization, seed=seed), study.out)
        torch.manual_seed(seed)
        encoder = Encoder(train.channels, SMALL.model)
        keep(result, "random encoder", seed, run, encoder, study, train, test, {})


def keep(result: Path, name: str, seed: int, run: Run, encoder, study: Study, train, test, row: dict) -> None:
    record = {
        "variant": name,
        "seed": seed,
        "auc": probe_encoder(run, encoder, train, test, subsets=study.subsets),
        "last_epoch": row,
        "steps": run.epoch * run.steps_per_epoch,
        "config": asdict(run.config),
        "images": [len(train), len(test)],
        "versions": {"vqssl": vqssl.__version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    partial = result.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1))
    os.replace(partial, result)


def write_table(study: Study) -> None:
    assert study.table is not None
    records = [json.loads(path.read_text()) for path in sorted(study.out.glob("*-seed*.json"))]
    order = ["random encoder", *VARIANTS]
    records.sort(key=lambda record: (order.index(record["variant"]), record["seed"]))
    study.table.write_text(json.dumps(records, indent=1) + "\n")
    lines = [
        "| run | seeds | AUC 1% | 5% | 100% | L(p,z_c) | L(p,z_s) | target spread "
        "| perplexity fine / medium / coarse |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in order:
        own = [record for record in records if record["variant"] == name]
        if own:
            lines.append(row_of(name, own))
    study.table.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def row_of(name: str, records: list[dict]) -> str:
    cells = [name, str(len(records))]
    for share in ("0.01", "0.05", "1"):
        by_seed = [100 * np.mean(record["auc"][share]) for record in records]
        cells.append(" ".join(f"{value:.1f}" for value in [np.mean(by_seed)]) + _range(by_seed))
    for measure in ("alignment_global", "alignment_refined", "target_spread"):
        values = [record["last_epoch"].get(measure, 0.0) for record in records]
        cells.append(f"{np.mean(values):.2f}" if any(values) else "–")
    scales = [f"perplexity_{scale}" for scale in SMALL.model.scales]
    values = [[record["last_epoch"].get(scale, np.nan) for scale in scales] for record in records]
    cells.append("–" if np.isnan(values).any() else " / ".join(f"{value:.0f}" for value in np.mean(values, 0)))
    return "| " + " | ".join(cells) + " |"


def _range(values: list[float]) -> str:
    return f" ({min(values):.1f}–{max(values):.1f})" if len(values) > 1 else ""


if __name__ == "__main__":
    main(tyro.cli(Study))
