"""The one entrance for images: a file or a folder in, an :class:`ImageSet` out."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from examples.pretrain.data.cache import Cache
from examples.pretrain.data.folder import catalogue_of, load_folder
from examples.pretrain.data.imageset import ImageSet
from examples.pretrain.data.npz import load_npz
from examples.pretrain.data.reading import Reading


def cache_of(path: str | Path, image_size: int, reading: Reading) -> Cache | None:
    """Return the cache that :func:`load_images` would fill; None for an .npz file, or without `reading.cache`.

    Raises:
        ValueError: as :func:`load_images` does, for all but the decoding.
    """
    path = Path(path)
    if reading.cache is None or not path.is_dir():
        return None
    return Cache(path, catalogue_of(path, reading), image_size, reading.cache)


def load_images(
    path: str | Path, image_size: int, *, reading: Reading | None = None, progress: bool = True
) -> ImageSet:
    """Load every image of a file or folder, cropped to the centre square and resized.

    ``path`` is one of

    * a MedMNIST npz: ``{train,val,test}_{images,labels}``, ``val`` optional;
    * an npz with ``images`` and optionally ``labels``, ``label_names`` (one a class or finding), ``groups``, ``masks``
      and ``mask_kind``. Other keys are ignored. A ``split`` is ignored too, because official splits may put one
      patient on both sides. Masks are ``(N, H, W)`` of bits (structure p is bit p), or of class numbers 1 to 8 if
      ``mask_kind`` is "classes" (255 is ignored), or ``(N, P, H, W)``, one plane a structure;
    * a folder of PNG, JPEG, TIFF, BMP, WebP and single-frame DICOM files, searched with its sub-folders. Labels come
      from ``labels.csv`` in it (columns ``name``, then ``group``, labels or both: one column of classes or several 0/1
      columns of findings). Without that file, folders say what they hold: see
      :func:`examples.pretrain.data.tree.by_folders`, and :func:`examples.pretrain.data.tree.pair_masks` for ``images``
      and ``masks``;
    * a folder of NIH ChestX-ray14, CheXpert, RSNA Pneumonia or SIIM-ACR Pneumothorax as they are published.

    Classes are numbered 0, 1, ... in sorted order; ``label_names`` keeps their original names.
    Names in ``labels.csv`` match files however their accents are composed. Findings that are unknown (blank, NaN) or
    uncertain (-1) are refused unless ``reading`` says what becomes of them.

    In a folder, an RGB picture with three equal channels counts as grey. A mix of 8 and 16 bits becomes uint16, a mix
    of grey and RGB becomes RGB. DICOM values pass through the rescale and window (or lookup tables) stored with them;
    the range that BitsStored allows is mapped to uint16, padding to 0. Pillow decodes RGB PNG to 8 bits a channel. A
    file with the suffix of a picture must hold that format, a PNG or a JPEG; no other decoder is tried. Linked folders
    are searched too, each folder once.

    Args:
        path: the file or folder.
        image_size: the side S of the returned images, in pixels.
        reading: what to do where files leave a choice; None refuses.
        progress: whether to show a progress bar while reading a folder.

    Raises:
        TypeError: ``image_size`` is not an integer.
        FileNotFoundError: there is nothing at ``path``.
        ValueError: ``image_size`` is below 1, or ``path`` does not fit the layouts above. The message names the file,
            the rule and the cure.
    """
    if isinstance(image_size, bool) or not isinstance(image_size, int | np.integer):
        raise TypeError(f"image_size must be an int (pixels), got {image_size!r}")
    if image_size < 1:
        raise ValueError(f"image_size must be at least 1 pixel, got {image_size}")
    path = Path(path)
    reading = Reading() if reading is None else reading
    if path.is_dir():
        return load_folder(path, int(image_size), reading, progress)
    if path.is_file():
        return load_npz(path, int(image_size), reading)
    raise FileNotFoundError(f"no file or folder at {path}: give an .npz file or a folder of images")
