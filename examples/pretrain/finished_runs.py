"""Checkpoints that the example or the sweep left, found again together with the images that they were trained on."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from examples.pretrain.augment import Augmentation
from examples.pretrain.data import ImageSet, load_images, train_test_split
from examples.pretrain.model import Encoder, Model
from examples.pretrain.phantoms import make_phantoms
from examples.pretrain.protocols import Subject
from examples.pretrain.train import Optimization, Pretraining, Run, differences, fingerprint


@dataclass(frozen=True)
class Images:
    """Where the images come from that encoders are judged by."""

    data: Path | None
    """None for the demo's phantoms."""
    masks: Path | None
    """Of their own."""
    phantoms: int


@dataclass(frozen=True)
class Found:
    """A checkpoint and what it says of itself; or the encoder that its run would have begun with, as "random"."""

    name: str
    folder: Path
    config: Pretraining
    images: str
    """Fingerprint of the training images."""
    epoch: int
    """How far the run has come."""
    digest: str
    """Of the checkpoint's bytes."""

    @property
    def pretraining(self) -> dict[str, Any]:
        """What made this encoder; of one that was never trained, its shape, its seed, and what it is judged with: how
        images are varied, and how many codes k-means makes of its features."""
        config = asdict(self.config)
        if self.name != "random":
            return config
        shape = {name: config["model"][name] for name in ("width", "stem_stride", "scales", "codebook_size")}
        return {"model": shape, "augmentation": config["augmentation"], "seed": self.config.seed}

    @property
    def checkpoint(self) -> dict[str, Any] | None:
        if self.name == "random":
            return None
        return {"epoch": self.epoch, "epochs": self.config.optimization.epochs, "sha256": self.digest}


def find(runs: Sequence[Path], encoders: Sequence[str], *, device: str, unfinished: bool) -> list[Found]:
    """The checkpoints in folders, and for each seed an encoder that was never trained; by seed.

    Args:
        runs: folders with `checkpoint.pt`, or with folders that hold one.
        encoders: which of them; all, if empty.
        device: what they are to be loaded to.
        unfinished: judge runs that have not come to their end as well, as `byol@3` after three epochs.

    Raises:
        ValueError: nothing is found, or not what was asked for, or twice; a run is not finished; two would be judged by
            different recipes.
    """
    paths = sorted(path for folder in runs for path in (*folder.glob("checkpoint.pt"), *folder.glob("*/checkpoint.pt")))
    found = [read(path, device) for path in paths]
    if not found:
        given = ", ".join(map(str, runs)) or "nothing"
        raise ValueError(f"--runs must hold checkpoints of the example or the sweep, got {given}: give its --out")
    never = {each.config.seed: each for each in reversed(found)}
    found = [*(replaced(each, "random") for each in never.values()), *found]
    if encoders:
        missing = sorted(set(encoders) - {each.name for each in found})
        if missing:
            names = ", ".join(dict.fromkeys(each.name for each in found))
            raise ValueError(f"encoders must be of {names}, got {', '.join(missing)}")
        found = [each for each in found if each.name in encoders]
    seen: dict[tuple[str, int], Path] = {}
    for each in found:
        other = seen.setdefault((each.name, each.config.seed), each.folder)
        if other != each.folder:
            raise ValueError(f"each encoder must have one run a seed, got {other} and {each.folder}: name one of them")
    found = [finished(each, unfinished) for each in found]
    for each in found:
        differ = [f"{name} is {a} and {b}" for name, a, b in differences(recipe(found[0]), recipe(each))]
        if differ:
            raise ValueError(
                f"all runs must be judged by one recipe, got {found[0].folder} and {each.folder}, of which "
                f"{'; '.join(differ)}: evaluate them one by one, with an --out of their own"
            )
    return sorted(found, key=lambda each: each.config.seed)


def recipe(each: Found) -> dict[str, Any]:
    """What protocols take from the run that made an encoder."""
    config = asdict(each.config)
    return {"augmentation": config["augmentation"], "codebook_size": config["model"]["codebook_size"]}


def replaced(each: Found, name: str) -> Found:
    return Found(name, each.folder, each.config, each.images, each.epoch, each.digest)


def finished(each: Found, unfinished: bool) -> Found:
    """The same, or under a name that says how far it came."""
    epochs = each.config.optimization.epochs
    if each.name == "random" or each.epoch >= epochs:
        return each
    if not unfinished:
        raise ValueError(
            f"{each.folder} must hold a finished run, got one after epoch {each.epoch} of {epochs}: let it go on (the "
            "same command does), or add --unfinished to judge it as it is"
        )
    return replaced(each, f"{each.name}@{each.epoch}")


def read(path: Path, device: str) -> Found:
    content = path.read_bytes()
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        config, images, epoch = settings_of(json.loads(state["config"]), device), state["data"], int(state["epoch"])
    except Exception as error:
        raise ValueError(f"{path}: not a readable checkpoint of the example ({error})") from error
    folder = path.parent
    name = re.sub(r"-seed\d+$", "", folder.resolve().name)  # `--runs .` has a name too
    return Found(name, folder, config, images, epoch, hashlib.sha256(content).hexdigest()[:16])


def settings_of(config: dict[str, Any], device: str = "cpu") -> Pretraining:
    """What a checkpoint was trained with."""
    parts = {"model": Model, "augmentation": Augmentation, "optimization": Optimization}
    for name, kind in parts.items():
        options = {key: tuple(value) if isinstance(value, list) else value for key, value in config[name].items()}
        config[name] = kind(**options)
    return Pretraining(**{**config, "device": device})


def subject_of(each: Found, source: Images) -> Subject:
    """The encoder, with its run and the images that it is judged by."""
    size = int(each.images.split(",")[1])  # "(N, S, S) uint8 checksum"
    # Phantoms are of the run's seed: files are read once for all seeds.
    data = (
        phantoms(source.phantoms, size, each.config.seed) if source.data is None else with_bits(file(source.data, size))
    )
    train, test = split_of(data, each)
    run = Run(train, each.config, each.folder)
    encoder: Encoder = run.model.student.encoder
    if each.name == "random":
        torch.manual_seed(each.config.seed)
        encoder = Encoder(train.channels, each.config.model).to(each.config.device)
    elif not run.resume():
        raise ValueError(f"{each.folder}: the checkpoint is gone")
    sides = None
    if source.masks is not None:
        masked = file(source.masks, size)
        if masked.masks is None:
            raise ValueError(f"{source.masks}: --masks must hold `images` and `masks`, and there are no masks")
        sides = apart(with_bits(masked), train)
    elif train.masks is not None:
        sides = (train, test)
    return Subject(each.name, each.config.seed, run, encoder, train, test, sides)


@lru_cache(2)
def file(path: Path, size: int) -> ImageSet:
    return load_images(path, size)


@lru_cache(1)
def phantoms(count: int, size: int, seed: int) -> ImageSet:
    return make_phantoms(count, size, seed=seed)


def with_bits(data: ImageSet) -> ImageSet:
    """Masks of 0 and 255, as image files have them, are masks of one kind, and not eight that are all alike."""
    if data.masks is None or data.masks.max(initial=0) != 255 or ((data.masks > 0) & (data.masks < 255)).any():
        return data
    return replace(data, masks=(data.masks > 0).astype(np.uint8))


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
    """Images with masks, to train on and to test on: no patient and no image of the second was pretrained on."""
    if masked.groups is None or train.groups is None:
        raise ValueError("masks in a file of their own need `groups`, as the images do, to keep patients apart")
    known = {image.tobytes() for image in train.images}
    same = np.array([image.tobytes() in known for image in masked.images])  # under another patient's name
    seen = np.isin(masked.groups, train.groups) | np.isin(masked.groups, masked.groups[same])
    if seen.all() or not seen.any():
        raise ValueError(
            f"masks must be of both patients pretrained on and others, got {seen.sum()} and {(~seen).sum()} images: "
            "check that both files write a patient's group alike"
        )
    return masked.subset(seen), masked.subset(~seen)


def digest(data: ImageSet) -> str:
    """Of all that is known about the images, in their order."""
    found = hashlib.sha256()
    for name in ("images", "labels", "groups", "masks"):
        array = getattr(data, name)
        if array is not None:
            found.update(f"{name} {array.shape} {array.dtype.kind}{array.dtype.itemsize}".encode())
            found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()[:16]
