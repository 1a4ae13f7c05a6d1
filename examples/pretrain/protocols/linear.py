"""Linear probe: a logistic regression on frozen features, by share of the labels."""

from __future__ import annotations

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from examples.pretrain.augment import to_float
from examples.pretrain.data import ImageSet
from examples.pretrain.protocols.labels import label_subset, learnable, macro_auc
from examples.pretrain.protocols.subject import Protocol, Scores, Settings, Subject, lacking_labels
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
    for each finding of multi-hot labels, or a multinomial one for classes. AUC is :func:`macro_auc`; a finding that
    all or none of the training images have is left out as well.

    Args:
        train: features `(N, D)` and labels, `(N,)` classes or `(N, L)` findings.
        test: the same of the test images.
        fractions: shares of the training images whose labels are used.
        subsets: number of random subsets of each share below 1.
        seed: of the subsets; the same for every encoder, so that results can be compared in pairs.
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
    """Fit a standardisation and a logistic regression."""
    return make_pipeline(StandardScaler(), LogisticRegression(C=STRENGTH, max_iter=2000)).fit(features, labels)


PROTOCOL = Protocol("Linear probe of the frozen encoder: macro AUC (%) by share of the labels", measure, lacking_labels)
