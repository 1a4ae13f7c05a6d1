"""SIIM-ACR Pneumothorax as it is published: DICOM files, and run-length masks.

Layout: `train-rle.csv` and `dicom-images-train/STUDY/SERIES/IMAGE.dcm`. Test images, without labels, are not read.
Source: kaggle.com/c/siim-acr-pneumothorax-segmentation.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from examples.pretrain.data.catalogue import Catalogue
from examples.pretrain.data.published import images_by_stem, read_rows
from examples.pretrain.data.reading import Reading

TABLE, IMAGES = "train-rle.csv", "dicom-images-train"
CLASSES = ("no pneumothorax", "pneumothorax")


def is_here(folder: Path) -> bool:
    """Return True if the table of this set is in the folder."""
    return (folder / TABLE).is_file()


def catalogue_of(folder: Path, reading: Reading) -> Catalogue:
    """Return the images with their classes and masks. The set does not say which images are of one patient.

    Images without a row are left out, with a warning: the published table lacks some.

    Raises:
        ValueError: no image has a row, or a mask is no list of runs.
    """
    runs: dict[str, list[list[int]]] = {}
    for row in read_rows(folder / TABLE, ("ImageId", "EncodedPixels")):
        mine = runs.setdefault(row["ImageId"], [])
        if row["EncodedPixels"] != "-1":
            mine.append(_numbers(row, folder))
    images = images_by_stem(folder, IMAGES)
    stems = sorted(images.keys() & runs.keys(), key=images.__getitem__)
    if not stems:
        raise ValueError(f"{folder}: images must have a row in {TABLE}, and none of {len(images)} has one")
    if len(stems) < len(images):
        warnings.warn(
            f"{folder}: {len(images) - len(stems)} images have no row in {TABLE} and are left out", stacklevel=4
        )

    labels = np.array([int(len(runs[stem]) > 0) for stem in stems])
    return Catalogue(
        [images[stem] for stem in stems], labels, CLASSES, None, None, _Runs(folder, runs), "bits", (TABLE,)
    )


@dataclass(frozen=True)
class _Runs:
    """The masks of images, drawn from runs."""

    folder: Path
    runs: dict[str, list[list[int]]]

    def __call__(self, name: str, shape: tuple[int, int]) -> np.ndarray:
        mask = np.zeros(shape, np.uint8)
        for each in self.runs[PurePosixPath(name).stem]:
            try:
                mask |= runs_to_mask(each, shape)
            except ValueError as error:
                raise ValueError(f"{self.folder / name}: {error}") from error
        return mask


def _numbers(row: dict[str, str], folder: Path) -> list[int]:
    parts = row["EncodedPixels"].split()
    if not parts or len(parts) % 2 or not all(part.isdecimal() for part in parts):
        shown = row["EncodedPixels"][:20]
        raise ValueError(
            f"{folder / TABLE}: EncodedPixels must be -1 or pairs of numbers, got {shown!r} for {row['ImageId']}: "
            "download the table again"
        )
    return [int(part) for part in parts]


def runs_to_mask(runs: list[int], shape: tuple[int, int]) -> np.ndarray:
    """Return pairs (pixels since the last run, pixels of this run) as a mask ``shape``, counted down each column.

    Raises:
        ValueError: the runs end outside of the image.

    >>> runs_to_mask([1, 2, 1, 1], (2, 3)).tolist()
    [[0, 1, 1], [1, 0, 0]]
    """
    height, width = shape
    flat = np.zeros(width * height, np.uint8)
    at = 0
    for gap, length in zip(runs[::2], runs[1::2], strict=True):
        at += gap
        flat[at : at + length] = 1
        at += length
    if at > flat.size:
        raise ValueError(f"the runs of its mask must end within {flat.size} pixels, got {at}: download the table again")
    return flat.reshape(width, height).T
