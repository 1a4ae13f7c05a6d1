"""Images from an npz file: MedMNIST's layout, or `images` with what is known about them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from examples.pretrain.data.imageset import ImageSet, check_images, check_length, check_masks, number_classes
from examples.pretrain.data.masks import MaskKind, bits_of, joined_planes
from examples.pretrain.data.reading import Reading
from examples.pretrain.data.resize import resize_all

SPLITS = ("train", "val", "test")


def load_npz(path: Path, size: int, reading: Reading) -> ImageSet:
    """Load the images of an npz file; see :func:`examples.pretrain.data.load_images`."""
    # Opened here: numpy does not close a file that it opened itself and that is not a zip.
    with path.open("rb") as file:
        return _open_npz(path, file, size, reading)


def _open_npz(path: Path, file: BinaryIO, size: int, reading: Reading) -> ImageSet:
    try:
        archive = np.load(file, allow_pickle=False)
    except Exception as error:  # zipfile and numpy raise many kinds on damaged files
        raise ValueError(
            f"{path}: not a readable .npz file (truncated, or of another format): "
            "write it with numpy.savez_compressed, or give a folder of images"
        ) from error
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise ValueError(f"{path}: a single .npy array, not an .npz file: write it with numpy.savez(images=...)")
    with archive:
        keys = set(archive.files)

        def read(key: str) -> np.ndarray:
            return _read_key(path, archive, key)

        try:
            if "images" in keys:
                return _keyed_set(read, keys, size, reading)
            if {"train_images", "train_labels", "test_images", "test_labels"} <= keys:
                return _medmnist_set(read, keys, size)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error.__cause__
    found = ", ".join(sorted(keys)[:12]) + (f" and {len(keys) - 12} more" if len(keys) > 12 else "")
    raise ValueError(
        f"{path}: an .npz file must hold `images` (optionally `labels`, `groups`, `masks`) or the "
        f"MedMNIST keys train_images, train_labels, test_images, test_labels; found {found or 'no keys'}: "
        "rename the arrays, or unpack a zip of image files and give its folder"
    )


def _read_key(path: Path, archive: Any, key: str) -> np.ndarray:
    try:
        array = archive[key]
    except MemoryError as error:
        raise ValueError(
            f"cannot read `{key}`, it states more values than memory holds: the file is damaged, or has to be divided"
        ) from error
    except Exception as error:  # zipfile, its decompressors and numpy's header raise many kinds on damaged files
        if "allow_pickle" not in str(error):
            raise ValueError(f"cannot read `{key}`, the file is damaged: download or write it again") from error
        raise ValueError(
            f"`{key}` is not a plain array and pickled objects are never loaded: "
            "convert it before saving, for example with .astype(str) or .astype(np.int64)"
        ) from error
    if not isinstance(array, np.ndarray):
        raise ValueError(f"`{key}` is not a numpy array: write the file with numpy.savez")
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _keyed_set(read: Callable[[str], np.ndarray], keys: set[str], size: int, reading: Reading) -> ImageSet:
    images = read("images")
    check_images(images)
    _check_sides(images.shape)
    labels: np.ndarray | None = None
    names: tuple[str, ...] = ()
    if "labels" in keys:
        labels, names = _array_labels(read("labels"))
        if "label_names" in keys:
            names = _stated_names(read("label_names"), labels)
    groups = read("groups") if "groups" in keys else None
    masks = read("masks") if "masks" in keys else None
    if masks is not None:
        masks = masks.astype(np.uint8) if masks.dtype == bool else masks
        if masks.ndim == 4 and masks.dtype == np.uint8:
            masks = joined_planes(masks)
            check_masks(masks, images.shape[:3])
        else:
            check_masks(masks, images.shape[:3])
            masks = bits_of(masks, _mask_kind(read("mask_kind") if "mask_kind" in keys else None, reading))
        masks = resize_all(masks, size, Image.Resampling.NEAREST)
    images = resize_all(images, size, Image.Resampling.BILINEAR)
    return ImageSet(images, labels, groups, masks, None, names)


def _stated_names(stated: np.ndarray, labels: np.ndarray) -> tuple[str, ...]:
    """Return the file's own names: one a class, in sorted order of the classes, or one a finding."""
    count = labels.shape[1] if labels.ndim == 2 else len(np.unique(labels))
    kind = "finding" if labels.ndim == 2 else "class"
    if stated.dtype.kind != "U" or stated.shape != (count,) or len(set(stated.tolist())) < count:
        raise ValueError(
            f"`label_names` must be {count} different strings, one a {kind}, got {stated.dtype} of shape "
            f"{stated.shape}: write numpy.array([...names...])"
        )
    return tuple(stated.tolist())


def _check_sides(shape: tuple[int, ...]) -> None:
    """Raise ValueError if one side of grey images looks like an axis of channels."""
    if len(shape) == 3 and min(shape[1:]) in (1, 3, 4) and max(shape[1:]) >= 8:
        raise ValueError(
            f"images must be (N, H, W) grey or (N, H, W, 3) RGB, got shape {shape}, of which one axis looks like "
            "channels: give all axes, or grey images of at least 5 pixels a side"
        )


def _mask_kind(stated: np.ndarray | None, reading: Reading) -> MaskKind | None:
    """Return what the values of masks are, by the file's entry `mask_kind` and the option."""
    kind = reading.mask_kind if stated is None else str(stated)
    if kind is None or (kind in ("classes", "bits") and reading.mask_kind in (None, kind)):
        return kind  # type: ignore[return-value]
    raise ValueError(
        f'`mask_kind` must be "classes" or "bits", and agree with --mask-kind, got {kind!r} and {reading.mask_kind!r}'
    )


def _medmnist_set(read: Callable[[str], np.ndarray], keys: set[str], size: int) -> ImageSet:
    parts = [part for part in SPLITS if {f"{part}_images", f"{part}_labels"} <= keys]
    images, labels = [], []
    for part in parts:
        image, label = read(f"{part}_images"), read(f"{part}_labels")
        check_images(image)
        check_length(f"{part}_labels", label, len(image))
        images.append(image)
        labels.append(label)
    for name, arrays in (("images", images), ("labels", labels)):
        if len({(array.shape[1:], array.dtype) for array in arrays}) > 1:
            kinds = ", ".join(f"{part} {a.shape} {a.dtype}" for part, a in zip(parts, arrays, strict=True))
            raise ValueError(f"{name} of all splits must agree in shape and dtype, got {kinds}")
    classes, names = _array_labels(np.concatenate(labels))
    square = resize_all(np.concatenate(images), size, Image.Resampling.BILINEAR)
    split = np.repeat(parts, [len(image) for image in images])
    return ImageSet(square, classes, None, None, split, names)


def _array_labels(labels: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return labels and their names from ``(N,)`` or ``(N, 1)`` classes or ``(N, L)`` findings."""
    if labels.dtype.kind == "f" and np.isnan(labels).any():
        raise ValueError(
            f"labels must be known, got NaN for {np.isnan(labels).sum()} of {labels.size}: write a class, or 0 or 1, "
            "for each unknown one, or take its image out, before converting to integers"
        )
    if labels.dtype.kind not in "iubUS" or labels.ndim not in (1, 2):
        raise ValueError(
            "labels must be (N,) or (N, 1) classes, integers or strings, or (N, L) findings of 0 and 1, "
            f"got shape {labels.shape} {labels.dtype}: convert with .astype(np.int64) or .astype(np.uint8)"
        )
    if labels.dtype.kind == "i" and (labels == np.iinfo(labels.dtype).min).any() and labels.dtype.itemsize > 1:
        raise ValueError(
            f"labels hold {np.iinfo(labels.dtype).min}, which NaN becomes when it is made an integer: write a class, "
            "or 0 or 1, for each unknown one, or take its image out"
        )
    if labels.ndim == 1 or labels.shape[1] == 1:
        return number_classes(labels.reshape(-1))
    if labels.dtype.kind == "i" and labels.min(initial=0) == -1:
        raise ValueError(
            f"labels of shape {labels.shape} are findings and must be 0 or 1, got -1, for uncertain or unknown, "
            f"{(labels == -1).sum()} times: write 0 or 1 for each, or take its image or column out"
        )
    if labels.dtype.kind in "US" or not np.isin(labels, (0, 1)).all():
        raise ValueError(
            f"labels of shape {labels.shape} are findings and must be 0 or 1, got {np.unique(labels)[:5]}: "
            "give classes as one number an image"
        )
    return labels.astype(np.uint8), tuple(f"finding {i}" for i in range(labels.shape[1]))
