"""The header of a DICOM file: read also without preamble, freed of empty tags, checked before pixels are decoded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
from pydicom.datadict import tag_for_keyword
from pydicom.dataset import FileDataset
from pydicom.encaps import generate_fragments
from pydicom.errors import InvalidDicomError
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless

MOST_PIXELS = 89_478_485
"""As Pillow's limit for pictures: larger ones are taken for files that were made to fill the memory."""

NEEDED = (
    "Rows",
    "Columns",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "BitsAllocated",
    "BitsStored",
    "PixelRepresentation",
)
OPTIONAL = (
    "NumberOfFrames",
    "HighBit",
    "RescaleSlope",
    "RescaleIntercept",
    "WindowCenter",
    "WindowWidth",
    "VOILUTFunction",
    "PixelPaddingValue",
    "PixelPaddingRangeLimit",
    "ModalityLUTSequence",
    "VOILUTSequence",
)
NUMBERS = ("RescaleSlope", "RescaleIntercept", "WindowCenter", "WindowWidth")
FUNCTIONAL_GROUPS = {
    "FrameVOILUTSequence": ("WindowCenter", "WindowWidth", "VOILUTFunction"),
    "PixelValueTransformationSequence": ("RescaleSlope", "RescaleIntercept"),
}
STARTS = (b"\xff\xd8", b"\xff\x4f\xff\x51", b"\x00\x00\x00\x0c\x6a\x50")
"""First bytes of a JPEG, of a JPEG 2000 codestream and of a JP2 file."""


def read_header(path: Path) -> FileDataset:
    """Return a DICOM file whose pixels can be decoded as one image.

    Empty optional tags are taken out: they mean no more than absent ones. Window and rescale of a functional group
    stand at the top level, where files of one frame have them.

    Raises:
        ValueError: it is no DICOM file, holds no image or several, lacks a tag, or has one that means nothing.
    """
    dataset = _read(path)
    for name in OPTIONAL:
        if name in dataset and _is_empty(dataset[name].value):
            delattr(dataset, name)
    for name in ("ModalityLUTSequence", "VOILUTSequence"):
        if name in dataset and any(
            _is_empty(dataset[name].value[0].get(part)) for part in ("LUTDescriptor", "LUTData")
        ):
            delattr(dataset, name)
    _lift_functional_groups(dataset)
    _check(dataset)
    return dataset


def _read(path: Path) -> FileDataset:
    try:
        dataset = pydicom.dcmread(path)
    except InvalidDicomError as error:
        # Without preamble, a data set begins with an element of group 2 or 8, in little endian.
        with path.open("rb") as file:
            if file.read(2) not in (b"\x02\x00", b"\x08\x00"):
                raise ValueError("it is not a DICOM file, whatever its name says") from error
        dataset = pydicom.dcmread(path, force=True)
    if "TransferSyntaxUID" not in dataset.file_meta:
        implicit, little = dataset.original_encoding
        if dataset.get("PixelData") is not None and dataset["PixelData"].is_undefined_length:
            raise ValueError(
                "its pixels are compressed, and the tag TransferSyntaxUID (0002,0010) that says how is absent"
            )
        explicit = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else explicit
    return dataset


def _is_empty(value: object) -> bool:
    return value is None or (hasattr(value, "__len__") and len(value) == 0)


def _lift_functional_groups(dataset: FileDataset) -> None:
    for groups in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        for group in (dataset.get(groups) or [])[:1]:
            for sequence, names in FUNCTIONAL_GROUPS.items():
                for item in (group.get(sequence) or [])[:1]:
                    for name in names:
                        if name not in dataset and not _is_empty(item.get(name)):
                            setattr(dataset, name, item.get(name))


def _check(dataset: FileDataset) -> None:
    if "PixelData" not in dataset:
        for name in ("FloatPixelData", "DoubleFloatPixelData"):
            if name in dataset:
                raise ValueError(f"it holds {_tag(name)}, and only whole numbers in {_tag('PixelData')} are read")
        raise ValueError(f"it holds no {_tag('PixelData')}, so it is no image but, for example, a report")
    missing = [name for name in NEEDED if _is_empty(dataset.get(name))]
    if missing:
        raise ValueError(f"it must have the tag {_tag(missing[0])}, which is absent or empty")
    if int(dataset.get("NumberOfFrames", 1)) > 1:
        raise ValueError(f"it has {dataset.NumberOfFrames} frames, only single frames are read: split it")
    if int(dataset.Rows) * int(dataset.Columns) > MOST_PIXELS:
        raise ValueError(f"it has {dataset.Rows} x {dataset.Columns} pixels, at most {MOST_PIXELS:,} are read")
    for name in NUMBERS:
        if not np.isfinite(np.asarray(dataset.get(name, 0), float)).all():
            raise ValueError(f"its {name} must be finite, got {dataset.get(name)}")
    high, bits = int(dataset.get("HighBit", dataset.BitsStored - 1)), int(dataset.BitsStored)
    compressed = dataset.file_meta.TransferSyntaxUID.is_compressed
    if high + 1 != bits and (compressed or not bits <= high + 1 <= dataset.BitsAllocated):
        raise ValueError(f"its {_tag('HighBit')} must be {bits - 1} for {bits} bits stored, got {high}")
    if compressed:
        # A frame may take several fragments, and begins with a codestream; in RLE, each fragment is a frame.
        _, *fragments = generate_fragments(dataset.PixelData)  # the first is a table of offsets
        whole = dataset.file_meta.TransferSyntaxUID == RLELossless
        refuse_frames(sum(whole or fragment.startswith(STARTS) for fragment in fragments))


def refuse_frames(count: int) -> None:
    """Raise ValueError if there is more than one frame of pixels, whatever NumberOfFrames says."""
    if count > 1:
        raise ValueError(f"it holds {count} frames, only single frames are read: split it")


def _tag(name: str) -> str:
    """Return a tag as keyword and number.

    >>> _tag("HighBit")
    'HighBit (0028,0102)'
    """
    number = tag_for_keyword(name)
    assert number is not None
    return f"{name} ({number >> 16:04X},{number & 0xFFFF:04X})"
