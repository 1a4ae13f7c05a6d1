"""What pretrained encoders are worth with few labels: linear probes and fine-tuning, by share of labels.

    python -m examples.dissect.evaluate --run runs/small-1 --data kermany_cxr_64.npz

Reads the checkpoints that the example wrote (a folder a method), evaluates them, and an encoder that was never trained,
on the same subsets of the labels, and writes `evaluation.json` and `evaluation.md` beside them. Every encoder gets the
same recipe, which was not tuned for any of them.
"""

from __future__ import annotations

import copy
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from scipy import stats
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from tqdm import tqdm

import vqssl
from examples.dissect.augment import Augmentation, to_float, views_of
from examples.dissect.data import ImageSet, load_images, train_test_split
from examples.dissect.model import METHODS, Encoder, Model
from examples.dissect.phantoms import make_phantoms
from examples.dissect.probe import label_subset, linear_probe, macro_auc
from examples.dissect.train import Optimization, Pretraining, Run, write_whole

PROTOCOLS = ("linear", "finetune")


@dataclass(frozen=True)
class Evaluation:
    run: Path
    """A folder that the example wrote, with byol/ or dissect/ in it."""
    data: Path | None = None
    """The images that the run was trained on; left out for the demo's phantoms."""
    phantoms: int = 5000
    protocols: tuple[str, ...] = PROTOCOLS
    shares: tuple[float, ...] = (0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 1.0)
    subsets: int = 5
    """Random label subsets for each share below 100%."""
    steps: int = 200
    """Of fine-tuning."""
    lr: float = 1e-3
    """Peak learning rate of fine-tuning; AdamW with a cosine."""
    seed: int = 0


def main(config: Evaluation) -> dict[str, Any]:
    unknown = [name for name in config.protocols if name not in PROTOCOLS]
    if unknown:
        raise ValueError(f"protocols must be of {', '.join(PROTOCOLS)}, got {' '.join(unknown)}")
    paths = [path for method in METHODS if (path := config.run / method / "checkpoint.pt").exists()]
    checkpoints = {path.parent.name: settings_of(path) for path in paths}
    if not checkpoints:
        raise ValueError(f"no byol/checkpoint.pt or dissect/checkpoint.pt in {config.run}: give the example's --out")
    first = next(iter(checkpoints.values()))
    data = images_of(config, torch.load(paths[0], weights_only=True)["data"])
    train, test = (data.subset(index) for index in train_test_split(data, seed=first.seed))
    if train.labels is None or test.labels is None:
        raise ValueError("an evaluation needs labels, and these images have none: see load_images for where they go")

    runs = {}
    for method, settings in checkpoints.items():
        run = Run(train, settings, config.run / method)
        run.resume()
        runs[method] = run
    some = next(iter(runs.values()))
    torch.manual_seed(first.seed)
    encoders: dict[str, nn.Module] = {"random": Encoder(train.channels, first.model).to(some.config.device)}
    encoders |= {method: run.model.student.encoder for method, run in runs.items()}

    scores: dict[str, dict[str, dict[str, list[float]]]] = {}
    bar = tqdm(total=len(encoders) * len(config.protocols), desc="encoders x protocols")
    for name, encoder in encoders.items():
        run = runs.get(name, some)
        scores[name] = {}
        for protocol in config.protocols:
            bar.set_postfix_str(f"{name}, {protocol}")
            measure = linear if protocol == "linear" else finetune
            scores[name][protocol] = measure(run, encoder, train, test, config)
            bar.update()
    bar.close()
    result = {
        "command": " ".join(["python -m examples.dissect.evaluate", *sys.argv[1:]]),
        "config": json.loads(json.dumps(asdict(config), default=str)),
        "pretraining": {name: asdict(settings) for name, settings in checkpoints.items()},
        "images": {"train": len(train), "test": len(test)},
        "auc": scores,
        "versions": {"vqssl": vqssl.__version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    write_whole(config.run / "evaluation.json", json.dumps(result, indent=1).encode())
    text = table(scores)
    write_whole(config.run / "evaluation.md", text.encode())
    print(f"macro AUC (%), mean and 95% interval over label subsets of one pretraining seed\n\n{text}")
    return result


def settings_of(path: Path) -> Pretraining:
    """What a checkpoint was trained with."""
    found = json.loads(torch.load(path, map_location="cpu", weights_only=True)["config"])
    parts = {"model": Model, "augmentation": Augmentation, "optimization": Optimization}
    for name, kind in parts.items():
        options = {key: tuple(value) if isinstance(value, list) else value for key, value in found[name].items()}
        found[name] = kind(**options)
    return Pretraining(**found)


def images_of(config: Evaluation, fingerprint: str) -> ImageSet:
    size = int(fingerprint.split(",")[1])  # "(N, S, S) uint8 checksum"
    if config.data is not None:
        return load_images(config.data, size)
    return make_phantoms(config.phantoms, size, seed=config.seed)


def linear(run: Run, encoder: nn.Module, train: ImageSet, test: ImageSet, config: Evaluation) -> dict[str, list[float]]:
    """A logistic regression on frozen features."""
    assert train.labels is not None
    assert test.labels is not None
    features = [run.encode(to_float(side.images), encoder)[0].numpy() for side in (train, test)]
    found = linear_probe(
        (features[0], train.labels), (features[1], test.labels), config.shares, config.subsets, config.seed
    )
    return {f"{share:g}": values for share, values in found.items()}


def finetune(
    run: Run, encoder: nn.Module, train: ImageSet, test: ImageSet, config: Evaluation
) -> dict[str, list[float]]:
    """Encoder and a linear head trained together, on the subsets that the linear probe gets."""
    assert train.labels is not None
    found: dict[str, list[float]] = {}
    for share in config.shares:
        for draw in range(1 if share == 1 else config.subsets):
            index = label_subset(train.labels, share, config.seed * 1000 + draw)
            score = finetuned(run, encoder, train.subset(index), test, config, seed=config.seed * 1000 + draw)
            found.setdefault(f"{share:g}", []).append(score)
    return found


def finetuned(run: Run, encoder: nn.Module, train: ImageSet, test: ImageSet, config: Evaluation, *, seed: int) -> float:
    """Macro AUC on the test images after `config.steps` steps; the encoder given is left as it was."""
    assert train.labels is not None
    assert test.labels is not None
    torch.manual_seed(seed)
    device = run.config.device
    tuned = copy.deepcopy(encoder).train()
    classes = train.labels.shape[1] if train.labels.ndim == 2 else int(train.labels.max()) + 1
    head = nn.Linear(tuned.dim, classes).to(device)  # type: ignore[arg-type]
    labels = torch.from_numpy(train.labels).to(device)
    many = train.labels.ndim == 2
    loss_of = nn.BCEWithLogitsLoss() if many else nn.CrossEntropyLoss()
    parameters = [*tuned.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=1e-4)
    schedule = CosineAnnealingLR(optimizer, config.steps)
    augment = views_of(train.images.shape[1], run.config.augmentation)
    images = to_float(train.images).to(device)
    size = min(64, len(images))
    order = torch.randperm(len(images))
    for _ in range(config.steps):
        if len(order) < size:
            order = torch.cat([order, torch.randperm(len(images))])
        batch, order = order[:size], order[size:]
        with torch.no_grad():
            views = run.normalize(augment(images[batch]))
        logits = head(tuned(views)[0])
        target = labels[batch]
        optimizer.zero_grad(set_to_none=True)
        loss_of(logits, target.float() if many else target).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        features: Tensor = run.encode(to_float(test.images), tuned)[0]
        logits = head(features.to(device)).cpu()
    scores = logits if many else logits.softmax(-1)
    return macro_auc(test.labels, scores.double().numpy())


def table(scores: dict[str, dict[str, dict[str, list[float]]]]) -> str:
    """A row for each encoder and protocol, and what fine-tuning adds."""
    shares = list(next(iter(next(iter(scores.values())).values())))
    lines = [
        "| encoder | protocol | " + " | ".join(f"{100 * float(share):g}%" for share in shares) + " |",
        "|---|---|" + "---|" * len(shares),
    ]
    for name, protocols in scores.items():
        for protocol, by_share in protocols.items():
            lines.append(row([name, protocol], [[100 * value for value in by_share[share]] for share in shares]))
        if set(PROTOCOLS) <= set(protocols):
            gaps = [
                [100 * (a - b) for a, b in zip(protocols["linear"][s], protocols["finetune"][s], strict=True)]
                for s in shares
            ]
            lines.append(row([name, "linear - finetune"], gaps))
    return "\n".join(lines) + "\n"


def row(names: Sequence[str], values: Sequence[Sequence[float]]) -> str:
    cells = []
    for each in values:
        mean = np.mean(each)
        half = stats.t.ppf(0.975, len(each) - 1) * np.std(each, ddof=1) / len(each) ** 0.5 if len(each) > 1 else 0.0
        cells.append(f"{mean:.1f} ± {half:.1f}" if len(each) > 1 else f"{mean:.1f}")
    return "| " + " | ".join([*names, *cells]) + " |"


if __name__ == "__main__":
    try:
        main(tyro.cli(Evaluation))
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
