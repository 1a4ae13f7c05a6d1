"""Single-frame DICOM files as uint16 arrays, by the rescale, window and lookup tables stored with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
from pydicom.pixels.processing import apply_modality_lut, apply_voi_lut

DICOM_SUFFIXES = frozenset({".dcm", ".dicom"})


MOST_PIXELS = 89_478_485
"""As Pillow's limit for pictures: larger ones are taken for files that were made to fill the memory."""


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

    Raises:
        ValueError: it has several frames, too many pixels, another photometric interpretation, a rescale slope of 0,
            or values that are not numbers.
    """
    dataset = pydicom.dcmread(path)
    if int(dataset.get("NumberOfFrames") or 1) > 1:
        raise ValueError(f"it has {dataset.NumberOfFrames} frames, only single frames are read: split it")
    if int(dataset.Rows) * int(dataset.Columns) > MOST_PIXELS:
        raise ValueError(f"it has {dataset.Rows} x {dataset.Columns} pixels, at most {MOST_PIXELS:,} are read")
    for name in ("RescaleSlope", "RescaleIntercept", "WindowCenter", "WindowWidth"):
        if not np.isfinite(np.asarray(dataset.get(name) or 0, float)).all():
            raise ValueError(f"its {name} must be finite, got {dataset.get(name)}")
    kind = dataset.PhotometricInterpretation
    pixels = dataset.pixel_array
    bits = dataset.BitsStored
    if pixels.ndim == 3 and kind != "PALETTE COLOR":  # pydicom has converted YBR to RGB
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
        values = np.rint(values).astype(np.int64)  # a look-up table is indexed by integers
        low, high = 0, 2 ** dataset.VOILUTSequence[0].LUTDescriptor[2] - 1
    elif dataset.get("WindowCenter") is None or dataset.get("WindowWidth") is None:
        # Without a window the bounds must be in order. With one, pydicom's range goes from the image of the lowest
        # stored value to that of the highest, also where a negative slope reverses them.
        low, high = min(low, high), max(low, high)
    scaled = _to_uint16(apply_voi_lut(values, dataset), low, high)
    return np.invert(scaled) if kind == "MONOCHROME1" else scaled


def _to_uint16(values: np.ndarray, low: float, high: float) -> np.ndarray:
    if not np.isfinite(float(high) - float(low)):
        raise ValueError(f"its rescale must give numbers, got a range from {low} to {high}")
    if low == high:
        raise ValueError("its RescaleSlope is 0, which makes every pixel equal")
    share = (values.astype(np.float64) - float(low)) / (float(high) - float(low))
    scaled: np.ndarray = np.rint(65535 * share.clip(0, 1)).astype(np.uint16)
    return scaled
