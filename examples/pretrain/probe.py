"""Probes of a frozen encoder: linear ones, for how many labels it needs, and nearest neighbours, while it trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from examples.pretrain.augment import to_float
from examples.pretrain.data import train_test_split
from examples.pretrain.data.imageset import ImageSet
from examples.pretrain.train import Run

FRACTIONS = (0.01, 0.05, 1.0)
STRENGTH = 0.1
"""Inverse L2 penalty of the probe, the same for every method and share of labels."""


def probe_encoder(
    run: Run,
    encoder: nn.Module,
    train: ImageSet,
    test: ImageSet,
    *,
    fractions: tuple[float, ...] = FRACTIONS,
    subsets: int = 3,
    seed: int = 0,
) -> dict[str, list[float]]:
    """:func:`linear_probe` of an encoder on the images that `run` knows how to normalise; keys are "0.01" and so on."""
    if train.labels is None or test.labels is None:
        raise ValueError("a linear probe needs labels, and these images have none: see load_images for where they go")
    features = [run.encode(to_float(side.images), encoder)[0].numpy() for side in (train, test)]
    scores = linear_probe((features[0], train.labels), (features[1], test.labels), fractions, subsets, seed)
    return {f"{fraction:g}": values for fraction, values in scores.items()}


def linear_probe(
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    fractions: tuple[float, ...] = FRACTIONS,
    subsets: int = 3,
    seed: int = 0,
) -> dict[float, list[float]]:
    """Macro AUC on the test images by share of labels, one figure for each random subset of the training labels.

    Features are standardised with the mean and deviation of the labelled images, then a logistic regression is fit:
    one for each finding of multi-hot labels, a multinomial one for classes. AUC is :func:`macro_auc`; a finding that
    all or none of the training images have cannot be learnt, and is left out too.

    Args:
        train: features `(N, D)` and labels, `(N,)` classes or `(N, L)` findings.
        test: the same for the test images.
        fractions: shares of the training images whose labels are used.
        subsets: how many random subsets of each share below 1.
        seed: of the subsets; the same for every encoder, so that figures can be compared pairwise.
    """
    features, labels = train
    result = {}
    for fraction in fractions:
        draws = 1 if fraction == 1 else subsets
        scores = []
        for draw in range(draws):
            index = label_subset(labels, fraction, seed * 1000 + draw)
            scores.append(_auc(features[index], labels[index], *test))
        result[fraction] = scores
    return result


def subset_size(labels: np.ndarray, fraction: float) -> int:
    """How many images the share is: at least four for every class, or for every value of a finding."""
    columns = labels[:, None] if labels.ndim == 1 else labels
    least = 4 * max(len(np.unique(column)) for column in columns.T)
    return min(max(round(fraction * len(labels)), least), len(labels))


def label_subset(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Sorted indices of a random subset that holds every class, or both values of every finding, at least twice."""
    if fraction == 1:
        return np.arange(len(labels))
    columns = labels[:, None] if labels.ndim == 1 else labels
    values = [np.unique(column) for column in columns.T]
    rng = np.random.default_rng(seed)
    count = subset_size(labels, fraction)
    for _ in range(1000):
        index = np.sort(rng.permutation(len(labels))[:count])
        drawn = columns[index].T
        if all((column == value).sum() >= 2 for column, own in zip(drawn, values, strict=True) for value in own):
            return index
    raise ValueError(
        f"no subset of {count} of {len(labels)} labels holds every class twice: a class is too rare for a share of "
        f"{fraction:g}; give more images or drop the class"
    )


def knn_monitor(data: ImageSet, *, neighbours: int = 20, most: int = 2000, seed: int = 0) -> Callable[[Run], dict]:
    """For :meth:`Run.train`: macro AUC of a kNN probe on held-out *training* images after each epoch, as `knn_auc`.

    Cosine distance, votes weighted by its inverse, at most `most` images. A cheap alarm: collapsed features lower it.
    """
    if data.labels is None:
        raise ValueError("a kNN probe needs labels, and these images have none: train without it")
    known, asked = train_test_split(replace(data, split=None), 0.2, seed=seed)
    rng = np.random.default_rng(seed)
    parts = [data.subset(np.sort(rng.permutation(index)[:most])) for index in (known, asked)]

    def monitor(run: Run) -> dict[str, float]:
        sides = []
        for part in parts:
            assert part.labels is not None
            sides.append((run.encode(to_float(part.images))[0].numpy(), part.labels))
        return {"knn_auc": knn_auc(sides[0], sides[1], neighbours)}

    return monitor


def knn_auc(train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray], neighbours: int = 20) -> float:
    """Macro AUC of votes of the nearest training images, each weighted by the inverse of its cosine distance."""
    classifier = KNeighborsClassifier(min(neighbours, len(train[0])), metric="cosine", weights="distance")
    found = classifier.fit(*train).predict_proba(test[0])
    if train[1].ndim == 2:
        # A finding that no training image has gets no vote.
        found = np.stack([each[:, 1] if each.shape[1] == 2 else np.zeros(len(each)) for each in found], 1)
    return macro_auc(test[1], found)


def macro_auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """The mean AUC over classes (each against the rest), or over findings.

    Args:
        labels: `(N,)` classes or `(N, L)` findings; one that all or no images have is left out.
        scores: `(N, C)` probabilities of the classes, or `(N, L)` scores.

    Raises:
        ValueError: none is left.
    """
    if labels.ndim == 1:
        labels = labels[:, None] == np.arange(scores.shape[1])
    found = [
        roc_auc_score(truth, column) for truth, column in zip(labels.T, scores.T, strict=True) if 0 < truth.mean() < 1
    ]
    if not found:
        raise ValueError("no finding has both values among the test images: AUC is not defined; give more images")
    return float(np.mean(found))


def learnable(train: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Numbers of the classes or findings that some images of both sides have and some have not."""
    if train.ndim == 1:
        train, test = (side[:, None] == np.arange(max(train.max(), test.max()) + 1) for side in (train, test))
    return np.flatnonzero(train.any(0) & ~train.all(0) & test.any(0) & ~test.all(0))


def _auc(features: np.ndarray, labels: np.ndarray, test_features: np.ndarray, test_labels: np.ndarray) -> float:
    if labels.ndim == 1:
        model = fit(features, labels)
        scores = np.zeros((len(test_labels), max(labels.max(), test_labels.max()) + 1))
        scores[:, model.classes_] = model.predict_proba(test_features)
        kept = learnable(labels, test_labels)
        return macro_auc(test_labels[:, None] == kept, scores[:, kept])
    scores = np.zeros(test_labels.shape)
    kept = learnable(labels, test_labels)
    for finding in kept:
        scores[:, finding] = fit(features, labels[:, finding]).predict_proba(test_features)[:, 1]
    return macro_auc(test_labels[:, kept], scores[:, kept])


def fit(features: np.ndarray, labels: np.ndarray) -> Pipeline:
    """A standardisation and a logistic regression."""
    return make_pipeline(StandardScaler(), LogisticRegression(C=STRENGTH, max_iter=2000)).fit(features, labels)
