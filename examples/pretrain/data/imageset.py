"""A set of square images with labels, groups and masks, and the checks that all sources share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import numpy as np

from examples.pretrain.data.fingerprint import fingerprint_of
from examples.pretrain.data.stored import stored_or_none


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Square images with optional labels, groups, masks and split.

    Args:
        images: ``(N, S, S)`` grey or ``(N, S, S, 3)`` RGB, uint8 or uint16; the dtype's full range is [0, 1].
            They may be :class:`StoredImages`, which an index reads from their file.
        labels: ``(N,)`` int64 classes 0, 1, ..., or ``(N, L)`` multi-hot findings: uint8 of 0 and 1, or int8 with -1
            for what is unknown; None if unlabelled.
        groups: ``(N,)`` integer or string patient ids; None makes every image its own patient.
        masks: ``(N, S, S)`` uint8.
        split: ``(N,)`` "train", "val" or "test"; None unless the source names them.
        label_names: one name a class or a finding.
        names: ``(N,)`` paths of the images in their folder; None unless they come from one.
        left_out: messages of the files that could not be read and were left out.

    Raises:
        ValueError: an array has the wrong dtype or rank, or another length than ``images``.

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
    names: np.ndarray | None = None
    left_out: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_images(self.images)
        if self.images.shape[1] != self.images.shape[2]:
            raise ValueError(f"images must be square, got {self.images.shape}: load_images crops and resizes them")
        for name in ("labels", "groups", "masks", "split", "names"):
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
        """Number of channels: 1 for grey, 3 for RGB."""
        return 1 if self.images.ndim == 3 else 3

    @cached_property
    def fingerprint(self) -> str:
        """Shape and digests of every image and of all that is known about them; computed once."""
        return fingerprint_of(
            self.images,
            names=self.names,
            labels=self.labels,
            label_names=self.label_names,
            groups=self.groups,
            masks=self.masks,
        )

    def subset(self, index: np.ndarray | slice | Sequence[int]) -> ImageSet:
        """Return the images at ``index`` (integers, a boolean mask or a slice) with their labels, groups and masks."""
        where = index if isinstance(index, slice) else np.asarray(index)
        if isinstance(where, np.ndarray) and where.size == 0:
            where = where.astype(np.int64)  # numpy makes an empty list float

        def pick(array: np.ndarray | None) -> np.ndarray | None:
            return None if array is None else array[where]

        stored = stored_or_none(self.images)
        return ImageSet(
            self.images[where] if stored is None else cast(np.ndarray, stored.select(where)),
            pick(self.labels),
            pick(self.groups),
            pick(self.masks),
            pick(self.split),
            self.label_names,
            pick(self.names),
        )


def check_images(images: np.ndarray) -> None:
    """Raise ValueError unless images are ``(N, H, W)`` or ``(N, H, W, 3)``, uint8 or uint16."""
    if images.dtype not in (np.uint8, np.uint16):
        raise ValueError(
            f"images must be uint8 or uint16, got {images.dtype}: scale to the full range of one of these, "
            "for example np.rint(255 * image).astype(np.uint8) for floats in [0, 1]"
        )
    grey, rgb = images.ndim == 3, images.ndim == 4 and images.shape[-1] == 3
    if not (grey or rgb):
        raise ValueError(
            f"images must be (N, H, W) grey or (N, H, W, 3) RGB, got shape {images.shape}: {_axes_cure(images.shape)}"
        )


def _axes_cure(shape: tuple[int, ...]) -> str:
    """Return what makes images of the right axes; followed to the letter, it must give the right images."""
    first, last = shape[1:2], shape[-1:]
    if len(shape) == 4 and last == (1,):
        return "drop the axis of channels with images[..., 0]"
    if len(shape) == 4 and last == (4,) and first not in ((1,), (3,)):
        return "drop the transparency with images[..., :3]"
    if len(shape) == 4 and first == (1,):
        return "drop the axis of channels with images[:, 0]"
    if len(shape) == 4 and first == (3,):
        return "move the axis of channels to the end with np.moveaxis(images, 1, -1)"
    if len(shape) == 4 and first == (4,):
        return "drop the transparency and move the axis of channels with np.moveaxis(images[:, :3], 1, -1)"
    return "give one image as images[None]" if len(shape) == 2 else "give volumes slice by slice"


def check_length(name: str, array: np.ndarray, count: int) -> None:
    """Raise ValueError unless the array has ``count`` entries."""
    if array.ndim == 0 or len(array) != count:
        raise ValueError(
            f"{name} must have one entry for each of the {count} images, got shape {array.shape}: "
            "check that both were written from the same list"
        )


def check_groups(groups: np.ndarray) -> None:
    """Raise ValueError unless groups are ``(N,)`` integers or strings."""
    if groups.ndim != 1 or groups.dtype.kind not in "iuSU":
        raise ValueError(
            f"groups must be (N,) integers or strings, got {groups.shape} {groups.dtype}: "
            "give each patient one integer or name"
        )


def check_masks(masks: np.ndarray, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless masks are uint8 of ``shape``."""
    if masks.dtype != np.uint8 or masks.shape != shape:
        raise ValueError(
            f"masks must be uint8 of the images' shape {shape}, got {masks.shape} {masks.dtype}: "
            "write them at the size of the images, with .astype(np.uint8)"
        )


def number_classes(values: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return class numbers 0, 1, ... in sorted order of ``values``, and the names of the classes.

    Raises:
        ValueError: there are more classes than half the images, for 10 images or more: they must be names of patients.
    """
    if values.dtype.kind == "S":
        values = np.char.decode(values, "utf-8")
    names, codes = np.unique(values, return_inverse=True)
    if len(values) >= 10 and 2 * len(names) > len(values):
        raise ValueError(
            f"several images must share a class, got {len(names)} classes for {len(values)} images: if they are "
            "patients, give them as groups, in a table with the columns name and group, and a label if there is one"
        )
    return codes.reshape(-1).astype(np.int64), tuple(str(name) for name in names.tolist())
