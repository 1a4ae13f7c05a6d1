"""Position in the chest, predicted from single cells of the feature maps by ridge regression; and a t-SNE of cells."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from sklearn.linear_model import RidgeCV
from sklearn.manifold import TSNE
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from examples.pretrain.augment import to_float
from examples.pretrain.data import ImageSet
from examples.pretrain.protocols.subject import Protocol, Scores, Settings, Subject
from examples.pretrain.reports.figure import new_figure, save_figure
from examples.pretrain.reports.text import caption

IMAGES = 400
"""Number of images to fit on, and to test on."""


def cells(subject: Subject, data: ImageSet, count: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return by stage the features of all cells `(M, C)`, and their places `(M, 2)`: row and column from -1 to 1.

    A stage whose map is a single cell has no places to tell apart, and is left out.
    """
    some = data.subset(slice(0, count))
    found = {}
    maps = subject.run.maps(to_float(some.images), subject.encoder)
    for stage, features in zip(subject.encoder.scales, maps, strict=True):
        n, channels, height, width = features.shape
        if height * width == 1:
            continue
        rows, columns = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
        place = np.tile(np.stack([rows.ravel(), columns.ravel()], 1), (n, 1))
        found[stage] = features.permute(0, 2, 3, 1).reshape(-1, channels).numpy(), place
    return found


def measure(subject: Subject, settings: Settings) -> Scores:
    """Return the explained variance (%) of row and column, by stage."""
    train, test = (cells(subject, side, IMAGES) for side in (subject.train, subject.test))
    scores: Scores = {}
    for stage, (features, place) in train.items():
        model = make_pipeline(StandardScaler(), RidgeCV(np.logspace(-2, 4, 7))).fit(features, place)
        left = ((test[stage][1] - model.predict(test[stage][0])) ** 2).mean(0)
        explained = 1 - left / test[stage][1].var(0)
        for axis, value in zip(("row", "column"), explained, strict=True):
            scores[f"{stage}, {axis}"] = [100 * float(value)]
    return scores


def draw(subjects: Sequence[Subject], settings: Settings, folder: Path) -> None:
    """Draw a t-SNE of cells of the finest stage, coloured by place."""
    figure = new_figure(figsize=(3.4 * len(subjects) + 1.6, 3.6), layout="constrained")
    *panels, legend = figure.subplots(1, len(subjects) + 1, width_ratios=[3.4] * len(subjects) + [1.2])
    for axes, subject in zip(panels, subjects, strict=True):
        stage, (features, place) = next(iter(cells(subject, subject.test, 40).items()))
        # t-SNE's own default, or what a few cells allow.
        near = min(30.0, (len(features) - 1) / 3)
        tsne = TSNE(perplexity=near, random_state=settings.seed, init="pca")
        flat = tsne.fit_transform(StandardScaler().fit_transform(features))
        axes.scatter(*flat.T, c=tint(place), s=4, linewidths=0)
        axes.set(xticks=[], yticks=[])
        score = measure(subject, settings)
        r2 = " and ".join(f"{axis} {score[f'{stage}, {axis}'][0]:.0f}%" for axis in ("row", "column"))
        axes.set_title(f"{caption(subject.name)}, {stage}\nexplained: {r2}")
    side = np.linspace(-1, 1, 64)
    rows, columns = np.meshgrid(side, side, indexing="ij")
    legend.imshow(tint(np.stack([rows.ravel(), columns.ravel()], 1)).reshape(64, 64, 3))
    legend.set(xticks=[], yticks=[])
    legend.set_title("place in the image")
    save_figure(figure, folder / "anatomy.png", dpi=110)


def tint(place: np.ndarray) -> np.ndarray:
    """Return a colour `(M, 3)` for each place: blue to yellow by row, green to red by column."""
    row, column = (place.T + 1) / 2
    return np.clip(
        np.stack([0.15 + 0.8 * column, 0.15 + 0.75 * (1 - column) * 0.6 + 0.35 * row, 0.95 - 0.85 * row], 1), 0, 1
    )


def lacking(subject: Subject) -> str | None:
    """Return what the images lack, or None."""
    return None if cells(subject, subject.test, 1) else "larger images: each map of the encoder is a single cell"


PROTOCOL = Protocol(
    "Anatomy: variance (%) of a cell's place that a ridge regression explains from its features, on test images",
    measure,
    lacking,
    draw,
)
