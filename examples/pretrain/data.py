"""Images from an npz file or a folder, as one square array, and a split that keeps patients apart."""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from sklearn.model_selection import GroupShuffleSplit, StratifiedGroupKFold

from examples.pretrain.folder import load_folder
from examples.pretrain.imageset import ImageSet, check_images, check_length, check_masks, number_classes, resize_all

__all__ = ["ImageSet", "load_images", "train_test_split"]

SPLITS = ("train", "val", "test")


def load_images(path: str | Path, image_size: int, *, progress: bool = True) -> ImageSet:
    """Reads every image of a file or folder, cropped to the centre square and resized.

    ``path`` is one of

    * a MedMNIST npz: ``{train,val,test}_{images,labels}``, ``val`` optional;
    * an npz with ``images`` and, where known, ``labels``, ``groups`` and ``masks``; other keys are ignored, a split
      among them too, since official ones are known to put a patient on both sides;
    * a folder, searched with its sub-folders, of PNG, JPEG and single-frame DICOM files. Labels come from
      ``labels.csv`` in it (columns ``name``, optionally ``group``, then either one column of classes or several
      0/1 columns of findings), else from the names of its first-level sub-folders where there are two or
      more and every image is in one, else there are none.

    Classes are numbered 0, 1, ... in sorted order, and ``label_names`` keeps what the source called them.
    In a folder, an RGB picture with three equal channels counts as grey; 8 and 16 bits mixed become uint16, grey
    and RGB mixed become RGB. DICOM values pass through the rescale and window (or
    lookup tables) stored with them and fill uint16 from the range which BitsStored allows. Pillow decodes
    RGB PNG to 8 bits a channel, whatever the file holds.

    Args:
        path: the file or folder.
        image_size: the side S of the images returned, in pixels.
        progress: whether to show a bar while reading a folder.

    Raises:
        TypeError: ``image_size`` is no whole number.
        FileNotFoundError: there is nothing at ``path``.
        ValueError: ``image_size`` is below 1, or what is at ``path`` does not fit the layouts above. The message
            names the file, the rule and the cure.
    """
    if isinstance(image_size, bool) or not isinstance(image_size, int | np.integer):
        raise TypeError(f"image_size must be an int (pixels), got {image_size!r}")
    if image_size < 1:
        raise ValueError(f"image_size must be at least 1 pixel, got {image_size}")
    path = Path(path)
    if path.is_dir():
        return load_folder(path, int(image_size), progress)
    if path.is_file():
        return _load_npz(path, int(image_size))
    raise FileNotFoundError(f"no file or folder at {path}: give an .npz file or a folder of images")


def train_test_split(data: ImageSet, test_fraction: float = 0.25, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Sorted indices of the training and the test images.

    No group is on both sides. A split that the data names is kept: "train" and "val" against "test".
    Otherwise byte-identical images count as one group, with all images of the groups they are in, so that no
    test image has been seen in training. Single-class labels are stratified as well as whole groups allow.

    Args:
        data: the images.
        test_fraction: share of the test side, in (0, 1); approximate, since groups stay whole. Ignored
            where the data names its split.
        seed: of the shuffle; the same seed gives the same split.

    Raises:
        ValueError: ``test_fraction`` is outside (0, 1), the data cannot fill two sides, or the split that they
            name has a group on both.

    >>> data = ImageSet(np.arange(4 * 64, dtype=np.uint8).reshape(4, 8, 8), groups=np.array([7, 7, 8, 8]))
    >>> train, test = train_test_split(data, 0.5)
    >>> set(data.groups[train]) & set(data.groups[test])
    set()
    """
    if not 0 < test_fraction < 1:
        raise ValueError(f"test_fraction must be between 0 and 1, both excluded, got {test_fraction}")
    if data.split is not None:
        in_test = data.split == "test"
        if in_test.all() or not in_test.any():
            raise ValueError(
                'the split named by the data must hold both "train" and "test" images, got '
                f"{sorted(set(data.split.tolist()))}: drop the split to have one drawn"
            )
        if data.groups is not None:
            both = np.intersect1d(data.groups[in_test], data.groups[~in_test])
            if len(both):
                raise ValueError(
                    f"the split named by the data must keep each group on one side, got {len(both)} groups on both, "
                    f"first {both[0]!s}: drop the split to have one drawn"
                )
        return np.flatnonzero(~in_test), np.flatnonzero(in_test)
    units = _independent_units(data)
    count = int(units.max()) + 1 if len(units) else 0
    if count < 2:
        raise ValueError(
            f"a split needs at least 2 groups of different images, got {count} over {len(data)} images: "
            "add patients, or check the group ids"
        )
    in_test = _stratified(data, units, test_fraction, seed)
    if in_test is None:
        # an absolute number of groups: as a fraction, scikit-learn may round one side down to none
        held_out = min(max(round(test_fraction * count), 1), count - 1)
        shuffle = GroupShuffleSplit(n_splits=1, test_size=held_out, random_state=seed)
        _, index = next(shuffle.split(units, groups=units))
        in_test = np.zeros(len(data), dtype=bool)
        in_test[index] = True
    return np.flatnonzero(~in_test), np.flatnonzero(in_test)


def _independent_units(data: ImageSet) -> np.ndarray:
    """``(N,)`` numbers of the components that shared groups and identical images tie together."""
    count = len(data)
    groups = np.arange(count) if data.groups is None else data.groups
    digests = np.array([hashlib.sha256(image.tobytes()).hexdigest() for image in data.images], dtype="U64")
    _, group = np.unique(groups, return_inverse=True)
    _, content = np.unique(digests, return_inverse=True)
    # a graph of images (first `count` nodes), groups and contents (`count` nodes kept for each)
    image = np.tile(np.arange(count), 2)
    other = np.concatenate([count + group, 2 * count + content])
    edges = coo_array((np.ones(2 * count, np.int8), (image, other)), shape=(3 * count, 3 * count))
    _, component = connected_components(edges, directed=False)
    return np.unique(component[:count], return_inverse=True)[1]


def _stratified(data: ImageSet, units: np.ndarray, test_fraction: float, seed: int) -> np.ndarray | None:
    """``(N,)`` whether an image is in the test side, or None where stratifying by class cannot be done."""
    if data.labels is None or data.labels.ndim != 1:
        return None
    # the test side is `share.numerator` out of `share.denominator` folds
    share = Fraction(test_fraction).limit_denominator(20)
    groups_a_class = [len(np.unique(units[data.labels == label])) for label in np.unique(data.labels)]
    if not 0 < share < 1 or min(groups_a_class) < share.denominator:
        return None
    folds = StratifiedGroupKFold(share.denominator, shuffle=True, random_state=seed)
    in_test = np.zeros(len(data), dtype=bool)
    for fold, (_, index) in enumerate(folds.split(units, data.labels, units)):
        if fold < share.numerator:
            in_test[index] = True
    # very uneven groups may leave folds empty
    return in_test if in_test.any() and not in_test.all() else None


# ---- npz ----


def _load_npz(path: Path, size: int) -> ImageSet:
    with path.open("rb") as file:  # numpy leaves a file that it opened itself open where it is no zip
        return _open_npz(path, file, size)


def _open_npz(path: Path, file: BinaryIO, size: int) -> ImageSet:
    try:
        archive = np.load(file, allow_pickle=False)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
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
                return _keyed_set(read, keys, size)
            if {"train_images", "train_labels", "test_images", "test_labels"} <= keys:
                return _medmnist_set(read, keys, size)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error.__cause__
    found = ", ".join(sorted(keys)[:12]) + (f" and {len(keys) - 12} more" if len(keys) > 12 else "")
    raise ValueError(
        f"{path}: an .npz file must hold `images` (with `labels`, `groups`, `masks` where known) or the "
        f"MedMNIST keys train_images, train_labels, test_images, test_labels; found {found or 'no keys'}: "
        "rename the arrays, or unpack a zip of image files and give its folder"
    )


def _read_key(path: Path, archive: Any, key: str) -> np.ndarray:
    try:
        array = archive[key]
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"cannot read `{key}`, the file is damaged: fetch or write it anew") from error
    except ValueError as error:
        if "allow_pickle" not in str(error):  # fewer bytes than the array's header promises, or no header
            raise ValueError(f"cannot read `{key}`, the file is damaged: fetch or write it anew") from error
        raise ValueError(
            f"`{key}` is not a plain array and pickled objects are never loaded: "
            "convert it before saving, for example with .astype(str) or .astype(np.int64)"
        ) from error
    if not isinstance(array, np.ndarray):
        raise ValueError(f"`{key}` is not a numpy array: write the file with numpy.savez")
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _keyed_set(read: Callable[[str], np.ndarray], keys: set[str], size: int) -> ImageSet:
    images = read("images")
    check_images(images)
    labels: np.ndarray | None = None
    names: tuple[str, ...] = ()
    if "labels" in keys:
        labels, names = _array_labels(read("labels"))
    groups = read("groups") if "groups" in keys else None
    masks = read("masks") if "masks" in keys else None
    if masks is not None:
        masks = masks.astype(np.uint8) if masks.dtype == bool else masks
        check_masks(masks, images.shape[:3])
        masks = resize_all(masks, size, Image.Resampling.NEAREST)
    images = resize_all(images, size, Image.Resampling.BILINEAR)
    return ImageSet(images, labels, groups, masks, None, names)


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
    """Labels as an npz file holds them: ``(N,)`` or ``(N, 1)`` classes, ``(N, L)`` findings."""
    if labels.dtype.kind not in "iubUS" or labels.ndim not in (1, 2):
        raise ValueError(
            "labels must be (N,) or (N, 1) classes, whole numbers or strings, or (N, L) findings of 0 and 1, "
            f"got shape {labels.shape} {labels.dtype}: convert with .astype(np.int64) or .astype(np.uint8)"
        )
    if labels.ndim == 1 or labels.shape[1] == 1:
        return number_classes(labels.reshape(-1))
    if labels.dtype.kind in "US" or not np.isin(labels, (0, 1)).all():
        raise ValueError(
            f"labels of shape {labels.shape} are findings and must be 0 or 1, got {np.unique(labels)[:5]}: "
            "give classes as one number an image"
        )
    return labels.astype(np.uint8), tuple(f"finding {i}" for i in range(labels.shape[1]))
