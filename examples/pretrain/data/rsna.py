"""RSNA Pneumonia Detection as it is published: DICOM files, and boxes as masks.

Layout: `stage_2_train_labels.csv` and `stage_2_train_images/*.dcm`; the test images have no labels and are not read.
Source: Shih et al., Radiology: Artificial Intelligence (2019), kaggle.com/c/rsna-pneumonia-detection-challenge.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from examples.pretrain.data.catalogue import Catalogue
from examples.pretrain.data.published import images_by_stem, read_rows, refuse_without_row
from examples.pretrain.data.reading import Reading

TABLE, IMAGES = "stage_2_train_labels.csv", "stage_2_train_images"
CLASSES = ("no opacity", "opacity")
BOX = ("x", "y", "width", "height")


def is_here(folder: Path) -> bool:
    """Return True if the table of this set is in the folder."""
    return (folder / TABLE).is_file()


def catalogue_of(folder: Path, reading: Reading) -> Catalogue:
    """Return the images with their classes, each its own patient, and masks of the boxes.

    Raises:
        ValueError: an image is in no row, or a row has a target or box that means nothing.
    """
    boxes: dict[str, list[tuple[float, ...]]] = {}
    for row in read_rows(folder / TABLE, ("patientId", *BOX, "Target")):
        mine = boxes.setdefault(row["patientId"], [])
        if row["Target"] not in ("0", "1"):
            raise ValueError(f"{folder / TABLE}: Target must be 0 or 1, got {row['Target']!r} for {row['patientId']}")
        if row["Target"] == "1":
            mine.append(_box(row, folder))
    images = images_by_stem(folder, IMAGES)
    refuse_without_row(images.keys() - boxes.keys(), folder, folder / TABLE)
    stems = sorted(images)

    labels = np.array([int(len(boxes[stem]) > 0) for stem in stems])
    return Catalogue(
        [images[stem] for stem in stems], labels, CLASSES, np.array(stems), None, _Boxes(boxes), "bits", (TABLE,)
    )


@dataclass(frozen=True)
class _Boxes:
    """The masks of images, drawn from boxes."""

    boxes: dict[str, list[tuple[float, ...]]]

    def __call__(self, name: str, shape: tuple[int, int]) -> np.ndarray:
        return boxes_to_mask(self.boxes[PurePosixPath(name).stem], shape)


def _box(row: dict[str, str], folder: Path) -> tuple[float, ...]:
    try:
        box = tuple(float(row[name]) for name in BOX)
    except ValueError:
        box = (math.nan,)
    if not all(map(math.isfinite, box)):
        got = [row[name] for name in BOX]
        raise ValueError(f"{folder / TABLE}: a box must be four numbers, got {got} for {row['patientId']}")
    return box


def boxes_to_mask(boxes: list[tuple[float, ...]], shape: tuple[int, int]) -> np.ndarray:
    """Return boxes `(x, y, width, height)` in pixels as a mask ``shape``, 1 in any of them.

    >>> boxes_to_mask([(1, 0, 2, 1)], (2, 4)).tolist()
    [[0, 1, 1, 0], [0, 0, 0, 0]]
    """
    mask = np.zeros(shape, np.uint8)
    for x, y, width, height in boxes:
        left, top, right, bottom = (max(0, round(edge)) for edge in (x, y, x + width, y + height))
        mask[top:bottom, left:right] = 1
    return mask
