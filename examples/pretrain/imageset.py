"""A set of square images with what is known about each, and the checks and the resizing that make one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Square images and what is known about each.

    Args:
        images: ``(N, S, S)`` grey or ``(N, S, S, 3)`` RGB, uint8 or uint16; the dtype's full range is [0, 1].
        labels: ``(N,)`` int64 classes 0, 1, ..., or ``(N, L)`` uint8 multi-hot findings; None is unlabelled.
        groups: ``(N,)`` integer or string patient ids; None makes every image its own patient.
        masks: ``(N, S, S)`` uint8.
        split: ``(N,)`` "train", "val" or "test", where the source itself names them.
        label_names: one name a class or a finding.

    Raises:
        ValueError: where an array has the wrong dtype or rank, or another length than ``images``.

    >>> data = ImageSet(np.zeros((3, 8, 8), np.uint8), labels=np.array([0, 1, 0]), label_names=("no", "yes"))
    >>> len(data), data.channels, data.subset([0, 2]).labels.tolist()
    (3, 1, [0, 0])
    """

    images: np.ndarray
    labels: np.ndarray | None = None
    groups: np.ndarray | None = None
    masks: np.ndarray | None = None
    split: np.ndarray | None = None
    label_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_images(self.images)
        if self.images.shape[1] != self.images.shape[2]:
            raise ValueError(f"images must be square, got {self.images.shape}: load_images crops and resizes them")
        for name in ("labels", "groups", "masks", "split"):
            array = getattr(self, name)
            if array is not None:
                check_length(name, array, len(self.images))
        if self.labels is not None and (self.labels.ndim not in (1, 2) or self.labels.dtype.kind not in "iu"):
            raise ValueError(
                "labels must be (N,) class numbers or (N, L) 0/1 findings of an integer dtype, "
                f"got {self.labels.shape} {self.labels.dtype}"
            )
        if self.groups is not None:
            check_groups(self.groups)
        if self.masks is not None:
            check_masks(self.masks, self.images.shape[:3])

    def __len__(self) -> int:
        return len(self.images)

    @property
    def channels(self) -> int:
        """1 for grey, 3 for RGB."""
        return 1 if self.images.ndim == 3 else 3

    def subset(self, index: np.ndarray | slice | Sequence[int]) -> ImageSet:
        """The images at ``index`` (integers, a boolean mask or a slice) with all that belongs to them."""
        where = index if isinstance(index, slice) else np.asarray(index)
        if isinstance(where, np.ndarray) and where.size == 0:
            where = where.astype(np.int64)  # an empty list arrives as float

        def pick(array: np.ndarray | None) -> np.ndarray | None:
            return None if array is None else array[where]

        return ImageSet(
            self.images[where],
            pick(self.labels),
            pick(self.groups),
            pick(self.masks),
            pick(self.split),
            self.label_names,
        )


# ---- checks shared by all sources ----


def check_images(images: np.ndarray) -> None:
    if images.dtype not in (np.uint8, np.uint16):
        raise ValueError(
            f"images must be uint8 or uint16, got {images.dtype}: scale to the full range of one of these, "
            "for example np.rint(255 * image).astype(np.uint8) for floats in [0, 1]"
        )
    grey, rgb = images.ndim == 3, images.ndim == 4 and images.shape[-1] == 3
    if not (grey or rgb):
        raise ValueError(
            f"images must be (N, H, W) grey or (N, H, W, 3) RGB, got shape {images.shape}: "
            "drop a channel axis of one with images[..., 0], and give volumes slice by slice"
        )


def check_length(name: str, array: np.ndarray, count: int) -> None:
    if array.ndim == 0 or len(array) != count:
        raise ValueError(
            f"{name} must have one entry for each of the {count} images, got shape {array.shape}: "
            "check that both were written from the same list"
        )


def check_groups(groups: np.ndarray) -> None:
    if groups.ndim != 1 or groups.dtype.kind not in "iuSU":
        raise ValueError(
            f"groups must be (N,) integers or strings, got {groups.shape} {groups.dtype}: "
            "give each patient one whole number or name"
        )


def check_masks(masks: np.ndarray, shape: tuple[int, ...]) -> None:
    if masks.dtype != np.uint8 or masks.shape != shape:
        raise ValueError(
            f"masks must be uint8 of the images' shape {shape}, got {masks.shape} {masks.dtype}: "
            "write them at the size of the images, with .astype(np.uint8)"
        )


def number_classes(values: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
    """Classes 0, 1, ... in sorted order, and their names."""
    if values.dtype.kind == "S":
        values = np.char.decode(values, "utf-8")
    names, codes = np.unique(values, return_inverse=True)
    return codes.reshape(-1).astype(np.int64), tuple(str(name) for name in names.tolist())


# ---- resizing ----


def resize(image: np.ndarray, size: int, filter: Image.Resampling = Image.Resampling.BILINEAR) -> np.ndarray:
    """The centre square of ``(H, W)`` or ``(H, W, 3)`` at ``(size, size)``, in the dtype of the image."""
    if image.ndim == 3:
        return np.stack([resize(image[..., channel], size, filter) for channel in range(3)], axis=-1)
    height, width = image.shape
    side = min(height, width)
    left, top = (width - side) // 2, (height - side) // 2  # whole pixels: half of one would blur
    image = image[top : top + side, left : left + side]
    if side == size:
        return image
    # Pillow filters 16-bit modes in 8 bits or not at all, floats in full depth. Its bilinear filter widens
    # when it shrinks an image, which is the antialiasing, and cannot overshoot the range.
    floats = Image.fromarray(image.astype(np.float32))
    whole: np.ndarray = np.rint(np.asarray(floats.resize((size, size), filter))).astype(image.dtype)
    return whole


def resize_all(images: np.ndarray, size: int, filter: Image.Resampling) -> np.ndarray:
    """``resize`` for an array of images; the array itself where nothing is to be done."""
    if images.shape[1:3] == (size, size):
        return images
    if 0 in images.shape[1:3]:
        raise ValueError(f"images must have at least one pixel, got shape {images.shape}")
    resized = np.empty((len(images), size, size, *images.shape[3:]), images.dtype)
    for target, image in zip(resized, images, strict=True):
        target[...] = resize(image, size, filter)
    return resized
