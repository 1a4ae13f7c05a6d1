"""Few labels: random subsets of them, the classes that they can teach, and the figure of merit."""

from __future__ import annotations

import numpy as np
from sklearn.metrics import roc_auc_score


def subset_size(labels: np.ndarray, fraction: float) -> int:
    """Return the size of a subset: the fraction, but at least four images a class, or a value of a finding."""
    columns = labels[:, None] if labels.ndim == 1 else labels
    least = 4 * max(len(np.unique(column)) for column in columns.T)
    return min(max(round(fraction * len(labels)), least), len(labels))


def label_subset(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Return sorted indices of a random subset with every class, or both values of every finding, at least twice.

    Args:
        labels: `(N,)` classes or `(N, L)` findings.
        fraction: of the images; 1 returns all.
        seed: of the draw; the same for every encoder, so that results can be compared in pairs.

    Raises:
        ValueError: a class is too rare.
    """
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


def learnable(train: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Return the numbers of the classes or findings that some, but not all, images of both sides have."""
    if train.ndim == 1:
        train, test = (side[:, None] == np.arange(max(train.max(), test.max()) + 1) for side in (train, test))
    return np.flatnonzero(train.any(0) & ~train.all(0) & test.any(0) & ~test.all(0))


def macro_auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Return the mean AUC over classes (each against the rest), or over findings.

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
