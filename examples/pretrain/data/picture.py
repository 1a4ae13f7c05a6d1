"""PNG and JPEG files as arrays, decoded by Pillow's decoders of these two formats and no other."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

PICTURE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg"})

FORMATS = ("PNG", "JPEG")
"""Pillow knows dozens more, some of which start other programs. Left to itself, it goes by the content alone."""


def is_picture(path: Path) -> bool:
    """Return True for a PNG or JPEG file, by its suffix."""
    return path.suffix.lower() in PICTURE_SUFFIXES


def read_picture(path: Path) -> np.ndarray:
    """Return a picture as uint8, or as uint16 for 16-bit grey; ``(H, W)`` or RGB ``(H, W, 3)``.

    A PNG named `.jpg` and a JPEG named `.png` are read: both are common, and both are pictures.

    Raises:
        ValueError: the content is of another format, an animation, or larger than Pillow thinks safe.
    """
    try:
        with warnings.catch_warnings():
            # Above 89 million pixels Pillow warns, and refuses only above twice as many.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as file:
                return _pixels(file)
    except UnidentifiedImageError as error:
        raise ValueError("its content is neither PNG nor JPEG, whatever its name says") from error


def _pixels(file: Image.Image) -> np.ndarray:
    # A JPEG of several pictures is a photograph with its previews; a PNG of several is a film.
    frames = getattr(file, "n_frames", 1)
    if file.format == "PNG" and frames > 1:
        raise ValueError(f"it is an animation of {frames} frames, only single pictures are read: split it")
    image = ImageOps.exif_transpose(file)
    if image.mode.startswith("I"):  # 16-bit grey
        return np.asarray(image).astype(np.uint16)
    return np.asarray(image.convert("L" if image.mode in ("1", "L", "LA") else "RGB"))
