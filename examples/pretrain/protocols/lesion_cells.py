"""Per-cell lesion probe: average precision of a logistic regression on single cells of the frozen feature maps.

A cell belongs to a lesion if the mask covers any of its pixels. What pooled features lose, such as a nodule in one cell
of many, this probe can still see.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from sklearn.metrics import average_precision_score
from sklearn.pipeline import Pipeline
from torch import Tensor

from examples.pretrain.augment import to_float
from examples.pretrain.data import ImageSet
from examples.pretrain.protocols.linear import fit
from examples.pretrain.protocols.subject import (
    Protocol,
    Scores,
    Settings,
    Subject,
    lacking_masks,
    plane_names,
    planes,
)
from examples.pretrain.reports.figure import color_scale, new_figure, save_figure
from examples.pretrain.reports.pictures import show
from examples.pretrain.reports.text import caption

IMAGES = 1000
"""Largest number of images to fit on."""


class Lesion(NamedTuple):
    """The cells of one kind of mask at one stage."""

    name: str
    """Of the mask."""
    scale: int
    """Number of the stage among those whose maps the encoder returns."""
    known: np.ndarray
    """`(N, H, W)` booleans of the training images."""
    truth: np.ndarray
    """The same of the test images."""


def measure(subject: Subject, settings: Settings) -> Scores:
    """Return the average precision (%) on all test cells by lesion and stage, and the share of cells in the lesion.

    The share is the average precision of cells in random order.
    """
    scores: Scores = {}
    for lesion, model, asked in probes(subject):
        column = f"{lesion.name}, {subject.encoder.scales[lesion.scale]}"
        found = average_precision_score(lesion.truth.ravel(), model.decision_function(rows(asked)))
        scores[column] = [100 * float(found)]
        scores[f"{column} by chance"] = [100 * float(lesion.truth.mean())]
    return scores


def sides_of(subject: Subject) -> tuple[ImageSet, ImageSet]:
    """Return the images with masks to fit on, and to test on."""
    assert subject.masked is not None
    train, test = subject.masked
    return train.subset(slice(0, IMAGES)), test


def lesions(subject: Subject) -> Iterator[Lesion]:
    """Yield the kinds of masks at each stage, but for those that all or no cells of a side belong to."""
    train, test = sides_of(subject)
    names = plane_names(train, test)
    one = subject.run.maps(to_float(test.subset([0]).images), subject.encoder)
    for scale, features in enumerate(one):
        grid = (features.shape[2], features.shape[3])
        known, truth = (lesion_cells(side, len(names), grid) for side in (train, test))
        for plane, name in enumerate(names):
            if all(0 < each[:, plane].mean() < 1 for each in (known, truth)):
                yield Lesion(name, scale, known[:, plane], truth[:, plane])


def probes(subject: Subject) -> Iterator[tuple[Lesion, Pipeline, Tensor]]:
    """Yield each lesion, its fitted probe, and the test map `(N, C, H, W)` of its stage."""
    known, asked = (subject.run.maps(to_float(side.images), subject.encoder) for side in sides_of(subject))
    for lesion in lesions(subject):
        yield lesion, fit(rows(known[lesion.scale]), lesion.known.ravel()), asked[lesion.scale]


def rows(features: Tensor) -> np.ndarray:
    """Return the cells of maps `(N, C, H, W)` as rows `(N H W, C)`."""
    return features.movedim(1, -1).flatten(0, 2).numpy()


def lesion_cells(data: ImageSet, count: int, grid: tuple[int, int]) -> np.ndarray:
    """Return `(N, P, H, W)` booleans: whether a mask covers any pixel of a cell; P planes on a grid of H x W cells."""
    assert data.masks is not None
    pixels = planes(data.masks, count)
    # As adaptive pooling cuts an image that the grid does not divide.
    edges = [[(at * pixels.shape[2] // cells, -(-(at + 1) * pixels.shape[2] // cells)) for at in range(cells)]
             for cells in grid]  # fmt: skip
    found = [[pixels[:, :, top:bottom, left:right].any((2, 3)) for left, right in edges[1]] for top, bottom in edges[0]]
    return np.moveaxis(np.array(found), (2, 3), (0, 1))


def draw(subjects: Sequence[Subject], settings: Settings, folder: Path) -> None:
    """Draw the probability of a lesion in each cell of the second stage over test images, one picture."""
    test = sides_of(subjects[0])[1]
    names, scales = plane_names(*sides_of(subjects[0])), subjects[0].encoder.scales
    scale = min(1, len(scales) - 1)
    truth = planes(test.masks, len(names))  # type: ignore[arg-type]
    shown = [(plane, image) for plane in range(len(names)) for image in np.flatnonzero(truth[:, plane].any((1, 2)))[:3]]
    figure = new_figure(figsize=(1.3 * len(shown) + 1.0, 1.35 * len(subjects) + 0.5), layout="constrained")
    grid = figure.subplots(len(subjects), len(shown), squeeze=False)
    for row, subject in zip(grid, subjects, strict=True):
        found = {lesion.name: (model, asked) for lesion, model, asked in probes(subject) if lesion.scale == scale}
        for axes, (plane, image) in zip(row, shown, strict=True):
            show(axes, test.images[image])
            if names[plane] in found:
                model, asked = found[names[plane]]
                cells = model.predict_proba(rows(asked[image : image + 1]))[:, 1].reshape(asked.shape[2:])
                side = test.images.shape[1]
                extent = (-0.5, side - 0.5, side - 0.5, -0.5)
                axes.imshow(cells, cmap="inferno", alpha=0.55, extent=extent, vmin=0, vmax=1)
            axes.contour(truth[image, plane], levels=[0.5], colors="#4cc9f0", linewidths=1)
            axes.set_title(caption(names[plane], 20), fontsize=9)
        row[0].set_ylabel(caption(subject.name))
    figure.colorbar(color_scale("inferno"), ax=grid, label="probability", shrink=0.8, aspect=30)
    figure.suptitle(f"probability of a lesion by cell of {scales[scale]}, lesion outlined")
    save_figure(figure, folder / "lesion-cells.png", dpi=110)


def lacking(subject: Subject) -> str | None:
    """Return what the images lack, or None."""
    missing = lacking_masks(subject)
    if missing is not None:
        return missing
    return None if any(True for _ in lesions(subject)) else "masks that some cells have and others have not"


PROTOCOL = Protocol(
    "Per-cell lesion probe: average precision (%) of a logistic regression on single cells of the frozen maps",
    measure,
    lacking,
    draw,
)
