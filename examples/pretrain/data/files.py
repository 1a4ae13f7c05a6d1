"""The image files of a folder, and those that look like images and are not read."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

from examples.pretrain.data.dicom import DICOM_SUFFIXES, is_dicom
from examples.pretrain.data.picture import PICTURE_SUFFIXES, is_picture

OTHER_IMAGES = (
    *(
        ".gif",
        ".jp2",
        ".j2k",
        ".jpx",
        ".heic",
        ".heif",
        ".avif",
        ".svg",
        ".psd",
        ".exr",
        ".tga",
        ".pgm",
        ".ppm",
        ".pnm",
    ),
    *(".nii", ".nii.gz", ".mha", ".mhd", ".nrrd", ".img", ".svs", ".npy"),
)
"""Suffixes of images that are not read: such files are named, not passed over in silence."""


def image_names(folder: Path) -> list[str]:
    """Return the paths of a folder's images relative to it, with forward slashes, sorted: a listing has no fixed order.

    Warns of files that look like images and are of a format that is not read.

    Raises:
        ValueError: there are no images, or a link leads nowhere.
    """
    names: list[str] = []
    others: list[str] = []
    for path in _files(folder):
        if not path.is_file():
            leads_nowhere = path.is_symlink() and not path.exists()
            if leads_nowhere or path.suffix.lower() in PICTURE_SUFFIXES | DICOM_SUFFIXES:
                raise ValueError(f"{path}: must be a file or a link to one: mend or remove it")
            continue
        (names if is_picture(path) or is_dicom(path) else others).append(path.relative_to(folder).as_posix())
    if not names:
        there = f", got {len(others)} other files, first {min(others)!r}" if others else ""
        raise ValueError(
            f"{folder}: no images found{there}; a folder must hold PNG, JPEG, TIFF, BMP, WebP or DICOM files, in "
            "itself or in sub-folders. DICOM files need the suffix .dcm, or a preamble and no suffix"
        )
    passed_over = sorted(name for name in others if name.lower().endswith(OTHER_IMAGES))
    if passed_over:
        warnings.warn(
            f"{folder}: {len(passed_over)} files are of formats that are not read, first {passed_over[0]!r}: convert "
            "them to PNG, or take them out",
            stacklevel=5,
        )
    return sorted(names)


def _files(folder: Path) -> Iterator[Path]:
    """Yield the paths in a folder and in its sub-folders, linked ones too; nothing hidden, and each folder once."""
    seen: dict[tuple[int, int], Path] = {}
    to_search = [folder]
    links: list[Path] = []
    while to_search or links:
        # Linked folders come last: a link to a folder that is inside anyway adds nothing, and may be a loop.
        top = to_search.pop() if to_search else links.pop()
        found = top.stat()
        first = seen.setdefault((found.st_dev, found.st_ino), top)
        if first is not top:
            warnings.warn(f"{top} leads to {first}: its images are counted once, as those of {first}", stacklevel=6)
            continue
        for path in sorted(top.iterdir(), reverse=True):
            if path.name.startswith("."):
                continue
            if not path.is_dir():
                yield path
            elif path.is_symlink():
                links.append(path)
            else:
                to_search.append(path)
