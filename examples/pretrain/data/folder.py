"""Images and labels from a folder of pictures and DICOM files."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from examples.pretrain.data.catalogue import Catalogue, decode
from examples.pretrain.data.files import image_names
from examples.pretrain.data.imageset import ImageSet, number_classes
from examples.pretrain.data.label_table import labels_of, table_of
from examples.pretrain.data.reading import Reading


def load_folder(folder: Path, size: int, reading: Reading, progress: bool) -> ImageSet:
    """Load every image of a folder and its sub-folders; see :func:`examples.pretrain.data.load_images`."""
    # Before the images: an error in a table is reported without minutes of reading.
    catalogue = catalogue_of(folder)
    return decode(folder, catalogue, size, progress=progress, skip_bad=reading.skip_bad)


def catalogue_of(folder: Path) -> Catalogue:
    """Return the images of a folder with the labels of `labels.csv`, else of its sub-folders."""
    names = image_names(folder)
    table = table_of(folder)
    if table is not None:
        labels, label_names, groups = labels_of(table, names)
        return Catalogue(names, labels, label_names, groups)
    tops = [name.split("/")[0] for name in names]
    if all("/" in name for name in names) and len(set(tops)) > 1:
        classes, class_names = number_classes(np.array(tops))
        return Catalogue(names, classes, class_names)
    return Catalogue(names)
