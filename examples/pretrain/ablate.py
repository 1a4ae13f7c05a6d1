"""The sweep over all variants; resumable, one JSON a run.

    python -m examples.pretrain.ablate --data kermany_cxr_64.npz           # all runs that are missing
    python -m examples.pretrain.ablate --data kermany_cxr_64.npz --part 0/2   # every other one: one process a core
    python -m examples.pretrain.ablate --preset demo --phantoms 5000          # on the demo's phantoms
    python -m examples.pretrain.ablate --report                            # table and picture of the finished runs

Every variant of `variants.py` gets the same images, split, augmentations, encoder, steps and probes. Pretraining sees
neither labels nor test images. A run that was killed continues from its last whole epoch.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from examples.pretrain.data import ImageSet, Reading, load_images, train_test_split
from examples.pretrain.endings import told
from examples.pretrain.phantoms import phantom_file
from examples.pretrain.presets import PRESETS, Experiment
from examples.pretrain.protocols.linear import check_labels, probe_encoder
from examples.pretrain.ranges import check_distinct, check_range, share_of
from examples.pretrain.records import provenance, rounded, write_record
from examples.pretrain.reports import differences
from examples.pretrain.reports import sweep as report
from examples.pretrain.reports.outputs import Outputs
from examples.pretrain.reports.text import any_terminal, write_text
from examples.pretrain.run_folder import refuse_among_images
from examples.pretrain.train import Run
from examples.pretrain.untrained import random_encoder
from examples.pretrain.unwritten import writing
from examples.pretrain.variants import VARIANTS

SHARES = (0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 1.0)


@dataclass(frozen=True)
class Ablation:
    """Pretrain and probe every variant with every seed."""

    data: Path | None = None
    """Images with labels, and groups to split by."""
    runs: Path = Path("runs/ablation")
    """Folder for checkpoints and logs."""
    results: Path = Path("runs/ablation")
    """Folder for the JSON of each run, and for table and picture."""
    variants: tuple[str, ...] = tuple(VARIANTS)
    """Names in `variants.py`."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of pretraining; the split is the same for all."""
    part: str = "0/1"
    """I/N: the I-th of N equal shares of the runs, for N processes at once."""
    phantoms: int | None = None
    """Number of phantoms to draw and use instead; they are kept in --runs."""
    preset: Literal["demo", "small", "paper"] = "small"
    """Encoder, augmentations, optimizer, length and starting options: those of `python3 examples PRESET`."""
    image_size: int | None = None
    """Side of the images in pixels; the preset's if left out."""
    epochs: int | None = None
    """Passes over the training images; the preset's if left out."""
    subsets: int = 10
    """Random label subsets for each share below 100%."""
    report: bool = False
    """Write table and picture."""
    reading: Annotated[Reading, tyro.conf.arg(name="")] = field(default_factory=Reading)

    @property
    def experiment(self) -> Experiment:
        """The preset, with the sizes that the command changes."""
        preset = PRESETS[self.preset][1]
        epochs = preset.optimization.epochs if self.epochs is None else self.epochs
        size = preset.image_size if self.image_size is None else self.image_size
        return replace(preset, image_size=size, optimization=replace(preset.optimization, epochs=epochs))


def main(config: Ablation) -> None:
    """Run the missing variants, and write the report if it is asked for or there are no images."""
    given = config.data is not None or config.phantoms is not None
    if given:
        sweep(config)
    if config.report or not given:
        write_report(config.results)


def sweep(config: Ablation) -> None:
    """Run every variant and seed that has no result yet.

    Raises:
        ValueError: a variant is unknown, an option is out of its range, or the labels do not suit the probes.
    """
    check_distinct("--variants", config.variants)
    check_distinct("--seeds", config.seeds)
    check_range("--subsets", config.subsets, least=1)
    for name, value in (
        ("--epochs", config.epochs),
        ("--image-size", config.image_size),
        ("--phantoms", config.phantoms),
    ):
        if value is not None:
            check_range(name, value, least=1)
    for seed in config.seeds:
        check_range("each of --seeds", seed, least=0, most=2**32 - 1)
    if config.data is not None and config.phantoms is not None:
        raise ValueError(f"--phantoms are drawn instead of --data, got both: leave out --phantoms or {config.data}")
    share, shares = share_of(config.part)
    unknown = [name for name in config.variants if name not in VARIANTS]
    if unknown:
        raise ValueError(f"variants must be of {', '.join(VARIANTS)}, got {', '.join(unknown)}")
    refuse_among_images(config.data, [config.runs, config.results])
    torch.set_num_threads(1)
    size = config.experiment.image_size
    path = config.data
    if path is None:
        assert config.phantoms is not None
        path = phantom_file(config.runs, config.phantoms, size)
    data = load_images(path, size, reading=config.reading)
    train, test = (data.subset(index) for index in train_test_split(data))
    if train.labels is None or test.labels is None:
        raise ValueError(f"{path} must hold labels for the probes, and holds none: see load_images for their place")
    check_labels(train.labels, test.labels, SHARES, config.subsets)
    with writing(config.results):
        config.results.mkdir(parents=True, exist_ok=True)
    # Seeds in the outer loop: an interrupted sweep has all variants with fewer seeds.
    todo = [(name, seed) for seed in config.seeds for name in ("random", *config.variants)]
    for number, (name, seed) in enumerate(todo):
        path = config.results / f"{name}-seed{seed}.json"
        if number % shares == share and not path.exists():
            print(f"== {number + 1}/{len(todo)}: {name}, seed {seed}", flush=True)
            write_record(path, one(name, seed, train, test, config))


def one(name: str, seed: int, train: ImageSet, test: ImageSet, config: Ablation) -> dict[str, Any]:
    """Pretrain and probe one variant, or probe an untrained encoder; return the record."""
    pretraining = replace(VARIANTS["byol" if name == "random" else name](config.experiment), seed=seed)
    run = Run(train, pretraining, config.runs / f"{name}-seed{seed}")
    encoder = run.method.encoder
    if name == "random":
        encoder = random_encoder(train.channels, pretraining.encoder, seed)
    else:
        run.resume()
        run.train()
    return {
        **provenance(command(config), pretraining.device),
        "kind": "sweep",
        "pretrained_on": run.devices,
        "variant": name,
        "seed": seed,
        "auc": rounded(probe_encoder(run, encoder, train, test, fractions=SHARES, subsets=config.subsets)),
        "last_epoch": rounded(run.rows[-1]) if run.rows else {},
        "steps": run.epoch * run.steps_per_epoch,
        "images": [len(train), len(test)],
        "image_size": config.experiment.image_size,
        "data": None if config.data is None else config.data.name,
        "config": asdict(pretraining),
    }


def write_report(folder: Path) -> None:
    """Write `table.md`, `again.md` and `differences.png` from the records of a folder.

    Raises:
        ValueError: there are none.
        Unwritten: one of the files cannot be written; the others are.
    """
    records = report.by_variant(report.load(folder))
    if not records:
        raise ValueError(f"no runs in {folder}: give --data first")
    outputs, picture = Outputs(), folder / "differences.png"
    for name, text in {"table.md": report.table(records), "again.md": report.again(records)}.items():
        if text:
            print(text)
            outputs.add(partial(write_text, folder / name, text), folder / name)
    outputs.add(lambda: differences.draw(records, picture, choosing=report.FIRST), picture)
    outputs.check()


def command(config: Ablation) -> str:
    """Return the command of the sweep that a run belongs to, with the name of the file of images."""
    default = Ablation()
    parts = ["python -m examples.pretrain.ablate"]
    for name in ("data", "phantoms", "preset", "image_size", "epochs"):
        value = getattr(config, name)
        if value != getattr(default, name):
            parts.append(f"--{name.replace('_', '-')} {value.name if isinstance(value, Path) else value}")
    return " ".join(parts)


if __name__ == "__main__":
    any_terminal()
    given = tyro.cli(Ablation, prog="python -m examples.pretrain.ablate")
    with told():
        main(given)
