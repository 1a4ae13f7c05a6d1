"""What codes know of a mask: the mutual information between the code of a cell and the mask's share in it.

Codes of the features that a codebook would quantise: the teacher's, unless the run says otherwise, and those of an
encoder that was never trained.
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

from examples.pretrain import pictures
from examples.pretrain.augment import to_float
from examples.pretrain.data.imageset import ImageSet
from examples.pretrain.protocols.subject import Protocol, Scores, Settings, Subject

OTHERS = 5
"""Masks of other images, for what place alone tells."""


def measure(subject: Subject, settings: Settings) -> Scores:
    """In bits, by stage: with k-means codes, the same procedure for every encoder, and with the own codebook where
    there is one; of each, what is left when what it tells of other images' masks is subtracted, which it has from place
    alone; and the entropy of the mask, which none can exceed."""
    assert subject.masked is not None
    train, test = subject.masked
    assert test.masks is not None
    scores: Scores = {}
    own = own_codes(subject, test) if subject.codes else {}
    encoder = quantised_encoder(subject)
    maps = [subject.run.encode(to_float(side.images), encoder)[1] for side in (train, test)]
    rng = np.random.default_rng(settings.seed)
    for stage, known, asked in zip(subject.encoder.scales, *maps, strict=True):
        truth = covered(test.masks, (asked.shape[2], asked.shape[3]))
        others = [truth[derangement(len(truth), rng)] for _ in range(OTHERS)]
        codes = {"k-means": kmeans(known, asked, subject.run.config.model.codebook_size, settings.seed)}
        if stage in own:
            codes["own"] = own[stage]
        for kind, found in codes.items():
            all_told = bits(found, truth)
            scores[f"{stage}, {kind}"] = [all_told]
            scores[f"{stage}, {kind} beyond place"] = [all_told - float(np.mean([bits(found, o) for o in others]))]
        scores[f"{stage}, entropy"] = [entropy(truth)]
    return scores


def covered(masks: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """`(N, H, W)` of 0, 1, 2: nothing of the cell, up to a half, more than a half is masked."""
    share = F.adaptive_avg_pool2d(torch.from_numpy((masks > 0).astype(np.float32))[:, None], grid)[:, 0].numpy()
    return (share > 0).astype(int) + (share > 0.5)


def kmeans(train: torch.Tensor, test: torch.Tensor, count: int, seed: int) -> np.ndarray:
    """Codes `(N, H, W)` of the test cells, by centres fitted to the training cells."""
    known, asked = (side.permute(0, 2, 3, 1).reshape(-1, side.shape[1]).numpy() for side in (train, test))
    model = MiniBatchKMeans(min(count, len(known)), n_init=1, batch_size=4096, random_state=seed).fit(known)
    return model.predict(asked).reshape(len(test), *test.shape[2:])


def quantised_encoder(subject: Subject) -> nn.Module:
    """Whose maps codebooks are trained on: the teacher's, unless told otherwise, where the encoder has one."""
    run = subject.run
    if subject.encoder is run.model.student.encoder and run.model.quantize == "teacher":
        return run.model.teacher.module.get_submodule("encoder")
    return subject.encoder


def own_codes(subject: Subject, data: ImageSet) -> dict[str, np.ndarray]:
    """By stage."""
    run = subject.run
    assert run.model.quantizer is not None
    maps = run.encode(to_float(data.images), quantised_encoder(subject))[1]
    with torch.no_grad():
        found = run.model.quantizer.eval()([each.to(run.config.device) for each in maps]).indices
    return {stage: codes.cpu().numpy() for stage, codes in zip(subject.encoder.scales, found, strict=True)}


def bits(codes: np.ndarray, truth: np.ndarray) -> float:
    """Mutual information, less what codes of the same frequencies would have by chance: with hundreds of codes and a
    few thousand cells counting alone tells tenths of a bit."""
    table = contingency_matrix(truth.ravel(), codes.ravel(), sparse=True)
    told = mutual_info_score(None, None, contingency=table) - expected_mutual_information(table, truth.size)
    return float(told / np.log(2))


def entropy(truth: np.ndarray) -> float:
    return float(mutual_info_score(truth.ravel(), truth.ravel()) / np.log(2))


def derangement(count: int, rng: np.random.Generator) -> np.ndarray:
    """A permutation in which nothing stays: one random cycle through all."""
    order = rng.permutation(count)
    found = np.empty(count, int)
    found[order] = np.roll(order, 1)
    return found


def lacking(subject: Subject) -> str | None:
    if subject.masked is None:
        return "masks (give --masks, or data that hold some)"
    masks = subject.masked[1].masks
    assert masks is not None
    return None if len(masks) > 1 and (masks > 0).any() else "masks of two images or more among those to test on"


def draw(subjects: Sequence[Subject], settings: Settings, folder: Path) -> None:
    for subject in subjects:
        if subject.codes and subject.masked is not None:
            data = subject.masked[1]
            found = own_codes(subject, data)
            size = subject.run.config.model.codebook_size
            pictures.code_maps(data, found, size, folder / f"codes-{subject.name}-maps.png")
            pictures.code_patches(data, next(iter(found.values())), folder / f"codes-{subject.name}-patches.png")


PROTOCOL = Protocol(
    "Mutual information (bits, less what chance gives) between the code of a cell and the share of it that is masked",
    measure,
    lacking,
    draw,
)
