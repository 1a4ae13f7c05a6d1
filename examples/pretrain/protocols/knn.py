"""A nearest-neighbour probe of held-out training images, cheap enough to run after every epoch of pretraining."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from sklearn.neighbors import KNeighborsClassifier

from examples.pretrain.augment import to_float
from examples.pretrain.data import ImageSet, train_test_split
from examples.pretrain.protocols.labels import macro_auc
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
        ValueError: the images have no labels.
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
            sides.append((run.encode(to_float(part.images)).numpy(), part.labels))
        return {"knn_auc": knn_auc(sides[0], sides[1], neighbours)}

    return monitor


def knn_auc(train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray], neighbours: int = 20) -> float:
    """Return the macro AUC of votes of the nearest training images, each weighted by the inverse cosine distance."""
    classifier = KNeighborsClassifier(min(neighbours, len(train[0])), metric="cosine", weights="distance")
    found = classifier.fit(*train).predict_proba(test[0])
    if train[1].ndim == 2:
        # A finding that no training image has gets no vote.
        found = np.stack([each[:, 1] if each.shape[1] == 2 else np.zeros(len(each)) for each in found], 1)
    return macro_auc(test[1], found)
