"""A nearest-neighbour probe of held-out training images, cheap enough to run after every epoch of pretraining."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from sklearn.neighbors import KNeighborsRegressor

from examples.pretrain.augment import to_float
from examples.pretrain.data import ImageSet, train_test_split
from examples.pretrain.protocols.labels import learnable, transfer_auc, truth_of
from examples.pretrain.train import Monitor, Run


def knn_monitor(data: ImageSet, *, neighbours: int = 20, most: int = 2000, seed: int = 0) -> Monitor:
    """Return a monitor for :meth:`Run.train` that logs the AUC of a kNN probe as `knn_auc`.

    Cosine distance, votes weighted by its inverse. Collapsed features lower it.

    Args:
        data: the *training* images; a fifth of them is held out from the probe, not from pretraining.
        neighbours: number of votes.
        most: number of images on each side, at most.
        seed: of the split and of the choice of images.

    Raises:
        ValueError: the images have no labels, or labels that a probe cannot be scored by.
    """
    if data.labels is None:
        raise ValueError("a kNN probe needs labels, and these images have none: train without it")
    known, asked = train_test_split(replace(data, split=None), 0.2, seed=seed)
    rng = np.random.default_rng(seed)
    index = [np.sort(rng.permutation(side)[:most]) for side in (known, asked)]
    parts = [data.subset(side) for side in index]
    if not len(learnable(*(data.labels[side] for side in index))):
        raise ValueError(
            "a kNN probe needs labels that tell images apart on both sides of its split, which those of "
            f"{len(known)} and {len(asked)} images do not: train without it"
        )

    def monitor(run: Run) -> dict[str, float]:
        sides = []
        for part in parts:
            assert part.labels is not None
            sides.append((run.encode(to_float(part.images)).numpy(), part.labels))
        return {"knn_auc": knn_auc(sides[0], sides[1], neighbours)}

    return monitor


def knn_auc(train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray], neighbours: int = 20) -> float:
    """Return the macro AUC of votes of the nearest training images, each weighted by the inverse cosine distance.

    What one of the sides lacks is left out, as :func:`transfer_auc` says. Images whose finding is unknown have no vote.

    Args:
        train: features `(N, D)` and labels, `(N,)` classes or `(N, L)` findings.
        test: the same of the images that are asked about.
        neighbours: number of votes.
    """
    columns = learnable(train[1], test[1])
    truth = truth_of(train[1], columns)
    if (truth >= 0).all():
        return transfer_auc(train[1], test[1], columns, _votes(train[0], truth, test[0], neighbours))
    scores = [
        _votes(train[0][known], each[known], test[0], neighbours)
        for each, known in zip(truth.T, truth.T >= 0, strict=True)
    ]
    return transfer_auc(train[1], test[1], columns, np.stack(scores, 1))


def _votes(features: np.ndarray, truth: np.ndarray, asked: np.ndarray, neighbours: int) -> np.ndarray:
    # The mean of 0 and 1 under the weights is the share of the votes.
    votes = KNeighborsRegressor(min(neighbours, len(features)), metric="cosine", weights="distance")
    found: np.ndarray = votes.fit(features, truth.astype(float)).predict(asked)
    return found
