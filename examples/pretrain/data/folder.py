"""Images and labels from a folder of PNG, JPEG and DICOM files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from examples.pretrain.data.dicom import is_dicom, read_dicom
from examples.pretrain.data.imageset import ImageSet
from examples.pretrain.data.label_table import labels_of
from examples.pretrain.data.resize import resize

PICTURE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg"})


def load_folder(folder: Path, size: int, progress: bool) -> ImageSet:
    """Load every image of a folder and its sub-folders; see :func:`examples.pretrain.data.load_images`."""
    names = _image_names(folder)
    if not names:
        raise ValueError(
            f"{folder}: no images found; a folder must hold .png, .jpg, .jpeg, .dcm or .dicom files, "
            "in itself or in sub-folders"
        )
    # Before the images: an error in the table is reported without minutes of reading.
    labels, label_names, groups = labels_of(folder, names)
    images = [
        resize(_read_image(folder / name), size)
        for name in tqdm(names, desc=folder.name, unit="image", disable=not progress)
    ]
    return ImageSet(_stack(images), labels, groups, None, None, label_names)


def _image_names(folder: Path) -> list[str]:
    """Return paths relative to ``folder``, with forward slashes, sorted because a listing has no fixed order."""
    names = []
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in name.parts)
        if not hidden and path.is_file() and (_is_picture(path) or is_dicom(path)):
            names.append(name.as_posix())
    return sorted(names)


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in PICTURE_SUFFIXES


def _read_image(path: Path) -> np.ndarray:
    try:
        image = _read_picture(path) if _is_picture(path) else read_dicom(path)
    except Exception as error:  # decoders raise nearly any exception on damaged files
        raise ValueError(
            f"{path}: cannot be read as an image ({error}): repair it or take it out of the folder"
        ) from error
    if image.ndim == 3 and (image == image[..., :1]).all():
        return image[..., 0]
    return image


def _read_picture(path: Path) -> np.ndarray:
    with Image.open(path) as file:
        image = ImageOps.exif_transpose(file)
        if image.mode.startswith("I"):  # 16-bit grey
            return np.asarray(image).astype(np.uint16)
        return np.asarray(image.convert("L" if image.mode in ("1", "L", "LA") else "RGB"))


def _stack(images: list[np.ndarray]) -> np.ndarray:
    """Stack images into one array, with the deepest dtype and the most channels among them."""
    deep = any(image.dtype == np.uint16 for image in images)
    colour = any(image.ndim == 3 for image in images)
    for i, image in enumerate(images):
        if colour and image.ndim == 2:
            image = np.repeat(image[..., None], 3, axis=-1)
        if deep and image.dtype == np.uint8:
            image = image.astype(np.uint16) * 257  # 255 * 257 = 65535
        images[i] = image
    return np.stack(images)
