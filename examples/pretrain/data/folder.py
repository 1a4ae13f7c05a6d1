"""Images and labels from a folder of PNG, JPEG and DICOM files."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from examples.pretrain.data.dicom import DICOM_SUFFIXES, is_dicom, read_dicom
from examples.pretrain.data.imageset import ImageSet
from examples.pretrain.data.label_table import labels_of
from examples.pretrain.data.picture import PICTURE_SUFFIXES, is_picture, read_picture
from examples.pretrain.data.resize import resize


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
    return ImageSet(_stack(images), labels, groups, None, None, label_names, np.array(names))


def _image_names(folder: Path) -> list[str]:
    """Return paths relative to ``folder``, with forward slashes, sorted because a listing has no fixed order."""
    names = []
    for path in _files(folder):
        if not path.is_file():
            leads_nowhere = path.is_symlink() and not path.exists()
            if leads_nowhere or path.suffix.lower() in PICTURE_SUFFIXES | DICOM_SUFFIXES:
                raise ValueError(f"{path}: must be a file or a link to one: mend or remove it")
        elif is_picture(path) or is_dicom(path):
            names.append(path.relative_to(folder).as_posix())
    return sorted(names)


def _files(folder: Path) -> Iterator[Path]:
    """Yield the paths in a folder and in its sub-folders, linked ones too; nothing hidden, and each folder once."""
    seen: dict[tuple[int, int], Path] = {}
    to_search = [folder]
    links: list[Path] = []
    while to_search or links:
        # Linked folders come last: a link to a folder that is inside anyway adds nothing, and may be a loop.
        top = to_search.pop() if to_search else links.pop()
        found = top.stat()
        first = seen.setdefault((found.st_dev, found.st_ino), top)
        if first is not top:
            warnings.warn(f"{top} leads to {first}: its images are counted once, as those of {first}", stacklevel=5)
            continue
        for path in sorted(top.iterdir(), reverse=True):
            if path.name.startswith("."):
                continue
            if not path.is_dir():
                yield path
            elif path.is_symlink():
                links.append(path)
            else:
                to_search.append(path)


def _read_image(path: Path) -> np.ndarray:
    try:
        image = read_picture(path) if is_picture(path) else read_dicom(path)
    except Exception as error:  # decoders raise nearly any exception on damaged files
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{path}: cannot be read as an image ({reason}): repair it or take it out of the folder"
        ) from error
    if image.ndim == 3 and (image == image[..., :1]).all():
        return image[..., 0]
    return image


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
