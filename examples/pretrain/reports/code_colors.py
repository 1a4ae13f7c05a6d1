"""Colours of codes: near codes get near colours, so that a code map shows what is alike."""

from __future__ import annotations

import numpy as np
import torch
from kornia.color import lab_to_rgb

LIGHT, SPREAD = (45.0, 85.0), 60.0
"""Range of lightness, and the largest value of both colour axes, in CIE L*a*b*."""


def lab_of(codes: np.ndarray) -> np.ndarray:
    """Return a colour in L*a*b* `(K, 3)` for each code `(K, D)`: its first three principal components.

    The first two are the colour axes, the third is the lightness. In L*a*b*, the distance between two colours is about
    how different they look.

    >>> lab_of(np.array([[0.0, 1.0], [0.0, -1.0]])).round().tolist()
    [[65.0, 60.0, 0.0], [65.0, -60.0, 0.0]]
    """
    centred = codes - codes.mean(0)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    axes = axes[:3] * np.where(axes[:3].sum(1, keepdims=True) < 0, -1, 1)  # the sign of an axis is arbitrary
    parts = np.zeros((len(codes), 3))
    parts[:, : len(axes)] = centred @ axes.T
    largest = np.abs(parts).max()
    a, b, third = (parts / largest if largest > 0 else parts).T
    middle, half = sum(LIGHT) / 2, (LIGHT[1] - LIGHT[0]) / 2
    return np.stack([middle + half * third, SPREAD * a, SPREAD * b], 1)


def code_colors(codes: np.ndarray) -> np.ndarray:
    """Return a colour `(K, 3)` in [0, 1] for each code `(K, D)`; see :func:`lab_of`."""
    lab = torch.from_numpy(lab_of(codes)).float().T[None, :, :, None]
    return lab_to_rgb(lab)[0, :, :, 0].T.clamp(0, 1).numpy()
