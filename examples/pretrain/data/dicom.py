"""Single-frame DICOM files as uint16 arrays, by the rescale, window and lookup tables stored with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileDataset
from pydicom.pixels.processing import apply_windowing

from examples.pretrain.data.dicom_header import read_header, refuse_frames

DICOM_SUFFIXES = frozenset({".dcm", ".dicom", ".dic", ".ima"})


def is_dicom(path: Path) -> bool:
    """Return True for a DICOM file: by its suffix, else by the preamble."""
    if path.suffix.lower() in DICOM_SUFFIXES:
        return True
    if path.name == "DICOMDIR":  # an index of other files, in the same format
        return False
    # Exports often name a file by its UID; the last part of 1.2.840.10008 is not a suffix.
    if path.suffix and not path.suffix[1:].isdigit():
        return False
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def read_dicom(path: Path) -> np.ndarray:
    """Return a DICOM image as uint16, grey ``(H, W)`` or RGB ``(H, W, 3)``.

    Steps of the standard (PS3.3 C.7.6.3, C.11.1 and C.11.2): stored bits, modality table or rescale, table or window of
    interest, inversion of MONOCHROME1. Padding (PixelPaddingValue) becomes 0, the background.

    Raises:
        ValueError: it has several frames, too many pixels, another photometric interpretation, a rescale slope of 0,
            values that are not numbers, or lacks a tag that is needed.
    """
    dataset = read_header(path)
    kind = dataset.PhotometricInterpretation
    pixels = _decoded(dataset)
    if pixels.ndim == 3 and kind != "PALETTE COLOR":  # pydicom has converted YBR to RGB
        return _to_uint16(pixels, 0, 2 ** int(dataset.BitsStored) - 1)
    if kind not in ("MONOCHROME1", "MONOCHROME2"):
        raise ValueError(f"its photometric interpretation must be MONOCHROME1, MONOCHROME2 or RGB, not {kind}")
    pixels = _stored(pixels, dataset)
    shown = _to_uint16(*_of_interest(*_modality(pixels, dataset), dataset))
    if kind == "MONOCHROME1":
        shown = np.invert(shown)
    shown[_padding(pixels, dataset)] = 0
    return shown


def _decoded(dataset: FileDataset) -> np.ndarray:
    """Return the pixels, with unused bits below and above those stored."""
    bits, high = int(dataset.BitsStored), int(dataset.get("HighBit", dataset.BitsStored - 1))
    dataset.BitsStored = high + 1  # pydicom takes the lowest bits for those stored
    pixels: np.ndarray = dataset.pixel_array
    dataset.BitsStored = bits
    one = (dataset.Rows, dataset.Columns, *((3,) if dataset.SamplesPerPixel == 3 else ()))
    if pixels.shape != one:
        refuse_frames(pixels.shape[0] if pixels.ndim > len(one) else 1)
        raise ValueError(f"its pixels must be of shape {one}, got {pixels.shape}")
    return pixels >> (high + 1 - bits) if high + 1 > bits else pixels


def _stored(values: np.ndarray, dataset: FileDataset) -> np.ndarray:
    """Return the stored bits as numbers: bits above them may hold an overlay, or lack the sign."""
    bits = int(dataset.BitsStored)
    lowest = values.astype(np.int64) & (2**bits - 1)
    sign = 2 ** (bits - 1) if dataset.PixelRepresentation == 1 else 0
    return (lowest ^ sign) - sign


def _modality(pixels: np.ndarray, dataset: FileDataset) -> tuple[np.ndarray, float, float]:
    """Return the values of the modality, and the lowest and the highest that they can take."""
    if "ModalityLUTSequence" in dataset:  # RescaleSlope beside it, which the standard forbids, is not looked at
        return _looked_up(pixels, dataset.ModalityLUTSequence[0], dataset)
    bits, signed = int(dataset.BitsStored), dataset.PixelRepresentation == 1
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    slope, intercept = float(dataset.get("RescaleSlope", 1)), float(dataset.get("RescaleIntercept", 0))
    if slope == 0:
        raise ValueError("its RescaleSlope is 0, which makes every pixel equal")
    ends = low * slope + intercept, high * slope + intercept
    return pixels * slope + intercept, min(ends), max(ends)


def _of_interest(values: np.ndarray, low: float, high: float, dataset: FileDataset) -> tuple[np.ndarray, float, float]:
    """Return the values by the first table or window of interest, and the range that is shown."""
    if "VOILUTSequence" in dataset:
        return _looked_up(np.rint(values).astype(np.int64), dataset.VOILUTSequence[0], dataset)
    if "WindowCenter" not in dataset or "WindowWidth" not in dataset:
        return values, low, high
    window = Dataset()  # of its own, for an output of 0 to 65535 whatever the rescale was
    window.PhotometricInterpretation, window.BitsStored, window.PixelRepresentation = "MONOCHROME2", 16, 0
    for name in ("WindowCenter", "WindowWidth", "VOILUTFunction"):
        if name in dataset:
            window[name] = dataset[name]
    return apply_windowing(values, window), 0, 65535


def _looked_up(values: np.ndarray, item: Dataset, dataset: FileDataset) -> tuple[np.ndarray, float, float]:
    """Return the table's entries for values, 0, and the most that its entries need.

    pydicom's own look-up folds deep pixels by tables of 8 bits, and knows no modality tables of 10 to 14 bits. The
    depth in the descriptor is not looked at: many tables do not fill it.
    """
    count, first, bits = (int(number) for number in item.LUTDescriptor)
    count = count or 2**16
    table = item.LUTData
    if isinstance(table, bytes):
        packed = bits == 8 and len(table) in (count, count + 1)
        order = "<" if dataset.file_meta.TransferSyntaxUID.is_little_endian else ">"
        table = np.frombuffer(table[: len(table) // 2 * 2 if not packed else None], "u1" if packed else f"{order}u2")
    table = np.atleast_1d(np.asarray(table, np.int64))[:count]
    if len(table) < count:
        raise ValueError(f"its LUTData must hold the {count} entries of LUTDescriptor, got {len(table)}")
    top = 2 ** int(table.max()).bit_length() - 1
    if top == 0:
        raise ValueError("its LUTData is all 0, which makes every pixel equal")
    return table[np.clip(values - first, 0, count - 1)], 0, top


def _padding(pixels: np.ndarray, dataset: FileDataset) -> np.ndarray:
    """Return True where a pixel is padding: of the padding value, or between it and the limit of its range."""
    if "PixelPaddingValue" not in dataset:
        return np.zeros(pixels.shape, bool)
    value = dataset.PixelPaddingValue
    ends = _stored(np.array([value, dataset.get("PixelPaddingRangeLimit", value)]), dataset)
    return (pixels >= ends.min()) & (pixels <= ends.max())


def _to_uint16(values: np.ndarray, low: float, high: float) -> np.ndarray:
    if not np.isfinite(float(high) - float(low)):
        raise ValueError(f"its rescale must give numbers, got a range from {low} to {high}")
    share = (values.astype(np.float64) - float(low)) / (float(high) - float(low))
    scaled: np.ndarray = np.rint(65535 * share.clip(0, 1)).astype(np.uint16)
    return scaled
