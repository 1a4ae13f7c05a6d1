"""Masks as bits: bit p of a pixel is set where structure p is. Class numbers and planes are converted."""

from __future__ import annotations

import warnings
from typing import Literal

import numpy as np

MaskKind = Literal["classes", "bits"]
IGNORED = 255
"""In masks of class numbers: a pixel of no known class."""


def bits_of(masks: np.ndarray, kind: MaskKind | None) -> np.ndarray:
    """Return masks of class numbers, bits or 0 and 255 as bits.

    Class c becomes bit c - 1. Pixels of the class 255 belong to no structure, with a warning. Without a kind, masks
    are taken for bits where both readings keep structures apart: values 0 and 1, 0 and 255, or powers of two with 1
    among them.

    Args:
        masks: ``(N, H, W)`` uint8.
        kind: what the values are; None where it is not said.

    Raises:
        ValueError: it is not said what the values are and they do not tell, or class numbers exceed 8.

    >>> bits_of(np.array([[[0, 1, 2, 3]]], np.uint8), "classes").tolist()
    [[[0, 1, 2, 4]]]
    """
    values = [int(value) for value in np.flatnonzero(np.bincount(masks.ravel(), minlength=256)) if value]
    if kind == "bits" or values in ([], [1]) or (kind is None and values == [255]):
        return masks
    shown = ", ".join(map(str, values[:8])) + (", ..." if len(values) > 8 else "")
    if kind is None:
        if values[0] == 1 and all(value & (value - 1) == 0 for value in values):
            return masks
        raise ValueError(
            f"masks hold the values {shown}, which may be class numbers, bits or shades of grey: say which with "
            "--mask-kind classes or --mask-kind bits (in an npz also by an entry `mask_kind`), and renumber shades of "
            "grey as classes 1, 2, ..."
        )
    if any(8 < value < IGNORED for value in values):
        raise ValueError(
            f"masks of class numbers must hold 0 to 8, and 255 for pixels to ignore, got {shown}: renumber them"
        )
    table = np.zeros(256, np.uint8)
    table[1:9] = 1 << np.arange(8)
    if IGNORED in values:
        share = (masks == IGNORED).mean()
        warnings.warn(
            f"{share:.1%} of the pixels of masks are 255, to ignore: they count as outside of all structures",
            stacklevel=2,
        )
    return table[masks]


def joined_planes(planes: np.ndarray) -> np.ndarray:
    """Return one plane a structure, ``(N, P, H, W)`` of 0 and 1 or 0 and 255, as bits ``(N, H, W)``.

    Raises:
        ValueError: there are more than 8 planes, or they hold other values.

    >>> joined_planes(np.array([[[[0, 1]], [[1, 1]]]], np.uint8)).tolist()
    [[[2, 3]]]
    """
    if not 1 <= planes.shape[1] <= 8:
        raise ValueError(
            f"masks of one plane a structure must be (N, P, H, W) with 1 to 8 planes, got {planes.shape}: move the "
            "axis of planes with np.moveaxis(masks, -1, 1), or take some out"
        )
    if not (np.isin(planes, (0, 1)).all() or np.isin(planes, (0, 255)).all()):
        raise ValueError(f"planes of masks must hold 0 and 1, or 0 and 255, got {np.unique(planes)[:5]}: threshold")
    joined = np.zeros((len(planes), *planes.shape[2:]), np.uint8)
    for bit in range(planes.shape[1]):
        joined |= (planes[:, bit] > 0).astype(np.uint8) << bit
    return joined
