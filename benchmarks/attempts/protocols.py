"""Scores of perfect embeddings where a class or a finding is missing on one side."""

import numpy as np

from benchmarks.attempts.attempt import Outcome, attempt
from examples.pretrain.protocols.knn import knn_auc
from examples.pretrain.protocols.linear import linear_probe


def _perfect(classes: list[int], counts: list[int], axes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return features that lie along an axis for each class, with little noise, and the classes."""
    labels = np.repeat(classes, counts)
    noise = np.random.default_rng(seed).normal(size=(len(labels), axes))
    return np.eye(axes)[labels] + 0.05 * noise, labels


def _perfect_scores(train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray]) -> Outcome:
    scores = {"kNN": knn_auc(train, test), "linear": linear_probe(train, test, (1.0,))[1.0][0]}
    return Outcome(min(scores.values()) == 1, ", ".join(f"{name} {score:.3f}" for name, score in scores.items()))


@attempt("kNN and linear probe, the middle of three classes only among asked images", right="1.0")
def class_only_asked() -> Outcome:
    return _perfect_scores(_perfect([0, 2], [80, 80], 3, 0), _perfect([0, 1, 2], [20, 8, 20], 3, 1))


@attempt("kNN and linear probe, the middle of three classes only among known images", right="1.0")
def class_only_known() -> Outcome:
    return _perfect_scores(_perfect([0, 1, 2], [80, 8, 80], 3, 0), _perfect([0, 2], [20, 20], 3, 1))


@attempt("kNN and linear probe, the first and the last of five classes on one side each", right="1.0")
def ends_missing() -> Outcome:
    return _perfect_scores(_perfect([1, 2, 3, 4], [30] * 4, 5, 0), _perfect([0, 1, 2, 3], [10] * 4, 5, 1))


@attempt("kNN and linear probe, images of an unknown class lie beyond a known one", right="1.0")
def unknown_class_beyond_known_one() -> Outcome:
    train, test = _perfect([0, 1], [40, 40], 3, 0), _perfect([0, 1, 2], [10, 10, 10], 3, 1)
    test[0][test[1] == 2] = [5, -5, 0]
    return _perfect_scores(train, test)


@attempt("kNN and linear probe, class numbers with gaps up to a billion", right="1.0")
def class_numbers_with_gaps() -> Outcome:
    train, test = _perfect([0, 1, 2], [40] * 3, 3, 0), _perfect([0, 1, 2], [10] * 3, 3, 1)
    numbers = np.array([3, 70, 10**9])
    return _perfect_scores((train[0], numbers[train[1]]), (test[0], numbers[test[1]]))


def _findings(columns: list[np.ndarray]) -> np.ndarray:
    return np.stack(columns, 1).astype(np.uint8)


@attempt("kNN and linear probe, findings that all or none of the known images have", right="1.0")
def constant_findings() -> Outcome:
    train, test = _perfect([0, 1], [60, 60], 2, 0), _perfect([0, 1], [20, 20], 2, 1)
    known = _findings([train[1] == 0, np.ones(120), np.zeros(120)])
    asked = _findings([test[1] == 0, np.arange(40) % 2, np.arange(40) % 3 == 0])
    return _perfect_scores((train[0], known), (test[0], asked))


@attempt("kNN and linear probe, a single column of findings", right="1.0")
def single_finding() -> Outcome:
    train, test = _perfect([0, 1], [60, 60], 2, 0), _perfect([0, 1], [20, 20], 2, 1)
    return _perfect_scores((train[0], train[1][:, None]), (test[0], test[1][:, None]))


@attempt("linear probe on 1% of the labels, one class of four has no test image", right="1.0")
def few_labels() -> Outcome:
    train, test = _perfect([0, 1, 2, 3], [300] * 4, 4, 0), _perfect([0, 2, 3], [50] * 3, 4, 1)
    scores = [score for values in linear_probe(train, test, (0.01, 1.0)).values() for score in values]
    return Outcome(min(scores) == 1, f"lowest of {len(scores)}: {min(scores):.3f}")
