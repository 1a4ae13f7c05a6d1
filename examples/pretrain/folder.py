"""Images and labels from a folder of PNG, JPEG and DICOM files."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pydicom
from PIL import Image, ImageOps
from pydicom.pixels.processing import apply_modality_lut, apply_voi_lut
from tqdm import tqdm

from examples.pretrain.imageset import ImageSet, number_classes, resize

PICTURE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg"})
DICOM_SUFFIXES = frozenset({".dcm", ".dicom"})


def load_folder(folder: Path, size: int, progress: bool) -> ImageSet:
    names = _image_names(folder)
    if not names:
        raise ValueError(
            f"{folder}: no images found; a folder must hold .png, .jpg, .jpeg, .dcm or .dicom files, "
            "in itself or in sub-folders"
        )
    # before the images, so that a slip in the table does not cost minutes of reading
    labels, label_names, groups = _folder_labels(folder, names)
    images = [
        resize(_read_image(folder / name), size)
        for name in tqdm(names, desc=folder.name, unit="image", disable=not progress)
    ]
    return ImageSet(_stack(images), labels, groups, None, None, label_names)


def _image_names(folder: Path) -> list[str]:
    """Paths relative to ``folder``, with forward slashes, sorted: a listing alone has no fixed order."""
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
    if path.name == "DICOMDIR":  # an index of other files, in the same format
        return False
    # exports often name a file by its UID, and the last part of 1.2.840.10008 is no suffix
    if path.suffix and not path.suffix[1:].isdigit():
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
    """Grey ``(H, W)`` or RGB ``(H, W, 3)``, uint16."""
    dataset = pydicom.dcmread(path)
    if int(dataset.get("NumberOfFrames") or 1) > 1:
        raise ValueError(f"it has {dataset.NumberOfFrames} frames, only single frames are read: split it")
    kind = dataset.PhotometricInterpretation
    pixels = dataset.pixel_array
    bits = dataset.BitsStored
    if pixels.ndim == 3 and kind != "PALETTE COLOR":  # pydicom has turned YBR to RGB
        return _to_uint16(pixels, 0, 2**bits - 1)
    if kind not in ("MONOCHROME1", "MONOCHROME2"):
        raise ValueError(f"its photometric interpretation must be MONOCHROME1, MONOCHROME2 or RGB, not {kind}")
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
    if low == high:
        raise ValueError("its RescaleSlope is 0, which makes every pixel equal")
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
    """Labels, their names and the groups of the images ``names``."""
    table = folder / "labels.csv"
    if table.is_file():
        try:
            return _table_labels(table, names)
        except UnicodeDecodeError as error:
            raise ValueError(f"{table}: must be UTF-8 text, got {error}: save it as CSV UTF-8") from error
        except (ValueError, csv.Error) as error:
            raise ValueError(f"{table}: {error}") from error
    tops = [name.split("/")[0] for name in names]
    if all("/" in name for name in names) and len(set(tops)) > 1:
        classes, class_names = number_classes(np.array(tops))
        return classes, class_names, None
    return None, (), None


def _table_labels(table: Path, names: list[str]) -> Labels:
    with table.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets write a byte order mark
        reader = csv.DictReader(file)
        header = list(reader.fieldnames or ())
        rows = [(reader.line_num, row) for row in reader]
    columns = [column for column in header if column not in ("name", "group")]
    if "name" not in header or not columns or len(set(header)) < len(header):
        raise ValueError(
            "its header must be `name`, optionally `group`, then one or more label columns, all different, "
            f"got {header}"
        )
    by_name: dict[str, dict[str, str]] = {}
    for line, row in rows:
        if None in row or any(value is None or not value.strip() for value in row.values()):
            raise ValueError(f"line {line} must fill each of the {len(header)} columns, got {row}")
        name = row["name"].strip().replace("\\", "/")
        if name in by_name:
            raise ValueError(f"line {line} names {name!r} a second time: keep one row an image")
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
        return np.array([[row[column] for column in columns] for row in rows]).astype(np.uint8), tuple(columns)
    values = [row[columns[0]] for row in rows]
    numbers = [_number(value) for value in values]
    if all(number is not None and number.is_integer() for number in numbers):
        return number_classes(np.array([int(number) for number in numbers if number is not None]))
    if all(number is None for number in numbers):
        return number_classes(np.array(values))
    raise ValueError(
        f"the classes in column {columns[0]!r} must be all names or all whole numbers, got {sorted(set(values))[:5]}"
    )


def _number(value: str) -> float | None:
    try:
        return float(value)
    except ValueError:
        return None
