"""What protocols share: the subject, the settings, the form of a protocol, and the planes of masks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from examples.pretrain.data.imageset import ImageSet
from examples.pretrain.encoder import Encoder
from examples.pretrain.protocols.labels import Draws, label_draws, learnable
from examples.pretrain.ranges import check_range, check_shares
from examples.pretrain.train import Run

Scores = dict[str, list[float]]
"""By column of the table: one value for each random draw of the labels, or one value if nothing is drawn."""


@dataclass(frozen=True)
class Settings:
    """Settings of all protocols, the same for every subject and tuned for none."""

    shares: tuple[float, ...] = (0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 1.0)
    """Shares of the labels."""
    mask_shares: tuple[float, ...] = (0.01, 0.05, 0.1, 1.0)
    """Shares of the masks."""
    subsets: int = 3
    """Random subsets of each share below 100%."""
    steps: int = 200
    """Steps of fine-tuning and of a segmentation decoder; AdamW with a cosine."""
    batch_size: int = 64
    """Of fine-tuning and of a segmentation decoder."""
    lr: float = 1e-3
    """Peak learning rate of fine-tuning."""
    mask_lr: float = 1e-2
    """Peak learning rate of a segmentation decoder."""
    clusters: int = 256
    """Number of k-means codes in the protocol `codes`, the same for every encoder."""
    seed: int = 0
    """Seed of the subsets, the decoders and heads, and the batches."""


def check_settings(settings: Settings) -> None:
    """Raise ValueError unless every setting is in its range."""
    check_shares("--shares", settings.shares)
    check_shares("--mask-shares", settings.mask_shares)
    check_range("--subsets", settings.subsets, least=1)
    check_range("--steps", settings.steps, least=1)
    check_range("--batch-size", settings.batch_size, least=2)
    check_range("--lr", settings.lr, above=0)
    check_range("--mask-lr", settings.mask_lr, above=0)
    check_range("--clusters", settings.clusters, least=1)
    check_range("--seed", settings.seed, least=0)


@dataclass(frozen=True)
class Subject:
    """An encoder of one pretraining seed, and the images that it is evaluated on."""

    name: str
    """"random", a method's, or a variant's."""
    seed: int
    """Of pretraining."""
    run: Run
    """The pretraining run: normalisation, device and method."""
    encoder: Encoder
    train: ImageSet
    test: ImageSet
    masked: tuple[ImageSet, ImageSet] | None = None
    """Images with masks, to train and to test on; none of the latter was seen in pretraining."""

    @property
    def codes(self) -> bool:
        """True if the run has codes of this encoder's images: an untrained encoder has none."""
        return hasattr(self.run.method, "codes") and self.encoder is self.run.method.encoder


@dataclass(frozen=True)
class Protocol:
    """One way to evaluate an encoder."""

    title: str
    """Of the table: the quantity and its unit."""
    measure: Callable[[Subject, Settings], Scores]
    """Return the scores of a subject, which stays as it was."""
    lacking: Callable[[Subject], str | None]
    """Return what the images lack for this protocol, or None."""
    draw: Callable[[Sequence[Subject], Settings, Path], None] | None = None
    """Draw pictures of subjects of one seed into a folder."""
    draws: Callable[[Subject, Settings], Draws] | None = None
    """Yield the random subsets that `measure` uses; raise ValueError if one cannot be drawn."""

    def unfit(self, subject: Subject, settings: Settings) -> str | None:
        """Return what keeps :attr:`measure` from working on a subject, or None: `lacking`, or subsets too small."""
        missing = self.lacking(subject)
        if missing is not None or self.draws is None:
            return missing
        try:
            for _ in self.draws(subject, settings):
                pass
        except ValueError as error:
            return f"other labels or masks: {error}"
        return None


def label_subsets(subject: Subject, settings: Settings) -> Draws:
    """Yield the subsets of the training labels."""
    assert subject.train.labels is not None
    return label_draws(subject.train.labels, settings.shares, settings.subsets, settings.seed)


def lacking_labels(subject: Subject) -> str | None:
    """Return what a probe with labels lacks, or None."""
    train, test = subject.train.labels, subject.test.labels
    if train is None or test is None:
        return "labels"
    if not len(learnable(train, test)):
        return "labels that tell images apart, in training and in test images"
    return None


def lacking_masks(subject: Subject) -> str | None:
    """Return what a decoder trained on masks lacks, or None."""
    if subject.masked is None:
        return "masks (give --masks, or data that hold some)"
    for side, kind in zip(subject.masked, ("to train on", "to test on"), strict=True):
        assert side.masks is not None
        if not areas(side.masks, count_planes(*subject.masked)).any(0).all():
            return f"every kind of mask among the images {kind}"
    return None


def count_planes(*sides: ImageSet) -> int:
    """Return the number of planes that hold the masks of all sides: a kind that one side lacks counts too."""
    return max(int(side.masks.max(initial=1)).bit_length() for side in sides if side.masks is not None)


def plane_names(*sides: ImageSet) -> list[str]:
    """Return a name for each bit of the masks: that of the finding if there are as many findings, else a number."""
    data = sides[0]
    count = count_planes(*sides)
    if data.labels is not None and data.labels.ndim == 2 and len(data.label_names) == count:
        return list(data.label_names)
    return ["mask"] if count == 1 else [f"mask {bit}" for bit in range(count)]


def areas(masks: np.ndarray, count: int) -> np.ndarray:
    """Return `(N, P)`: how many pixels of each bit mask `(N, S, S)` are in each of `count` planes; with little memory.

    >>> areas(np.array([[[1, 3], [0, 0]]], np.uint8), 2).tolist()
    [[2, 1]]
    """
    blocks = [
        planes(masks[start : start + 64], count).sum((2, 3), dtype=np.int64) for start in range(0, len(masks), 64)
    ]
    return np.concatenate([np.zeros((0, count), np.int64), *blocks])


def planes(masks: np.ndarray, count: int) -> np.ndarray:
    """Return bit masks `(N, S, S)` as `(N, P, S, S)` of 0 and 1: bit p in plane p."""
    return np.stack([(masks >> bit) & 1 for bit in range(count)], 1)
