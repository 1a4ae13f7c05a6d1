"""Images from an npz file or a folder, as one square array, and a split that keeps patients apart."""

from __future__ import annotations

import csv
import hashlib
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from PIL import Image, ImageOps
from pydicom.pixels.processing import apply_modality_lut, apply_voi_lut
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from sklearn.model_selection import GroupShuffleSplit, StratifiedGroupKFold
from tqdm import tqdm

PICTURE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg"})
DICOM_SUFFIXES = frozenset({".dcm", ".dicom"})
SPLITS = ("train", "val", "test")


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Square images and what is known about each.

    Args:
        images: `(N, S, S)` grey or `(N, S, S, 3)` RGB, uint8 or uint16; the dtype's full range is [0, 1].
        labels: `(N,)` int64 classes 0, 1, ..., or `(N, L)` uint8 multi-hot findings; None is unlabelled.
        groups: `(N,)` integer or string patient ids; None makes every image its own patient.
        masks: `(N, S, S)` uint8.
        split: `(N,)` "train", "val" or "test", where the source itself names them.
        label_names: one name a class or a finding.

    Raises:
        ValueError: where an array has the wrong dtype or rank, or another length than `images`.

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
        _check_images(self.images)
        if self.images.shape[1] != self.images.shape[2]:
            raise ValueError(
                f"images must be square, got {self.images.shape}: load_images crops and resizes them"
            )
        for name in ("labels", "groups", "masks", "split"):
            array = getattr(self, name)
            if array is not None:
                _check_length(name, array, len(self.images))
        if self.labels is not None and (self.labels.ndim not in (1, 2) or self.labels.dtype.kind not in "iu"):
            raise ValueError(
                "labels must be (N,) class numbers or (N, L) 0/1 findings of an integer dtype, "
                f"got {self.labels.shape} {self.labels.dtype}"
            )
        if self.groups is not None:
            _check_groups(self.groups)
        if self.masks is not None:
            _check_masks(self.masks, self.images.shape[:3])

    def __len__(self) -> int:
        return len(self.images)

    @property
    def channels(self) -> int:
        """1 for grey, 3 for RGB."""
        return 1 if self.images.ndim == 3 else 3

    def subset(self, index: np.ndarray | slice | Sequence[int]) -> ImageSet:
        """The images at `index` (integers, a boolean mask or a slice) with all that belongs to them."""
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


def load_images(path: str | Path, image_size: int, *, progress: bool = True) -> ImageSet:
    """Reads every image of a file or folder, cropped to the centre square and resized.

    `path` is one of

    * a MedMNIST npz: `{train,val,test}_{images,labels}`, `val` optional;
    * an npz with `images` and, where known, `labels`, `groups` and `masks`; other keys are ignored;
    * a folder, searched with its sub-folders, of PNG, JPEG and single-frame DICOM files. Labels come from
      `labels.csv` in it (columns `name`, optionally `group`, then either one column of classes or several
      0/1 columns of findings), else from the names of its first-level sub-folders where there are two or
      more and every image is in one, else there are none.

    Classes are numbered 0, 1, ... in sorted order, and `label_names` keeps what the source called them.
    An RGB picture with three equal channels counts as grey. A folder that mixes 8 and 16 bits becomes
    uint16, one that mixes grey and RGB becomes RGB. DICOM values pass through the rescale and window (or
    lookup tables) stored with them and fill uint16 from the range which BitsStored allows. Pillow decodes
    RGB PNG to 8 bits a channel, whatever the file holds.

    Args:
        path: the file or folder.
        image_size: the side S of the images returned, in pixels.
        progress: whether to show a bar while reading a folder.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        ValueError: `image_size` is below 1, or what is at `path` does not fit the layouts above. The message
            names the file, the rule and the cure.
    """
    if isinstance(image_size, bool) or not isinstance(image_size, int | np.integer):
        raise TypeError(f"image_size must be an int (pixels), got {image_size!r}")
    if image_size < 1:
        raise ValueError(f"image_size must be at least 1 pixel, got {image_size}")
    path = Path(path)
    if path.is_dir():
        return _load_folder(path, int(image_size), progress)
    if path.is_file():
        return _load_npz(path, int(image_size))
    raise FileNotFoundError(f"no file or folder at {path}: give an .npz file or a folder of images")


def train_test_split(
    data: ImageSet, test_fraction: float = 0.25, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Sorted indices of the training and the test images.

    A split that the data names is kept: "train" and "val" against "test". Otherwise no group is on both
    sides. Byte-identical images count as one group, with all images of the groups they are in, so that no
    test image has been seen in training. Single-class labels are stratified as well as whole groups allow.

    Args:
        data: the images.
        test_fraction: share of the test side, in (0, 1); approximate, since groups stay whole. Ignored
            where the data names its split.
        seed: of the shuffle; the same seed gives the same split.

    Raises:
        ValueError: `test_fraction` is outside (0, 1), or the data cannot fill two sides.

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
    """`(N,)` numbers of the components that shared groups and identical images tie together."""
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
    """`(N,)` whether an image is in the test side, or None where stratifying by class cannot be done."""
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


# ---- checks shared by all sources ----


def _check_images(images: np.ndarray) -> None:
    if images.dtype not in (np.uint8, np.uint16):
        raise ValueError(
            f"images must be uint8 or uint16, got {images.dtype}: scale to the full range of one of these, "
            "for example np.rint(255 * image).astype(np.uint8) for floats in [0, 1]"
        )
    grey, rgb = images.ndim == 3, images.ndim == 4 and images.shape[-1] == 3
    if not (grey or rgb):
        raise ValueError(f"images must be (N, H, W) grey or (N, H, W, 3) RGB, got shape {images.shape}")


def _check_length(name: str, array: np.ndarray, count: int) -> None:
    if array.ndim == 0 or len(array) != count:
        raise ValueError(
            f"{name} must have one entry for each of the {count} images, got shape {array.shape}: "
            "check that both were written from the same list"
        )


def _check_groups(groups: np.ndarray) -> None:
    if groups.ndim != 1 or groups.dtype.kind not in "iuSU":
        raise ValueError(
            f"groups must be (N,) integers or strings, got {groups.shape} {groups.dtype}: "
            "give each patient one whole number or name"
        )


def _check_masks(masks: np.ndarray, shape: tuple[int, ...]) -> None:
    if masks.dtype != np.uint8 or masks.shape != shape:
        raise ValueError(
            f"masks must be uint8 of the images' shape {shape}, got {masks.shape} {masks.dtype}: "
            "write them at the size of the images, with .astype(np.uint8)"
        )


def _classes(values: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
    names, codes = np.unique(values, return_inverse=True)
    return codes.reshape(-1).astype(np.int64), tuple(str(name) for name in names.tolist())


def _array_labels(labels: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels as an npz file holds them: `(N,)` or `(N, 1)` classes, `(N, L)` findings."""
    if labels.dtype.kind not in "iubUS" or labels.ndim not in (1, 2):
        raise ValueError(
            "labels must be (N,) or (N, 1) classes, whole numbers or strings, or (N, L) findings of 0 and 1, "
            f"got shape {labels.shape} {labels.dtype}: convert with .astype(np.int64) or .astype(np.uint8)"
        )
    if labels.ndim == 1 or labels.shape[1] == 1:
        return _classes(labels.reshape(-1))
    if labels.dtype.kind in "US" or not np.isin(labels, (0, 1)).all():
        raise ValueError(
            f"labels of shape {labels.shape} are findings and must be 0 or 1, got {np.unique(labels)[:5]}: "
            "give classes as one number an image"
        )
    return labels.astype(np.uint8), tuple(f"finding {i}" for i in range(labels.shape[1]))


# ---- resizing ----


def _resize(image: np.ndarray, size: int, filter: Image.Resampling = Image.Resampling.BILINEAR) -> np.ndarray:
    """The centre square of `(H, W)` or `(H, W, 3)` at `(size, size)`, in the dtype of the image."""
    if image.ndim == 3:
        return np.stack([_resize(image[..., channel], size, filter) for channel in range(3)], axis=-1)
    height, width = image.shape
    if height == width == size:
        return image
    side = min(height, width)
    left, top = (width - side) / 2, (height - side) / 2
    # Pillow filters 16-bit modes in 8 bits or not at all, floats in full depth. Its bilinear filter widens
    # when it shrinks an image, which is the antialiasing, and cannot overshoot the range.
    floats = Image.fromarray(image.astype(np.float32))
    resized = floats.resize((size, size), filter, box=(left, top, left + side, top + side))
    whole: np.ndarray = np.rint(np.asarray(resized)).astype(image.dtype)
    return whole


def _resize_all(images: np.ndarray, size: int, filter: Image.Resampling) -> np.ndarray:
    if images.shape[1:3] == (size, size):
        return images
    if 0 in images.shape[1:3]:
        raise ValueError(f"images must have at least one pixel, got shape {images.shape}")
    resized = np.empty((len(images), size, size, *images.shape[3:]), images.dtype)
    for target, image in zip(resized, images, strict=True):
        target[...] = _resize(image, size, filter)
    return resized


# ---- npz ----


def _load_npz(path: Path, size: int) -> ImageSet:
    try:
        archive = np.load(path, allow_pickle=False)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path}: not a readable .npz file (truncated, or of another format): "
            "write it with numpy.savez_compressed, or give a folder of images"
        ) from error
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise ValueError(
            f"{path}: a single .npy array, not an .npz file: write it with numpy.savez(images=...)"
        )
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
        raise ValueError(
            f"`{key}` is not a plain array and pickled objects are never loaded: "
            "convert it before saving, for example with .astype(str) or .astype(np.int64)"
        ) from error
    if not isinstance(array, np.ndarray):
        raise ValueError(f"`{key}` is not a numpy array: write the file with numpy.savez")
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _keyed_set(read: Callable[[str], np.ndarray], keys: set[str], size: int) -> ImageSet:
    images = read("images")
    _check_images(images)
    labels: np.ndarray | None = None
    names: tuple[str, ...] = ()
    if "labels" in keys:
        raw = read("labels")
        _check_length("labels", raw, len(images))
        labels, names = _array_labels(raw)
    groups = read("groups") if "groups" in keys else None
    masks = read("masks") if "masks" in keys else None
    if masks is not None:
        masks = masks.astype(np.uint8) if masks.dtype == bool else masks
        _check_masks(masks, images.shape[:3])
        masks = _resize_all(masks, size, Image.Resampling.NEAREST)
    images = _resize_all(images, size, Image.Resampling.BILINEAR)
    return ImageSet(images, labels, groups, masks, None, names)


def _medmnist_set(read: Callable[[str], np.ndarray], keys: set[str], size: int) -> ImageSet:
    parts = [part for part in SPLITS if {f"{part}_images", f"{part}_labels"} <= keys]
    images, labels = [], []
    for part in parts:
        image, label = read(f"{part}_images"), read(f"{part}_labels")
        _check_images(image)
        _check_length(f"{part}_labels", label, len(image))
        images.append(image)
        labels.append(label)
    for name, arrays in (("images", images), ("labels", labels)):
        if len({(array.shape[1:], array.dtype) for array in arrays}) > 1:
            kinds = ", ".join(f"{part} {a.shape} {a.dtype}" for part, a in zip(parts, arrays, strict=True))
            raise ValueError(f"{name} of all splits must agree in shape and dtype, got {kinds}")
    classes, names = _array_labels(np.concatenate(labels))
    square = _resize_all(np.concatenate(images), size, Image.Resampling.BILINEAR)
    split = np.repeat(parts, [len(image) for image in images])
    return ImageSet(square, classes, None, None, split, names)


# ---- folder ----


def _load_folder(folder: Path, size: int, progress: bool) -> ImageSet:
    names = _image_names(folder)
    if not names:
        raise ValueError(
            f"{folder}: no images found; a folder must hold .png, .jpg, .jpeg, .dcm or .dicom files, "
            "in itself or in sub-folders"
        )
    # before the images, so that a slip in the table does not cost minutes of reading
    labels, label_names, groups = _folder_labels(folder, names)
    images = [
        _resize(_read_image(folder / name), size)
        for name in tqdm(names, desc=folder.name, unit="image", disable=not progress)
    ]
    return ImageSet(_stack(images), labels, groups, None, None, label_names)


def _image_names(folder: Path) -> list[str]:
    """Paths relative to `folder`, with forward slashes, sorted: a listing alone has no fixed order."""
    names = []
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in name.parts)
        if not hidden and path.is_file() and (_is_picture(path) or _is_dicom(path)):
            names.append(name.as_posix())
    return sorted(names)


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in PICTURE_SUFFIXES


def _is_dicom(path: Path) -> bool:
    if path.suffix.lower() in DICOM_SUFFIXES:
        return True
    if path.suffix or path.name == "DICOMDIR":  # an index of other files, in the same format
        return False
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def _read_image(path: Path) -> np.ndarray:
    try:
        image = _read_picture(path) if _is_picture(path) else _read_dicom(path)
    except Exception as error:  # decoders of foreign bytes raise nearly anything
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


def _read_dicom(path: Path) -> np.ndarray:
    """Grey `(H, W)` uint16, or RGB `(H, W, 3)` uint8 or uint16."""
    dataset = pydicom.dcmread(path)
    if int(dataset.get("NumberOfFrames") or 1) > 1:
        raise ValueError(f"it has {dataset.NumberOfFrames} frames, only single frames are read: split it")
    kind = dataset.PhotometricInterpretation
    pixels = dataset.pixel_array
    bits = dataset.BitsStored
    if pixels.ndim == 3 and kind != "PALETTE COLOR":  # pydicom has turned YBR to RGB
        return _to_uint16(pixels, 0, 2**bits - 1)
    if kind not in ("MONOCHROME1", "MONOCHROME2"):
        raise ValueError(
            f"its photometric interpretation must be MONOCHROME1, MONOCHROME2 or RGB, not {kind}"
        )
    values = apply_modality_lut(pixels, dataset)
    signed = dataset.PixelRepresentation == 1
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    if dataset.get("ModalityLUTSequence"):
        low, high = 0, 2 ** dataset.ModalityLUTSequence[0].LUTDescriptor[2] - 1
    else:
        slope, intercept = dataset.get("RescaleSlope"), dataset.get("RescaleIntercept")
        if slope is not None and intercept is not None:
            low, high = low * slope + intercept, high * slope + intercept
    if dataset.get("VOILUTSequence"):
        values = np.rint(values).astype(np.int64)  # a table is looked up by whole numbers
        low, high = 0, 2 ** dataset.VOILUTSequence[0].LUTDescriptor[2] - 1
    elif dataset.get("WindowCenter") is None or dataset.get("WindowWidth") is None:
        # pydicom's window runs from the image of the lowest stored value to that of the highest, even where
        # a negative slope turns them round; bare values need their bounds in order
        low, high = min(low, high), max(low, high)
    scaled = _to_uint16(apply_voi_lut(values, dataset), low, high)
    return np.invert(scaled) if kind == "MONOCHROME1" else scaled


def _to_uint16(values: np.ndarray, low: float, high: float) -> np.ndarray:
    share = (values.astype(np.float64) - float(low)) / (float(high) - float(low))
    scaled: np.ndarray = np.rint(65535 * share.clip(0, 1)).astype(np.uint16)
    return scaled


def _stack(images: list[np.ndarray]) -> np.ndarray:
    """One array of the deepest dtype and the most channels that any image has."""
    deep = any(image.dtype == np.uint16 for image in images)
    colour = any(image.ndim == 3 for image in images)
    for i, image in enumerate(images):
        if colour and image.ndim == 2:
            image = np.repeat(image[..., None], 3, axis=-1)
        if deep and image.dtype == np.uint8:
            image = image.astype(np.uint16) * 257  # 255 * 257 = 65535
        images[i] = image
    return np.stack(images)


# ---- labels of a folder ----

Labels = tuple[np.ndarray | None, tuple[str, ...], np.ndarray | None]


def _folder_labels(folder: Path, names: list[str]) -> Labels:
    """Labels, their names and the groups of the images `names`."""
    table = folder / "labels.csv"
    if table.is_file():
        try:
            return _table_labels(table, names)
        except (ValueError, csv.Error) as error:
            raise ValueError(f"{table}: {error}") from error
    tops = [name.split("/")[0] for name in names]
    if all("/" in name for name in names) and len(set(tops)) > 1:
        classes, class_names = _classes(np.array(tops))
        return classes, class_names, None
    return None, (), None


def _table_labels(table: Path, names: list[str]) -> Labels:
    with table.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets write a byte order mark
        reader = csv.DictReader(file)
        rows = list(reader)
    header = list(reader.fieldnames or ())
    columns = [column for column in header if column not in ("name", "group")]
    if "name" not in header or not columns or len(set(header)) < len(header):
        raise ValueError(
            "its header must be `name`, optionally `group`, then one or more label columns, all different, "
            f"got {header}"
        )
    by_name: dict[str, dict[str, str]] = {}
    for line, row in enumerate(rows, start=2):
        if None in row or any(value is None or not value.strip() for value in row.values()):
            raise ValueError(f"row {line} must fill each of the {len(header)} columns, got {row}")
        name = row["name"].strip().replace("\\", "/")
        if name in by_name:
            raise ValueError(f"row {line} names {name!r} a second time: keep one row an image")
        by_name[name] = {column: value.strip() for column, value in row.items()}
    missing = [name for name in names if name not in by_name]
    if missing:
        raise ValueError(
            f"{len(missing)} images have no row, first {missing[0]!r}: add a row for each, with the path "
            "relative to the folder as `name`"
        )
    surplus = sorted(set(by_name) - set(names))
    if surplus:
        raise ValueError(f"{len(surplus)} rows name no image, first {surplus[0]!r}: take them out")
    ordered = [by_name[name] for name in names]
    labels, label_names = _column_labels(ordered, columns)
    groups = np.array([row["group"] for row in ordered]) if "group" in header else None
    return labels, label_names, groups


def _column_labels(rows: list[dict[str, str]], columns: list[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    if len(columns) > 1:
        wrong = [(column, row[column]) for row in rows for column in columns if row[column] not in ("0", "1")]
        if wrong:
            raise ValueError(
                f"several label columns are findings and must hold 0 or 1, got {wrong[0][1]!r} in column "
                f"{wrong[0][0]!r}: keep a single column for classes"
            )
        return np.array([[row[column] for column in columns] for row in rows]).astype(np.uint8), tuple(
            columns
        )
    values = [row[columns[0]] for row in rows]
    numbers = [_number(value) for value in values]
    if all(number is not None and number.is_integer() for number in numbers):
        return _classes(np.array([int(number) for number in numbers if number is not None]))
    if all(number is None for number in numbers):
        return _classes(np.array(values))
    raise ValueError(
        f"the classes in column {columns[0]!r} must be all names or all whole numbers, "
        f"got {sorted(set(values))[:5]}"
    )


def _number(value: str) -> float | None:
    try:
        return float(value)
    except ValueError:
        return None
