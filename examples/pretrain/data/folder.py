"""Images and labels from a folder of pictures and DICOM files."""

from __future__ import annotations

from pathlib import Path

from examples.pretrain.data import chexpert, nih, rsna, siim
from examples.pretrain.data.cache import Cache
from examples.pretrain.data.catalogue import Catalogue, decode
from examples.pretrain.data.files import image_names
from examples.pretrain.data.imageset import ImageSet
from examples.pretrain.data.label_table import table_of, with_labels
from examples.pretrain.data.reading import Reading
from examples.pretrain.data.tree import by_folders, is_masked, pair_masks

PUBLISHED = (nih, chexpert, rsna, siim)
"""Sets that are read as they are published; each has `is_here` and `catalogue_of`."""


def load_folder(folder: Path, size: int, reading: Reading, progress: bool) -> ImageSet:
    """Load every image of a folder and its sub-folders; see :func:`examples.pretrain.data.load_images`."""
    # Before the images: an error in a table is reported without minutes of reading.
    catalogue = catalogue_of(folder, reading)
    if reading.cache is None:
        return decode(folder, catalogue, size, progress=progress, skip_bad=reading.skip_bad)
    cache = Cache(folder, catalogue, size, reading.cache)
    for _ in cache.fill(progress=progress):
        pass
    return cache.open(skip_bad=reading.skip_bad)


def catalogue_of(folder: Path, reading: Reading) -> Catalogue:
    """Return the images of a folder with the labels of `labels.csv`, of a published set, or of its sub-folders."""
    table = table_of(folder)
    if table is None:
        for published in PUBLISHED:
            if published.is_here(folder):
                return published.catalogue_of(folder, reading)
        _refuse_parent(folder)
    names = image_names(folder)
    if is_masked(names):
        masked = pair_masks(names, folder, reading)
        return masked if table is None else with_labels(masked, table, reading)
    return by_folders(names, folder) if table is None else with_labels(Catalogue(names), table, reading)


def _refuse_parent(folder: Path) -> None:
    """Raise ValueError for a folder above a published set: its images would be read without their labels."""
    for inner in sorted(folder.iterdir()):
        if inner.is_dir() and any(published.is_here(inner) for published in PUBLISHED):
            raise ValueError(f"{folder}: the folder of a published set must be given itself: give {inner}")
