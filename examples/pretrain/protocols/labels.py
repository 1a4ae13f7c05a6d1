"""Few labels: random subsets of them, the classes that they can teach, and the figure of merit.

Findings are 0, 1, or -1 where unknown. What is unknown takes no part: neither in fits, nor in AUC.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from sklearn.metrics import roc_auc_score

from examples.pretrain.ranges import check_range, check_shares

Draws = Iterator[tuple[float, int, np.ndarray]]
"""Fraction, seed and indices of random subsets."""


def kinds_of(labels: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the column of classes, or each finding, with its different values that are known.

    >>> [(column.tolist(), values.tolist()) for column, values in kinds_of(np.array([[1, -1], [0, 1]], np.int8))]
    [([1, 0], [0, 1]), ([-1, 1], [1])]
    """
    if labels.ndim == 1:
        return [(labels, np.unique(labels))]
    return [(column, np.unique(column[column >= 0])) for column in labels.T]


def subset_size(labels: np.ndarray, fraction: float) -> int:
    """Return the size of a subset: the fraction, but at least four images a class, or a value of a finding."""
    least = 4 * max(len(values) for _, values in kinds_of(labels))
    return min(max(round(fraction * len(labels)), least), len(labels))


def label_subset(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Return sorted indices of a random subset with every class, or both values of every finding, at least twice.

    Args:
        labels: `(N,)` classes or `(N, L)` findings.
        fraction: of the images; 1 returns all.
        seed: of the draw; the same for every encoder, so that results can be compared in pairs.

    Raises:
        ValueError: a class is in a single image.
    """
    if fraction == 1:
        return np.arange(len(labels))
    kinds = [(column, value) for column, values in kinds_of(labels) for value in values]
    if any((column == value).sum() < 2 for column, value in kinds):
        raise ValueError(
            f"each class, and each value of a finding, must be in two training images to draw {fraction:.2%} of the "
            "labels, got a single image: a class is too rare; give more images of it, or drop it"
        )
    rng = np.random.default_rng(seed)
    count = subset_size(labels, fraction)
    for _ in range(1000):
        index = np.sort(rng.permutation(len(labels))[:count])
        if all((column[index] == value).sum() >= 2 for column, value in kinds):
            return index
    # Chance alone hardly ever holds many classes or rare ones: two images of each come first.
    index = np.unique([rng.permutation(np.flatnonzero(column == value))[:2] for column, value in kinds])
    others = rng.permutation(np.setdiff1d(np.arange(len(labels)), index))
    return np.sort(np.append(index, others[: max(count - len(index), 0)]))


def label_draws(labels: np.ndarray, fractions: Sequence[float], subsets: int, seed: int) -> Draws:
    """Yield fraction, seed and indices of every subset: one of all labels, `subsets` of each smaller fraction.

    Raises:
        ValueError: a fraction or the number of subsets is out of its range, or a class is too rare.
    """
    check_shares("shares", fractions)
    check_range("subsets", subsets, least=1)
    for fraction in fractions:
        for draw in range(1 if fraction == 1 else subsets):
            own = seed * 1000 + draw
            yield fraction, own, label_subset(labels, fraction, own)


def learnable(train: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Return the classes, or the numbers of the findings, that some images of both sides have and others lack.

    Test images of a class that no training image has do not count, nor do unknown findings.

    >>> learnable(np.array([0, 0, 2]), np.array([0, 1, 2, 3])).tolist()
    [0, 2]
    """
    columns = np.unique(train) if train.ndim == 1 else np.arange(train.shape[1])
    sides = [truth_of(train, columns), truth_of(test[of_known_class(train, test)], columns)]
    return columns[np.all([(side == value).any(0) for side in sides for value in (0, 1)], 0)]


def of_known_class(train: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Return `(M,)` booleans: test images whose class some training image has. Findings are always known."""
    return np.isin(test, train) if train.ndim == 1 else np.ones(len(test), bool)


def truth_of(labels: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Return `(N, C)` int8: whether an image is of each class, or has each finding, of `columns` `(C,)`; -1: unknown.

    >>> truth_of(np.array([[1, -1, 0]], np.int8), np.array([0, 1])).tolist()
    [[1, -1]]
    """
    if labels.ndim == 1:
        return (labels[:, None] == columns).astype(np.int8)
    found = labels[:, columns]
    return (found > 0).astype(np.int8) - (found < 0)


def transfer_auc(train: np.ndarray, test: np.ndarray, columns: np.ndarray, scores: np.ndarray) -> float:
    """Return the macro AUC on test images of a model that learnt from training images.

    Classes or findings that are not :func:`learnable` are left out, and so are test images of a class that no training
    image has: no answer to them is right.

    Args:
        train: labels of the training images, `(N,)` classes or `(N, L)` findings.
        test: the same of the M test images.
        columns: `(C,)` in ascending order, the class or the number of the finding that each column of scores is for.
        scores: `(M, C)` of the test images.

    Raises:
        ValueError: nothing is learnable.

    >>> scores = np.array([[0.9, 0.1], [0.5, 0.5], [0.2, 0.8]])  # of the classes 0 and 2; nobody knew class 1
    >>> transfer_auc(np.array([0, 2, 2]), np.array([0, 1, 2]), np.array([0, 2]), scores)
    1.0
    """
    kept = learnable(train, test)
    asked = of_known_class(train, test)
    return macro_auc(truth_of(test[asked], kept), scores[asked][:, np.searchsorted(columns, kept)])


def macro_auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Return the mean AUC over classes (each against the rest), or over findings.

    Args:
        labels: `(N,)` classes, or `(N, L)` findings; one that all or no images have is left out. AUC of a finding is
            over the images of which it is known.
        scores: `(N, C)` scores of the classes 0 to C - 1, or `(N, L)` scores of the findings.

    Raises:
        ValueError: a class has no column of scores, or nothing is left to score.
    """
    if labels.ndim == 1:
        if labels.min(initial=0) < 0 or labels.max(initial=0) >= scores.shape[1]:
            raise ValueError(
                f"each class must have a column of scores, got classes {labels.min()} to {labels.max()} for "
                f"{scores.shape[1]} columns"
            )
        labels = (labels[:, None] == np.arange(scores.shape[1])).astype(np.int8)
    found = [
        roc_auc_score(truth[truth >= 0] > 0, column[truth >= 0])
        for truth, column in zip(labels.T, scores.T, strict=True)
        if (truth == 0).any() and (truth > 0).any()
    ]
    if not found:
        raise ValueError("no finding has both values among the test images: AUC is not defined; give more images")
    return float(np.mean(found))
