"""The form of a protocol: a subject and the settings go in, scores by column come out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from examples.pretrain.data.imageset import ImageSet
from examples.pretrain.model import Encoder
from examples.pretrain.probe import learnable
from examples.pretrain.train import Run

Scores = dict[str, list[float]]
"""By column of the table, a value for each random draw of the labels (one, where nothing is drawn)."""


@dataclass(frozen=True)
class Settings:
    """The same for every subject; none of them was tuned for any."""

    shares: tuple[float, ...] = (0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 1.0)
    """Of the labels."""
    mask_shares: tuple[float, ...] = (0.01, 0.05, 0.1, 1.0)
    """Of the masks."""
    subsets: int = 3
    """Random subsets of each share below 100%."""
    steps: int = 200
    """Of fine-tuning and of a segmentation decoder; AdamW with a cosine."""
    batch_size: int = 64
    lr: float = 1e-3
    """Peak learning rate of fine-tuning."""
    mask_lr: float = 1e-2
    """Of a segmentation decoder."""
    seed: int = 0
    """Of the subsets, the decoders and heads, and the batches."""


@dataclass(frozen=True)
class Subject:
    """An encoder of one pretraining seed, and the images it is judged by."""

    name: str
    """"random", a method's, or a variant's."""
    seed: int
    """Of pretraining."""
    run: Run
    """Which knows how to normalise, on what device, and the codebooks where there are some."""
    encoder: Encoder
    train: ImageSet
    test: ImageSet
    masked: tuple[ImageSet, ImageSet] | None = None
    """Images with masks to train on and to test on; none of the latter was seen in pretraining."""

    @property
    def codes(self) -> bool:
        """Whether the codebooks of the run belong to this encoder."""
        return self.run.model.quantizer is not None and self.encoder is self.run.model.student.encoder


@dataclass(frozen=True)
class Protocol:
    title: str
    """Of the table: what is measured, in which unit."""
    measure: Callable[[Subject, Settings], Scores]
    lacking: Callable[[Subject], str | None]
    """What the images would need and do not have, or None."""
    draw: Callable[[Sequence[Subject], Settings, Path], None] | None = None
    """Makes pictures in a folder, of subjects of the same seed."""


def lacking_labels(subject: Subject) -> str | None:
    train, test = subject.train.labels, subject.test.labels
    if train is None or test is None:
        return "labels"
    if not len(learnable(train, test)):
        return "labels that tell images apart, in training and in test images"
    return None


def lacking_masks(subject: Subject) -> str | None:
    if subject.masked is None:
        return "masks (give --masks, or data that hold some)"
    for side, kind in zip(subject.masked, ("to train on", "to test on"), strict=True):
        assert side.masks is not None
        there = planes(side.masks, len(plane_names(subject.masked[0]))).any((0, 2, 3))
        if not there.all():
            return f"every kind of mask among the images {kind}"
    return None


def plane_names(data: ImageSet) -> list[str]:
    """A name for each bit that the masks use: the finding's, where there are as many, else a number."""
    assert data.masks is not None
    count = int(data.masks.max(initial=1)).bit_length()
    if data.labels is not None and data.labels.ndim == 2 and len(data.label_names) == count:
        return list(data.label_names)
    return ["mask"] if count == 1 else [f"mask {bit}" for bit in range(count)]


def planes(masks: np.ndarray, count: int) -> np.ndarray:
    """Masks of bits `(N, S, S)` as `(N, P, S, S)` of 0 and 1: bit p in plane p."""
    return np.stack([(masks >> bit) & 1 for bit in range(count)], 1)
