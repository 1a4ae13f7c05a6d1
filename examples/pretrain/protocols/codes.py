"""Mutual information between the code of a cell and the share of the cell that is masked.

The maps are those that the method quantises or compares with, usually the teacher's. An untrained encoder has only its
own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from sklearn.cluster import MiniBatchKMeans
from sklearn.metrics import mutual_info_score
from sklearn.metrics.cluster import contingency_matrix, expected_mutual_information
from torch import nn
from torch.nn import functional as F

from examples.pretrain.augment import to_float
from examples.pretrain.data import ImageSet
from examples.pretrain.protocols.subject import Protocol, Scores, Settings, Subject
from examples.pretrain.reports import pictures
from examples.pretrain.reports.text import file_name

OTHERS = 5
"""Number of other images whose masks measure what position alone tells."""


def measure(subject: Subject, settings: Settings) -> Scores:
    """Return bits by stage.

    For k-means codes, made alike for every encoder, and for the method's own codes if it has some: the information, and
    the part of it beyond position. The latter is what remains after subtracting the information about other images'
    masks. The entropy of the mask is the upper bound.
    """
    assert subject.masked is not None
    train, test = subject.masked
    assert test.masks is not None
    scores: Scores = {}
    own = own_codes(subject, test) if subject.codes else {}
    encoder = quantised_encoder(subject)
    maps = [subject.run.maps(to_float(side.images), encoder) for side in (train, test)]
    rng = np.random.default_rng(settings.seed)
    for stage, known, asked in zip(subject.encoder.scales, *maps, strict=True):
        truth = covered(test.masks, (asked.shape[2], asked.shape[3]))
        others = [truth[derangement(len(truth), rng)] for _ in range(OTHERS)]
        codes = {"k-means": kmeans(known, asked, settings.clusters, settings.seed)}
        if stage in own:
            codes["own"] = own[stage]
        for kind, found in codes.items():
            all_told = bits(found, truth)
            scores[f"{stage}, {kind}"] = [all_told]
            scores[f"{stage}, {kind} beyond place"] = [all_told - float(np.mean([bits(found, o) for o in others]))]
        scores[f"{stage}, entropy"] = [entropy(truth)]
    return scores


def covered(masks: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Return `(N, H, W)` of 0, 1, 2: nothing of the cell, up to a half, or more than a half is masked."""
    share = F.adaptive_avg_pool2d(torch.from_numpy((masks > 0).astype(np.float32))[:, None], grid)[:, 0].numpy()
    return (share > 0).astype(int) + (share > 0.5)


def kmeans(train: torch.Tensor, test: torch.Tensor, count: int, seed: int) -> np.ndarray:
    """Return codes `(N, H, W)` of the test cells, with centres fitted to the training cells."""
    known, asked = (side.permute(0, 2, 3, 1).reshape(-1, side.shape[1]).numpy() for side in (train, test))
    model = MiniBatchKMeans(min(count, len(known)), n_init=1, batch_size=4096, random_state=seed).fit(known)
    return model.predict(asked).reshape(len(test), *test.shape[2:])


def quantised_encoder(subject: Subject) -> nn.Module:
    """Return the encoder whose maps are quantised: the method's target encoder, if the subject was trained by it."""
    method = subject.run.method
    return getattr(method, "target_encoder", subject.encoder) if subject.encoder is method.encoder else subject.encoder


def own_codes(subject: Subject, data: ImageSet) -> dict[str, np.ndarray]:
    """Return the codes of the method's own codebooks, by stage."""
    found = subject.run.codes(to_float(data.images))
    assert found is not None
    return found


def bits(codes: np.ndarray, truth: np.ndarray) -> float:
    """Return the mutual information minus its expectation for codes of the same frequencies.

    With hundreds of codes and a few thousand cells, chance alone gives tenths of a bit.
    """
    table = contingency_matrix(truth.ravel(), codes.ravel(), sparse=True)
    told = mutual_info_score(None, None, contingency=table) - expected_mutual_information(table, truth.size)
    return float(told / np.log(2))


def entropy(truth: np.ndarray) -> float:
    """Return the entropy of the mask in bits."""
    return float(mutual_info_score(truth.ravel(), truth.ravel()) / np.log(2))


def derangement(count: int, rng: np.random.Generator) -> np.ndarray:
    """Return a permutation without fixed points: one random cycle through all."""
    order = rng.permutation(count)
    found = np.empty(count, int)
    found[order] = np.roll(order, 1)
    return found


def lacking(subject: Subject) -> str | None:
    """Return what the images lack, or None."""
    if subject.masked is None:
        return "masks (give --masks, or data that hold some)"
    masks = subject.masked[1].masks
    assert masks is not None
    return None if len(masks) > 1 and (masks > 0).any() else "masks of two images or more among those to test on"


def draw(subjects: Sequence[Subject], settings: Settings, folder: Path) -> None:
    """Draw the code maps of subjects that have codes of their own."""
    for subject in subjects:
        if subject.codes and subject.masked is not None:
            data = subject.masked[1]
            found, name = own_codes(subject, data), file_name(subject.name)
            pictures.code_maps(data, found, folder / f"codes-{name}-maps.png", codes=subject.run.code_vectors())
            pictures.code_patches(data, next(iter(found.values())), folder / f"codes-{name}-patches.png")


PROTOCOL = Protocol(
    "Mutual information (bits, minus chance) between the code of a cell and the share of the cell that is masked",
    measure,
    lacking,
    draw,
)
