"""PNG, JPEG, TIFF, BMP and WebP files as arrays, decoded by Pillow's decoders of these formats and no other."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = {
    **dict.fromkeys((".png", ".jpg", ".jpeg"), ("PNG", "JPEG")),
    **dict.fromkeys((".tif", ".tiff"), ("TIFF", "PNG", "JPEG")),
    ".bmp": ("BMP", "PNG", "JPEG"),
    ".webp": ("WEBP", "PNG", "JPEG"),
}
"""By suffix. Pillow knows dozens more, some of which start other programs; left to itself, it goes by content alone."""

PICTURE_SUFFIXES = frozenset(FORMATS)


def is_picture(path: Path) -> bool:
    """Return True for a picture in one of the `FORMATS`, by its suffix."""
    return path.suffix.lower() in PICTURE_SUFFIXES


def read_picture(path: Path) -> np.ndarray:
    """Return a picture as uint8, or as uint16 for 16-bit grey; ``(H, W)`` or RGB ``(H, W, 3)``.

    A PNG named `.jpg` and a JPEG named `.tif` are read: both formats are common, and harmless.

    Raises:
        ValueError: the content is of another format, an animation or several pages, larger than Pillow thinks safe, or
            of a depth that would be lost.
    """
    formats = FORMATS[path.suffix.lower()]
    try:
        with warnings.catch_warnings():
            # Above 89 million pixels Pillow warns, and refuses only above twice as many.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=formats) as file:
                _check_depth(path, file)
                return _pixels(file)
    except UnidentifiedImageError as error:
        kinds = " nor ".join(formats)
        raise ValueError(f"its content is neither {kinds}, whatever its name says") from error


def _check_depth(path: Path, file: Image.Image) -> None:
    if file.format == "PNG":
        with path.open("rb") as content:
            depth, colour = content.read(26)[24:]  # of the header, which stands at a fixed place
        if (depth, colour) == (16, 4):
            raise ValueError(
                "it is 16-bit grey with transparency, of which Pillow reads 8 bits: write it without transparency"
            )
    if file.mode == "F":
        raise ValueError("its pixels are floats: scale them to the full range of 8 or 16 bits")


def _pixels(file: Image.Image) -> np.ndarray:
    # A JPEG of several pictures is a photograph with its previews; others of several are films, or pages.
    frames = getattr(file, "n_frames", 1)
    if file.format not in ("JPEG", "MPO") and frames > 1:
        kind = "a file of {} pages" if file.format == "TIFF" else "an animation of {} frames"
        raise ValueError(f"it is {kind.format(frames)}, only single pictures are read: split it")
    image = ImageOps.exif_transpose(file)
    if image.mode.startswith("I"):  # 16-bit grey
        pixels = np.asarray(image)
        if pixels.min(initial=0) < 0 or pixels.max(initial=0) > 65535:
            raise ValueError(f"its pixels must be of 8 or 16 bits, got {pixels.min()} to {pixels.max()}: scale them")
        return pixels.astype(np.uint16)
    return np.asarray(image.convert("L" if image.mode in ("1", "L", "LA") else "RGB"))
