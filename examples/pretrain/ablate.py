"""Table V and the open choices of the method as one sweep on real images; resumable, one JSON a run.

    python -m examples.pretrain.ablate --data kermany_cxr_64.npz           # all runs that are not there yet
    python -m examples.pretrain.ablate --data kermany_cxr_64.npz --part 0/2   # every other one: a process a core
    python -m examples.pretrain.ablate --report                            # table and picture of what is done

Every variant gets the same images, split, augmentations, encoder, steps and probes; pretraining sees neither labels nor
test images. A run that was killed goes on from its last whole epoch.
"""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro

import vqssl
from examples.pretrain.data import ImageSet, load_images, train_test_split
from examples.pretrain.model import Encoder, Model
from examples.pretrain.presets import PRESETS
from examples.pretrain.probe import probe_encoder
from examples.pretrain.train import Pretraining, Run, write_whole

SMALL = PRESETS["small"][1]
FULL = SMALL.model
RESULTS = Path(__file__).resolve().parents[2] / "docs" / "ablation"
SHARES = (0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 1.0)


def dissect(**changes: Any) -> tuple[str, Model]:
    return "dissect", replace(FULL, **changes)


VARIANTS: dict[str, tuple[str, Model]] = {
    # The paper's Table V, and BYOL.
    "byol": ("byol", FULL),
    "full": dissect(),
    "no-serf": dissect(operator="concat"),
    "no-mlp": dissect(serf_mlp=False),
    "coarse-only": dissect(scales=("layer4",)),
    "medium-only": dissect(scales=("layer3",)),
    "fine-only": dissect(scales=("layer2",)),
    "only-z_c": dissect(target_weights=(1.0, 0.0)),
    "only-z_s": dissect(target_weights=(0.0, 1.0)),
    "no-momentum": dissect(teacher_momentum=0.0, teacher_final_momentum=0.0),
    # Readings of Eq. 6, with and without z_c added.
    "spatial-no-residual": dissect(residual=False),
    "channel": dissect(operator="channel"),
    "channel-no-residual": dissect(operator="channel", residual=False),
    "batch": dissect(operator="batch"),
    "batch-no-residual": dissect(operator="batch", residual=False),
    "pooled-no-residual": dissect(operator="pooled", residual=False),
    # Who trains phi, psi, alpha and the MLP.
    "literal": dissect(operator="channel", residual=False, refinement="align", projection="learned"),
    "align": dissect(refinement="align"),
    "detached": dissect(refinement="detached"),
    "phi-learned": dissect(projection="learned"),
    "phi-learned-no-norm": dissect(projection="linear"),
    "phi-learned-no-mlp": dissect(projection="learned", serf_mlp=False),
    # Codebooks and teacher.
    "eq-1": dissect(ema="batch_mean"),
    "cosine": dissect(metric="cosine"),
    "shared": dissect(shared_codebook=True),
    "student-features": dissect(quantize="student"),
    "buffers-copy": dissect(teacher_buffers="copy"),
    "buffers-own": dissect(teacher_buffers="own"),
}


@dataclass(frozen=True)
class Ablation:
    data: Path | None = None
    """Images with labels, and groups to split by."""
    runs: Path = Path("runs/ablation")
    """Where checkpoints and logs go."""
    results: Path = RESULTS
    """Where each run's JSON goes."""
    variants: tuple[str, ...] = tuple(VARIANTS)
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of pretraining; the split is the same for all."""
    part: str = "0/1"
    """I/N: the I-th of N equal shares of the runs, for N processes at once."""
    image_size: int = SMALL.image_size
    subsets: int = 10
    """Random label subsets for each share below 100%."""
    report: bool = False
    """Only table and picture."""


def main(config: Ablation) -> None:
    if config.data is not None:
        sweep(config)
    if config.report or config.data is None:
        from examples.pretrain import ablation_report

        ablation_report.write(config.results)


def sweep(config: Ablation) -> None:
    assert config.data is not None
    unknown = [name for name in config.variants if name not in VARIANTS]
    if unknown:
        raise SystemExit(f"error: variants must be of {', '.join(VARIANTS)}, got {', '.join(unknown)}")
    torch.set_num_threads(1)
    config.results.mkdir(parents=True, exist_ok=True)
    data = load_images(config.data, config.image_size)
    train, test = (data.subset(index) for index in train_test_split(data))
    # Seeds outermost: a sweep that is cut short has all variants with fewer seeds.
    todo = [(name, seed) for seed in config.seeds for name in ("random", *config.variants)]
    share, shares = map(int, config.part.split("/"))
    for number, (name, seed) in enumerate(todo):
        result = config.results / f"{name}-seed{seed}.json"
        if number % shares == share and not result.exists():
            print(f"== {number + 1}/{len(todo)}: {name}, seed {seed}", flush=True)
            write_whole(result, one(name, seed, train, test, config).encode())


def one(name: str, seed: int, train: ImageSet, test: ImageSet, config: Ablation) -> str:
    """Pretrain, probe; the run's record as JSON."""
    method, model = VARIANTS["byol" if name == "random" else name]
    pretraining = Pretraining(method, model, SMALL.augmentation, SMALL.optimization, seed)
    run = Run(train, pretraining, config.runs / f"{name}-seed{seed}")
    encoder = run.model.student.encoder
    if name == "random":
        torch.manual_seed(seed)
        encoder = Encoder(train.channels, model)
    else:
        run.resume()
        run.train()
    record = {
        "variant": name,
        "seed": seed,
        "auc": rounded(probe_encoder(run, encoder, train, test, fractions=SHARES, subsets=config.subsets)),
        "last_epoch": rounded(run.rows[-1]) if run.rows else {},
        "steps": run.epoch * run.steps_per_epoch,
        "images": [len(train), len(test)],
        "image_size": config.image_size,
        "data": None if config.data is None else config.data.name,
        "command": command(config),
        "config": asdict(pretraining),
        "versions": {"vqssl": vqssl.__version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    return "{\n" + ",\n".join(f' "{key}": {json.dumps(value)}' for key, value in record.items()) + "\n}\n"


def command(config: Ablation) -> str:
    """Of the sweep that a run is part of, files by their name."""
    size = "" if config.image_size == SMALL.image_size else f" --image-size {config.image_size}"
    return f"python -m examples.pretrain.ablate --data {None if config.data is None else config.data.name}{size}"


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return round(value, 5) if isinstance(value, float) else value


if __name__ == "__main__":
    main(tyro.cli(Ablation))
