"""What pretrained encoders are worth: each protocol a command, and all of them one.

    python -m examples.dissect.evaluate --runs runs/small-1 --data images.npz            # all that the images allow
    python -m examples.dissect.evaluate linear finetune --runs runs/s0 runs/s1 runs/s2 --data images.npz
    python -m examples.dissect.evaluate segment-frozen --runs runs/small-1 --data images.npz --masks lungs.npz
    python -m examples.dissect.evaluate --report --out runs/evaluation                    # tables and pictures again

`--runs` are folders that the example or the sweep wrote, one or several seeds of pretraining. Encoders of one seed,
and one that was never trained, are judged on the same subsets of the labels, by the same recipe, which was not tuned
for any of them. Results are a JSON for each protocol, encoder and seed; what is there already is not done again.
"""

from __future__ import annotations

import json
import platform
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from tqdm import tqdm

import vqssl
from examples.dissect import evaluation_report
from examples.dissect.augment import Augmentation
from examples.dissect.data import ImageSet, load_images, train_test_split
from examples.dissect.model import Encoder, Model
from examples.dissect.phantoms import make_phantoms
from examples.dissect.protocols import PROTOCOLS, Settings, Subject
from examples.dissect.train import Optimization, Pretraining, Run, fingerprint, write_whole

Name = Literal["linear", "finetune", "segment-frozen", "segment-tuned", "localise", "anatomy", "codes"]


@dataclass(frozen=True)
class Evaluation:
    protocols: tyro.conf.Positional[tuple[Name, ...]] = ()
    """All that the images allow, if left out."""
    runs: tuple[Path, ...] = ()
    """Folders of runs: of the example, with byol/ or dissect/ in them, or of the sweep."""
    data: Path | None = None
    """The images that the runs were trained on; left out for the demo's phantoms."""
    masks: Path | None = None
    """Images with masks, where those of --data have none; tested on patients that were not pretrained on."""
    phantoms: int = 5000
    encoders: tuple[str, ...] = ()
    """Which of the runs, for example byol full; all if left out."""
    out: Path = Path("runs/evaluation")
    part: str = "0/1"
    """I/N: the I-th of N equal shares of the work, for N processes at once."""
    device: str = "cpu"
    report: bool = False
    """Only tables and pictures of what is there."""
    settings: Annotated[Settings, tyro.conf.arg(name="")] = field(default_factory=Settings)


@dataclass(frozen=True)
class Found:
    """A checkpoint and what it says of itself."""

    name: str
    folder: Path
    config: Pretraining
    images: str
    """Fingerprint of the training images."""


def main(config: Evaluation) -> str:
    """Measures what is missing in `config.out`; returns the tables, as markdown."""
    if not config.report:
        found = find(config)
        work = [(name, each) for each in found for name in (config.protocols or PROTOCOLS)]
        measure(work, found, config)
    text = evaluation_report.write(config.out)
    print(text)
    return text


def find(config: Evaluation) -> list[Found]:
    """The checkpoints of all folders, and for each seed an encoder that was never trained."""
    paths = sorted(
        path for folder in config.runs for path in (*folder.glob("checkpoint.pt"), *folder.glob("*/checkpoint.pt"))
    )
    found = [read(path, config.device) for path in paths]
    if config.encoders:
        missing = set(config.encoders) - {each.name for each in found} - {"random"}
        if missing:
            names = ", ".join(sorted({each.name for each in found}))
            raise ValueError(f"encoders must be of random, {names}, got {', '.join(sorted(missing))}")
        found = [each for each in found if each.name in config.encoders]
    if not found:
        given = ", ".join(map(str, config.runs)) or "nothing"
        raise ValueError(f"--runs must hold checkpoints of the example or the sweep, got {given}: give its --out")
    for each in found:
        same = [
            str(other.folder) for other in found if (other.name, other.config.seed) == (each.name, each.config.seed)
        ]
        if len(same) > 1:
            raise ValueError(f"each encoder must have one run a seed, got {' and '.join(same)}: name one of them")
    hosts = {each.config.seed: each for each in reversed(found)}
    if not config.encoders or "random" in config.encoders:
        found = [Found("random", each.folder, each.config, each.images) for _, each in sorted(hosts.items())] + found
    return sorted(found, key=lambda each: each.config.seed)


def read(path: Path, device: str) -> Found:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        settings, images = settings_of(json.loads(state["config"]), device), state["data"]
    except Exception as error:
        raise ValueError(f"{path}: not a readable checkpoint of the example ({error})") from error
    return Found(re.sub(r"-seed\d+$", "", path.parent.name), path.parent, settings, images)


def settings_of(config: dict[str, Any], device: str = "cpu") -> Pretraining:
    """What a checkpoint was trained with."""
    parts = {"model": Model, "augmentation": Augmentation, "optimization": Optimization}
    for name, kind in parts.items():
        options = {key: tuple(value) if isinstance(value, list) else value for key, value in config[name].items()}
        config[name] = kind(**options)
    return Pretraining(**{**config, "device": device})


def measure(work: Sequence[tuple[str, Found]], found: Sequence[Found], config: Evaluation) -> None:
    """Every protocol of every encoder that has no result yet, then the pictures of the first seed."""
    share, shares = map(int, config.part.split("/"))
    config.out.mkdir(parents=True, exist_ok=True)
    said: set[str] = set()
    bar = tqdm(work[share::shares], desc="protocols x encoders x seeds")
    for name, each in bar:
        bar.set_postfix_str(f"{name} of {each.name}, seed {each.config.seed}")
        path = config.out / f"{name}-{each.name}-seed{each.config.seed}.json"
        if path.exists():
            check_same(path, config)
            continue
        subject = subject_of(each, config)
        missing = PROTOCOLS[name].lacking(subject)
        if missing is not None:
            if name in config.protocols:
                raise ValueError(f"the protocol {name} needs {missing}")
            if name not in said:
                tqdm.write(f"{name}: left out, it needs {missing}")
            said.add(name)
            continue
        record = {
            "protocol": name,
            "encoder": each.name,
            "seed": each.config.seed,
            "scores": {
                column: [round(value, 4) for value in values]
                for column, values in PROTOCOLS[name].measure(subject, config.settings).items()
            },
            "settings": asdict(config.settings),
            "command": command(config),
            "data": None if config.data is None else config.data.name,
            "masks": None if config.masks is None else config.masks.name,
            "images": {"train": len(subject.train), "test": len(subject.test)}
            | ({} if subject.masked is None else {"masked": [len(side) for side in subject.masked]}),
            "pretraining": asdict(each.config),
            "versions": {"vqssl": vqssl.__version__, "torch": torch.__version__, "python": platform.python_version()},
        }
        lines = ",\n".join(f' "{key}": {json.dumps(value)}' for key, value in record.items())
        write_whole(path, ("{\n" + lines + "\n}\n").encode())
    if share == 0:
        pictures(found, config)


def pictures(found: Sequence[Found], config: Evaluation) -> None:
    subjects = [subject_of(each, config) for each in found if each.config.seed == found[0].config.seed]
    for name in config.protocols or PROTOCOLS:
        protocol = PROTOCOLS[name]
        able = [subject for subject in subjects if protocol.lacking(subject) is None]
        if protocol.draw is not None and able:
            protocol.draw(able, config.settings, config.out)


def check_same(path: Path, config: Evaluation) -> None:
    theirs = json.loads(path.read_text())["settings"]
    ours = json.loads(json.dumps(asdict(config.settings)))
    changed = [f"{key} was {theirs.get(key)}, is {ours[key]}" for key in ours if theirs.get(key) != ours[key]]
    if changed:
        raise ValueError(f"{path} was measured with other settings: {'; '.join(changed)}. Give another --out")


def command(config: Evaluation) -> str:
    parts = ["python -m examples.dissect.evaluate", *config.protocols, f"--runs {len(config.runs)} folder(s)"]
    parts += [f"--{name} {path.name}" for name, path in (("data", config.data), ("masks", config.masks)) if path]
    return " ".join(parts)


def subject_of(each: Found, config: Evaluation) -> Subject:
    size = int(each.images.split(",")[1])  # "(N, S, S) uint8 checksum"
    data, masked = images_of(config.data, config.masks, size, config.phantoms, each.config.seed)
    train, test = split_of(data, each)
    run = Run(train, each.config, each.folder)
    encoder: Encoder = run.model.student.encoder
    if each.name == "random":
        torch.manual_seed(each.config.seed)
        encoder = Encoder(train.channels, each.config.model).to(each.config.device)
    elif not run.resume():
        raise ValueError(f"{each.folder}: the checkpoint is gone")
    sides = None
    if masked is not None:
        sides = apart(masked, train)
    elif train.masks is not None:
        sides = (train, test)
    return Subject(each.name, each.config.seed, run, encoder, train, test, sides)


@lru_cache(2)
def images_of(
    data: Path | None, masks: Path | None, size: int, phantoms: int, seed: int
) -> tuple[ImageSet, ImageSet | None]:
    images = make_phantoms(phantoms, size, seed=seed) if data is None else load_images(data, size)
    masked = None if masks is None else load_images(masks, size)
    if masked is not None and masked.masks is None:
        raise ValueError(f"{masks}: --masks must hold `images` and `masks`, and there are no masks")
    return images, masked


def split_of(data: ImageSet, each: Found) -> tuple[ImageSet, ImageSet]:
    """Training and test images of the run: the example splits by its own seed, the sweep by 0."""
    for seed in (each.config.seed, 0):
        train, test = (data.subset(index) for index in train_test_split(data, seed=seed))
        if fingerprint(train) == each.images:
            return train, test
    raise ValueError(
        f"{each.folder} was not trained on these images, or not on as many: give its own --data, or --phantoms"
    )


def apart(masked: ImageSet, train: ImageSet) -> tuple[ImageSet, ImageSet]:
    """Images with masks, to train on and to test on: no patient of the second was pretrained on."""
    if masked.groups is None or train.groups is None:
        raise ValueError("masks in a file of their own need `groups`, as the images do, to keep patients apart")
    seen = np.isin(masked.groups, train.groups)
    if seen.all() or not seen.any():
        raise ValueError(
            f"masks must be of both patients pretrained on and others, got {seen.sum()} and {(~seen).sum()} images"
        )
    return masked.subset(seen), masked.subset(~seen)


if __name__ == "__main__":
    try:
        main(tyro.cli(Evaluation))
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
