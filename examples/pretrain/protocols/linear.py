"""Linear probe: a logistic regression on frozen features, by share of the labels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from examples.pretrain.augment import to_float
from examples.pretrain.data import ImageSet
from examples.pretrain.protocols.labels import label_draws, learnable, transfer_auc
from examples.pretrain.protocols.subject import (
    Protocol,
    Scores,
    Settings,
    Subject,
    label_subsets,
    lacking_labels,
)
from examples.pretrain.train import Run

FRACTIONS = (0.01, 0.05, 1.0)
STRENGTH = 0.1
"""Inverse L2 penalty of the probe, the same for every method and share of labels."""


def measure(subject: Subject, settings: Settings) -> Scores:
    """Return the AUC (%) by share of the labels."""
    found = probe_encoder(
        subject.run,
        subject.encoder,
        subject.train,
        subject.test,
        fractions=settings.shares,
        subsets=settings.subsets,
        seed=settings.seed,
    )
    return {f"{100 * float(share):g}%": [100 * value for value in values] for share, values in found.items()}


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
    """Return :func:`linear_probe` of an encoder on images that `run` normalises; keys are "0.01" and so on.

    Raises:
        ValueError: the images have no labels.
    """
    if train.labels is None or test.labels is None:
        raise ValueError("a linear probe needs labels, and these images have none: see load_images for where they go")
    features = [run.encode(to_float(side.images), encoder).numpy() for side in (train, test)]
    scores = linear_probe((features[0], train.labels), (features[1], test.labels), fractions, subsets, seed)
    return {f"{fraction:g}": values for fraction, values in scores.items()}


def linear_probe(
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    fractions: tuple[float, ...] = FRACTIONS,
    subsets: int = 3,
    seed: int = 0,
) -> dict[float, list[float]]:
    """Return macro AUCs on the test images by share of labels, one for each random subset of the training labels.

    Features are standardised with the mean and deviation of the labelled images. Then one logistic regression is fit
    for each finding of multi-hot labels, on the images of which it is known, or a multinomial one for classes. AUC is
    :func:`transfer_auc`, which leaves out what one of the sides lacks.

    Args:
        train: features `(N, D)` and labels, `(N,)` classes or `(N, L)` findings.
        test: the same of the test images.
        fractions: shares of the training images whose labels are used.
        subsets: number of random subsets of each share below 1.
        seed: of the subsets; the same for every encoder, so that results can be compared in pairs.

    Raises:
        ValueError: the labels tell no images apart, or a class is too rare.
    """
    features, labels = train
    check_labels(labels, test[1], fractions, subsets, seed)
    result: dict[float, list[float]] = {}
    for fraction, _, index in label_draws(labels, fractions, subsets, seed):
        result.setdefault(fraction, []).append(_auc(features[index], labels[index], *test))
    return result


def check_labels(
    train: np.ndarray, test: np.ndarray, fractions: Sequence[float] = FRACTIONS, subsets: int = 3, seed: int = 0
) -> None:
    """Raise ValueError unless :func:`linear_probe` can score these labels: before hours of training, for example."""
    if not len(learnable(train, test)):
        raise ValueError(
            "a probe needs labels that tell images apart, in training and in test images: got "
            f"{len(np.unique(train))} different values in training images, {len(np.unique(test))} in test images; give "
            "other labels, or images without labels"
        )
    for _ in label_draws(train, fractions, subsets, seed):
        pass


def _auc(features: np.ndarray, labels: np.ndarray, test_features: np.ndarray, test_labels: np.ndarray) -> float:
    if labels.ndim == 1:
        model = fit(features, labels)
        return transfer_auc(labels, test_labels, model.classes_, model.predict_proba(test_features))
    columns = learnable(labels, test_labels)
    fits = [fit_finding(features, labels[:, finding]).predict_proba(test_features)[:, 1] for finding in columns]
    return transfer_auc(labels, test_labels, columns, np.stack(fits, 1))


def fit(features: np.ndarray, labels: np.ndarray) -> Pipeline:
    """Fit a standardisation and a logistic regression."""
    return make_pipeline(StandardScaler(), LogisticRegression(C=STRENGTH, max_iter=2000)).fit(features, labels)


def fit_finding(features: np.ndarray, finding: np.ndarray) -> Pipeline:
    """Return :func:`fit` on the images whose finding is known, 0 or 1 and not -1."""
    known = finding >= 0
    return fit(features, finding) if known.all() else fit(features[known], finding[known])


PROTOCOL = Protocol(
    "Linear probe of the frozen encoder: macro AUC (%) by share of the labels",
    measure,
    lacking_labels,
    draws=label_subsets,
)
