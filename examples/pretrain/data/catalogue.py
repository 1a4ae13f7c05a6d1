"""What is known of a folder's images before one is decoded, and the decoding."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from examples.pretrain.data.dicom import read_dicom
from examples.pretrain.data.imageset import ImageSet
from examples.pretrain.data.masks import MaskKind, bits_of
from examples.pretrain.data.picture import is_picture, read_picture
from examples.pretrain.data.resize import resize

MaskOf = Callable[[str, tuple[int, int]], np.ndarray]
"""Returns the mask ``(H, W)`` uint8 of an image, by its name and its own size in the file; can be pickled."""
Decoded = tuple[np.ndarray, np.ndarray | None]


@dataclass(frozen=True)
class Catalogue:
    """The images of a folder, and what its tables say about them; one entry an image, None where unknown."""

    names: list[str]
    """Paths relative to the folder."""
    labels: np.ndarray | None = None
    label_names: tuple[str, ...] = ()
    groups: np.ndarray | None = None
    split: np.ndarray | None = None
    mask_of: MaskOf | None = None
    mask_kind: MaskKind | None = None
    depends: tuple[str, ...] = ()
    """Paths of further files that decide what is decoded, such as those of masks."""

    def subset(self, keep: np.ndarray) -> Catalogue:
        """Return the images where ``keep``, ``(N,)`` booleans, is True."""
        if keep.all():
            return self

        def pick(array: np.ndarray | None) -> np.ndarray | None:
            return None if array is None else array[keep]

        names = [name for name, kept in zip(self.names, keep.tolist(), strict=True) if kept]
        return replace(self, names=names, labels=pick(self.labels), groups=pick(self.groups), split=pick(self.split))


def decode(folder: Path, catalogue: Catalogue, size: int, *, progress: bool, skip_bad: bool) -> ImageSet:
    """Return the images of a catalogue, cropped to the centre square and resized.

    Raises:
        ValueError: an image cannot be read, or none can with `skip_bad`; the message names it.
    """
    images: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    kept: list[int] = []
    left_out: list[str] = []
    numbers = range(len(catalogue.names))
    each = decoded(folder, catalogue, size, numbers)
    for number, found in zip(
        numbers, tqdm(each, folder.name, len(numbers), unit="image", disable=not progress), strict=True
    ):
        if isinstance(found, ValueError):
            if not skip_bad:
                raise ValueError(f"{found}, or leave it out with --skip-bad") from found
            left_out.append(str(found))
            continue
        image, mask = found
        images.append(image)
        kept.append(number)
        if mask is not None:
            masks.append(mask)
    if not images:
        raise ValueError(f"{folder}: none of its {len(left_out)} images can be read, the first: {left_out[0]}")

    def pick(array: np.ndarray | None) -> np.ndarray | None:
        return None if array is None else array[kept]

    return ImageSet(
        stack(images),
        pick(catalogue.labels),
        pick(catalogue.groups),
        bits(folder, np.stack(masks), catalogue.mask_kind) if masks else None,
        pick(catalogue.split),
        catalogue.label_names,
        np.array(catalogue.names)[kept],
        tuple(left_out),
    )


def decoded(folder: Path, catalogue: Catalogue, size: int, numbers: Iterable[int]) -> Iterator[Decoded | ValueError]:
    """Yield image and mask ``(S, S)`` of each of the images `numbers`, or the error of one that cannot be read."""
    for number in numbers:
        name = catalogue.names[number]
        try:
            image = read_image(folder / name)
            mask = None
            if catalogue.mask_of is not None:
                mask = resize(catalogue.mask_of(name, image.shape[:2]), size, Image.Resampling.NEAREST)
        except ValueError as error:
            yield error
        else:
            yield resize(image, size), mask


def bits(folder: Path, masks: np.ndarray, kind: MaskKind | None) -> np.ndarray:
    """Return the masks of a folder as bits; its name is in errors."""
    try:
        return bits_of(masks, kind)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def read_image(path: Path) -> np.ndarray:
    """Return a picture or DICOM image, grey ``(H, W)`` or RGB ``(H, W, 3)``.

    Raises:
        ValueError: it cannot be read; the message names the file.
    """
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


def stack(images: list[np.ndarray], *, deep: bool = False, colour: bool = False) -> np.ndarray:
    """Stack images into one array, with the deepest dtype and the most channels among them.

    Args:
        images: grey or RGB, uint8 or uint16.
        deep: make it uint16 in any case.
        colour: make it RGB in any case.
    """
    deep = deep or any(image.dtype == np.uint16 for image in images)
    colour = colour or any(image.ndim == 3 for image in images)
    for i, image in enumerate(images):
        if colour and image.ndim == 2:
            image = np.repeat(image[..., None], 3, axis=-1)
        if deep and image.dtype == np.uint8:
            image = image.astype(np.uint16) * 257  # 255 * 257 = 65535
        images[i] = image
    return np.stack(images)
