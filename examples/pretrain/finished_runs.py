"""Finished runs of the example or the sweep: their checkpoints, and the images that they were trained on."""

from __future__ import annotations

import hashlib
import json
import re
import typing
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from examples.pretrain.checkpoint import differences
from examples.pretrain.checkpoint import digest as file_digest
from examples.pretrain.checkpoint import load as load_checkpoint
from examples.pretrain.checkpoint_checks import check_facts
from examples.pretrain.data import ImageSet, Reading, load_images, train_test_split
from examples.pretrain.data.fingerprint import changes, side_of
from examples.pretrain.encoder import Encoder
from examples.pretrain.methods import METHODS
from examples.pretrain.phantoms import make_phantoms
from examples.pretrain.protocols import Subject
from examples.pretrain.train import Pretraining, Run
from examples.pretrain.untrained import encoder_of_file, random_encoder

UNTRAINED = ("random", "imagenet")
"""Names of encoders that no run of the example trained."""


@dataclass(frozen=True)
class Images:
    """The source of the images that encoders are evaluated on."""

    data: Path | None
    """File or folder; None for the demo's phantoms."""
    masks: Path | None
    """File of images with masks, where those of `data` have none."""
    phantoms: int
    """Number of phantoms that the run drew."""
    reading: Reading = field(default_factory=Reading)
    """What to do where files leave a choice."""


@dataclass(frozen=True)
class Found:
    """A checkpoint and its settings; or an encoder that its run did not train.

    "random" is the encoder that the run started from, and "imagenet" that of `--weights`.
    """

    name: str
    folder: Path
    config: Pretraining
    images: str
    """Fingerprint of the training images."""
    epoch: int
    """Last epoch that the checkpoint holds."""
    digest: str
    """Of the bytes of the checkpoint."""
    devices: tuple[str, ...] = ()
    """Models of the devices that the run trained on; empty for "random" and "imagenet"."""
    weights: Path | None = None
    """Of "imagenet": the file of its weights."""

    @property
    def pretraining(self) -> dict[str, Any]:
        """The settings that made this encoder; untrained: its shape, its seed, and the views for fine-tuning."""
        config = asdict(self.config)
        if self.name not in UNTRAINED:
            return config
        shape = {name: config[name] for name in ("encoder", "augmentation", "seed")}
        return shape if self.weights is None else shape | {"weights": file_digest(self.weights)}

    @property
    def checkpoint(self) -> dict[str, Any] | None:
        """Epoch and digest of the checkpoint; None for "random" and "imagenet"."""
        if self.name in UNTRAINED:
            return None
        return {"epoch": self.epoch, "epochs": self.config.optimization.epochs, "sha256": self.digest}


def find(
    runs: Sequence[Path], encoders: Sequence[str], *, device: str, unfinished: bool, weights: Path | None = None
) -> list[Found]:
    """Return the checkpoints in folders, and an untrained encoder for each seed; sorted by seed.

    Args:
        runs: folders with `checkpoint.pt`, or with folders that hold one.
        encoders: names of those to return; empty for all.
        device: the device to load them to.
        unfinished: also return unfinished runs, named `byol@3` after three epochs.
        weights: the file of "imagenet", which each seed then has too.

    Raises:
        ValueError: checkpoints are missing, ambiguous, unfinished or incompatible.
    """
    paths = sorted(path for folder in runs for path in (*folder.glob("checkpoint.pt"), *folder.glob("*/checkpoint.pt")))
    found = [read(path, device) for path in paths]
    if not found:
        given = ", ".join(map(str, runs)) or "nothing"
        raise ValueError(f"--runs must hold checkpoints of the example or the sweep, got {given}: give its --out")
    first = {each.config.seed: each for each in reversed(found)}
    for each in first.values() if weights is not None else ():
        found.append(replace(each, name="imagenet", devices=(), weights=weights))
    found = [*(replace(each, name="random", devices=()) for each in first.values()), *found]
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
        differ = [
            f"{name} is {a} and {b}"
            for name, a, b in differences(asdict(found[0].config.augmentation), asdict(each.config.augmentation))
        ]
        if differ:
            raise ValueError(
                f"all runs must have the same augmentation, which fine-tuning uses, got {found[0].folder} and "
                f"{each.folder}, of which {'; '.join(differ)}: evaluate them one by one, each with its own --out"
            )
    return sorted(found, key=lambda each: each.config.seed)


def finished(each: Found, unfinished: bool) -> Found:
    """Return the same if its run is finished; else raise ValueError, or rename it to say how far it came."""
    epochs = each.config.optimization.epochs
    if each.name in UNTRAINED or each.epoch >= epochs:
        return each
    if not unfinished:
        raise ValueError(
            f"{each.folder} must hold a finished run, got one after epoch {each.epoch} of {epochs}: let it go on (the "
            "same command does), or add --unfinished to evaluate it as it is"
        )
    return replace(each, name=f"{each.name}@{each.epoch}")


def read(path: Path, device: str) -> Found:
    """Return what a checkpoint says about its run.

    Raises:
        ValueError: it cannot be read, or is of another version of the example.
    """
    state = load_checkpoint(path, "meta")  # the weights are read when they are needed
    check_facts(path, state)
    folder = path.parent
    try:
        config = replace(settings_of(json.loads(state["config"])), device=device)
    except (KeyError, TypeError) as error:  # an option or a method that this version does not have
        raise ValueError(f"{path}: a checkpoint with settings that this version does not have: {error}") from error
    return Found(
        name=re.sub(r"-seed\d+$", "", folder.resolve().name),  # resolved: `--runs .` has a name too
        folder=folder,
        config=config,
        images=state["data"],
        epoch=state["epoch"],
        digest=file_digest(path),
        devices=tuple(state["devices"]),
    )


def settings_of(config: dict[str, Any]) -> Pretraining:
    """Return the settings that a checkpoint holds as a nested dict."""
    options = built(METHODS[config["method"]].Options, config["options"])
    found: Pretraining = built(Pretraining, {**config, "options": options})
    return found


def built(kind: Any, values: dict[str, Any]) -> Any:
    """Return the dataclass `kind` from a nested dict, with lists as tuples."""
    hints = typing.get_type_hints(kind)
    made = {}
    for name, value in values.items():
        if is_dataclass(hints[name]) and isinstance(value, dict):
            value = built(hints[name], value)
        made[name] = tuple(value) if isinstance(value, list) else value
    return kind(**made)


def subject_of(each: Found, source: Images) -> Subject:
    """Return the encoder with its run and the images that it is evaluated on."""
    size = side_of(each.images)
    # Phantoms depend on the seed of the run; a file is read once for all seeds.
    data = (
        phantoms(source.phantoms, size, each.config.seed)
        if source.data is None
        else with_bits(file(source.data, size, source.reading))
    )
    train, test = split_of(data, each)
    run = Run(train, each.config, each.folder)
    encoder: Encoder = run.method.encoder
    if each.name == "random":
        encoder = random_encoder(train.channels, each.config.encoder, each.config.seed).to(each.config.device)
    elif each.weights is not None:
        encoder = encoder_of_file(each.weights, train.channels, each.config.encoder).to(each.config.device)
    elif not run.resume(images_only=True):
        raise ValueError(f"{each.folder}: the checkpoint is gone")
    sides = None
    if source.masks is not None:
        masked = file(source.masks, size, source.reading)
        if masked.masks is None:
            raise ValueError(f"{source.masks}: --masks must hold `images` and `masks`, and there are no masks")
        sides = apart(with_bits(masked), train)
    elif train.masks is not None:
        sides = (train, test)
    return Subject(each.name, each.config.seed, run, encoder, train, test, sides)


@lru_cache(2)
def file(path: Path, size: int, reading: Reading) -> ImageSet:
    """Return :func:`load_images`, cached."""
    return load_images(path, size, reading=reading)


@lru_cache(1)
def phantoms(count: int, size: int, seed: int) -> ImageSet:
    """Return :func:`make_phantoms`, cached."""
    return make_phantoms(count, size, seed=seed)


def with_bits(data: ImageSet) -> ImageSet:
    """Return masks of 0 and 255 as masks of 0 and 1: image files mark a single kind so, not eight equal ones."""
    if data.masks is None or data.masks.max(initial=0) != 255 or ((data.masks > 0) & (data.masks < 255)).any():
        return data
    return replace(data, masks=(data.masks > 0).astype(np.uint8))


def split_of(data: ImageSet, each: Found) -> tuple[ImageSet, ImageSet]:
    """Return training and test images of the run: the example splits by its own seed, the sweep by 0."""
    for seed in (each.config.seed, 0):
        train, test = (data.subset(index) for index in train_test_split(data, seed=seed))
        if not changes(each.images, train.fingerprint, train.images, images_only=True):
            return train, test
    raise ValueError(
        f"{each.folder} was not trained on these images, or not on as many: give its own --data, or --phantoms"
    )


def apart(masked: ImageSet, train: ImageSet) -> tuple[ImageSet, ImageSet]:
    """Split images with masks: no patient and no image of the second part was used in pretraining."""
    if masked.groups is None or train.groups is None:
        raise ValueError("masks in a file of their own need `groups`, as the images do, to keep patients apart")
    known = {hashlib.sha256(image.tobytes()).digest() for image in train.images}
    same = np.array(
        [hashlib.sha256(image.tobytes()).digest() in known for image in masked.images]
    )  # perhaps under another patient's name
    # As text: numpy compares integers of unlike dtypes as floats, which merges those above 2**53.
    seen = np.isin(masked.groups.astype(str), train.groups.astype(str)) | np.isin(masked.groups, masked.groups[same])
    if seen.all() or not seen.any():
        raise ValueError(
            f"masks must be of both patients pretrained on and others, got {seen.sum()} and {(~seen).sum()} images: "
            "check that both files write a patient's group alike"
        )
    return masked.subset(seen), masked.subset(~seen)


def digest(data: ImageSet) -> str:
    """Return a digest of images, labels, groups and masks, in their order."""
    found = hashlib.sha256()
    for name in ("images", "labels", "groups", "masks"):
        array = getattr(data, name)
        if array is not None:
            found.update(f"{name} {array.shape} {array.dtype.kind}{array.dtype.itemsize}".encode())
            for entry in array if array.ndim > 1 else [array]:  # one by one: they may be in a file
                found.update(np.ascontiguousarray(entry).tobytes())
    return found.hexdigest()[:16]
