"""Linear probes: how much labels a frozen encoder needs."""

from __future__ import annotations

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from examples.dissect.augment import to_float
from examples.dissect.imageset import ImageSet
from examples.dissect.train import Run

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
    one for each finding of multi-hot labels, a multinomial one for classes. AUC is the mean over findings, or over
    classes each against the rest; a finding that the test images all have or all lack has no AUC and is left out.

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


def label_subset(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Sorted indices of a random subset that holds every class, or both values of every finding, at least twice."""
    if fraction == 1:
        return np.arange(len(labels))
    columns = labels[:, None] if labels.ndim == 1 else labels
    values = [np.unique(column) for column in columns.T]
    rng = np.random.default_rng(seed)
    count = max(round(fraction * len(labels)), 4 * max(map(len, values)))
    for _ in range(1000):
        index = np.sort(rng.permutation(len(labels))[:count])
        drawn = columns[index].T
        if all((column == value).sum() >= 2 for column, own in zip(drawn, values, strict=True) for value in own):
            return index
    raise ValueError(
        f"no subset of {count} of {len(labels)} labels holds every class twice: a class is too rare for a share of "
        f"{fraction:g}; give more images or drop the class"
    )


def _auc(features: np.ndarray, labels: np.ndarray, test_features: np.ndarray, test_labels: np.ndarray) -> float:
    if labels.ndim == 1:
        scores = _fit(features, labels).predict_proba(test_features)
        if scores.shape[1] == 2:
            return float(roc_auc_score(test_labels, scores[:, 1]))
        return float(roc_auc_score(test_labels, scores, multi_class="ovr", average="macro"))
    found = [
        roc_auc_score(truth, _fit(features, column).predict_proba(test_features)[:, 1])
        for column, truth in zip(labels.T, test_labels.T, strict=True)
        if 0 < truth.mean() < 1
    ]
    if not found:
        raise ValueError("no finding has both values among the test images: AUC is not defined; give more images")
    return float(np.mean(found))


def _fit(features: np.ndarray, labels: np.ndarray):
    return make_pipeline(StandardScaler(), LogisticRegression(C=STRENGTH, max_iter=2000)).fit(features, labels)
