"""Generated frontal chest X-rays with two subtle findings, for runs without patient data.

An image is a sum of absorptions in the coordinates of `chest.py`; brightness is absorption, as on film. Nothing is
calibrated to a device. The phantoms copy what makes the task hard: anatomy, pose and exposure vary far more than the
findings do.
"""

from __future__ import annotations

import io
from functools import lru_cache
from pathlib import Path

import numpy as np
from scipy.ndimage import gaussian_filter

from examples.pretrain.checkpoint import write_whole
from examples.pretrain.chest import Chest, Patient, absorption, draw_patient, ramp
from examples.pretrain.data.imageset import ImageSet
from examples.pretrain.unwritten import writing

FINDINGS = ("nodule", "effusion")
NODULE, EFFUSION = 1, 2  # bits of the masks

OVERSAMPLING = 2
"""The render is this many times finer than the image, against jagged edges."""

# Last entries of the seeds. Images use [seed, image], which numpy reads as [seed, image, 0].
_PATIENT, _VISITS, _LABELS, _NODULES, _FLUID = 1, 2, 3, 4, 5

Array = np.ndarray


def phantom_file(folder: Path, count: int, image_size: int) -> Path:
    """Return the file of ``count`` phantoms in a folder; draw and write it, unless it is there."""
    path = folder / f"phantoms-{count}-{image_size}.npz"
    if not path.exists():
        print(f"drawing {count} thorax phantoms", flush=True)
        drawn = make_phantoms(count, image_size)
        arrays = {"images": drawn.images, "labels": drawn.labels, "groups": drawn.groups, "masks": drawn.masks}
        content = io.BytesIO()
        np.savez(content, **arrays, label_names=np.array(drawn.label_names), mask_kind="bits")  # type: ignore[arg-type]
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, content.getbuffer())
    return path


def make_phantoms(count: int, image_size: int = 64, *, seed: int = 0, finding_rate: float = 0.35) -> ImageSet:
    """Draw ``count`` phantoms; image i depends on ``seed`` and i only, never on ``count``.

    Patients have one to three consecutive images, which share anatomy but not pose, exposure or findings.
    Nodules are one to five soft blobs in the lungs, each 5 to 12 % of the width across; an effusion is
    fluid above the diaphragm, on one or both sides, from a trace in the angle at the chest wall to half a lung.
    Each image has each finding with probability ``finding_rate``, independently. Without the finding it would be the
    same image otherwise.

    Args:
        count: number of images N.
        image_size: side S in pixels, at least 16.
        seed: an integer, 0 or more.
        finding_rate: probability of each finding, in [0, 1].

    Returns:
        ``images`` (N, S, S) uint8; ``labels`` (N, 2) uint8, nodule and effusion; ``masks`` (N, S, S) uint8, 1 where
        there is a nodule, 2 an effusion, 3 both; ``groups`` (N,) int64 patients. Each finding that the
        labels name, and each nodule of several, has at least one pixel in the mask.

    Raises:
        TypeError: ``count``, ``image_size`` or ``seed`` is not an integer.
        ValueError: an argument is out of its range.

    >>> data = make_phantoms(3, image_size=32)
    >>> data.images.shape, data.labels.shape, data.label_names
    ((3, 32, 32), (3, 2), ('nodule', 'effusion'))
    """
    for name, value, least in (("count", count, 1), ("image_size", image_size, 16), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise TypeError(f"{name} must be an int, got {value!r}")
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if not 0 <= finding_rate <= 1:
        raise ValueError(f"finding_rate must be a probability between 0 and 1, got {finding_rate}")
    visits = np.random.default_rng([seed, 0, _VISITS]).integers(1, 4, size=count)
    groups = np.repeat(np.arange(count), visits)[:count]
    images = np.empty((count, image_size, image_size), np.uint8)
    masks = np.empty((count, image_size, image_size), np.uint8)
    labels = np.empty((count, len(FINDINGS)), np.uint8)
    for i in range(count):
        patient = draw_patient(np.random.default_rng([seed, int(groups[i]), _PATIENT]))
        labels[i] = np.random.default_rng([seed, i, _LABELS]).random(2) < finding_rate
        # One random stream a finding: each is drawn the same with and without the other.
        nodules = np.random.default_rng([seed, i, _NODULES]) if labels[i, 0] else None
        fluid = np.random.default_rng([seed, i, _FLUID]) if labels[i, 1] else None
        film = np.random.default_rng([seed, i])
        images[i], masks[i] = _draw_image(patient, film, nodules, fluid, image_size)
    return ImageSet(images, labels, groups, masks, None, FINDINGS)


def _draw_image(
    patient: Patient,
    film: np.random.Generator,
    nodules: np.random.Generator | None,
    effusion: np.random.Generator | None,
    size: int,
) -> tuple[Array, Array]:
    """Return one image and its mask, both ``(size, size)`` uint8; a finding without a generator is absent."""
    x, y = _grid(size * OVERSAMPLING)
    across, down = _pose(x, y, film)
    breath = film.uniform(-0.05, 0.05)  # a deeper breath lowers the diaphragm
    chest = Chest(patient, across, down, breath)

    fluid, lost = (None, 0.0) if effusion is None else _draw_fluid(chest, effusion)
    total = absorption(chest, lost)
    masks = []
    if nodules is not None:
        blobs, inside = _draw_nodules(chest, x, y, nodules)
        total += blobs
        masks += [(NODULE, cover) for cover in inside]
    if fluid is not None:
        masks.append((EFFUSION, fluid * chest.lung))

    mask = np.zeros((size, size), np.uint8)
    for bit, cover in masks:
        share = _shrink(cover)
        # A nodule of one pixel may lie across four: keep the most covered of them.
        mask |= np.where(share >= min(0.5, float(share.max())), bit, 0).astype(np.uint8)
    return _expose(total, film, size), mask


@lru_cache(maxsize=4)
def _grid(side: int) -> tuple[Array, Array]:
    """Return ``(1, side)`` and ``(side, 1)`` pixel centres in [-1, 1]."""
    line = ((np.arange(side, dtype=np.float32) + 0.5) * (2 / side) - 1).astype(np.float32)
    return line[None, :], line[:, None]


def _pose(x: Array, y: Array, film: np.random.Generator) -> tuple[Array, Array]:
    tilt, zoom = film.normal(0, 0.035), film.uniform(0.96, 1.13)
    right, low = film.normal(0, 0.035, size=2)
    cos, sin = np.float32(np.cos(tilt) / zoom), np.float32(np.sin(tilt) / zoom)
    return cos * x + sin * y - np.float32(right), cos * y - sin * x - np.float32(low)


def _draw_fluid(chest: Chest, rng: np.random.Generator) -> tuple[Array, Array]:
    """Return where fluid is, below a level that climbs at the chest wall like a meniscus, and the air it displaces."""
    p = chest.patient
    side = rng.integers(3)  # right, left, both
    level = np.empty_like(chest.down)
    for left in (False, True):
        angle = p.dome[left] + p.dome_drop  # where diaphragm and wall meet
        height = rng.uniform(0.14, 0.9)
        climb, width = rng.uniform(0.08, 0.2), rng.uniform(0.06, 0.14)
        surface = angle - height - climb * np.exp((chest.lateral - chest.outer) / np.float32(width))
        present = side == 2 or side == int(left)
        level = np.where(chest.left == left, surface if present else 2, level)
    fluid = ramp(chest.down - level, 0.1)
    return fluid, fluid * np.float32(rng.uniform(0.5, 0.9))  # part of the lung in front and behind stays clear


def _draw_nodules(chest: Chest, x: Array, y: Array, rng: np.random.Generator) -> tuple[Array, list[Array]]:
    """Return what the nodules absorb, and where each of them is."""
    total, inside = np.zeros_like(chest.down), []
    for _ in range(rng.integers(1, 6)):
        radius = rng.uniform(0.05, 0.12)  # in half-widths of the image: the diameter in widths
        room = np.flatnonzero((chest.depth > radius + 0.02) & (chest.heart_edge < -0.15))
        row, column = divmod(int(room[rng.integers(len(room))]), x.shape[1])
        longer, turn = rng.uniform(1, 1.25), rng.uniform(0, np.pi)
        dx, dy = x - x[0, column], y - y[row, 0]
        cos, sin = np.cos(turn) / longer, np.sin(turn) / longer
        # an ellipse within the circle of that radius
        off = ((dx * cos + dy * sin) * longer) ** 2 + ((dy * cos - dx * sin) * longer**2) ** 2
        off *= np.float32(1 / radius**2)
        total += np.float32(rng.uniform(0.15, 0.28)) * np.clip(1.3 * (1 - off), 0, 1)
        inside.append(ramp(1 - off, 0.2))
    return total, inside


def _shrink(fine: Array) -> Array:
    """Average the render over the pixels of the image."""
    side = fine.shape[0] // OVERSAMPLING
    means: Array = fine.reshape(side, OVERSAMPLING, side, OVERSAMPLING).mean(axis=(1, 3))
    return means


def _expose(total: Array, film: np.random.Generator, size: int) -> Array:
    """Return the film, uint8: blur, exposure, contrast, a gradient over the field, tone curve and noise."""
    focus = film.uniform(0.4, 0.9) * OVERSAMPLING * max(1.0, size / 64)
    image = _shrink(gaussian_filter(total, focus, truncate=2.5))
    x, y = _grid(size)
    slope_x, slope_y = film.normal(0, 0.03, size=2)
    image = film.uniform(1.0, 1.25) * (1 - np.exp(image * np.float32(-1.4))) + film.uniform(-0.05, 0.05)  # saturates
    image = image + np.float32(slope_x) * x + np.float32(slope_y) * y
    image = np.clip(image, 0, 1) ** film.uniform(0.8, 1.4)
    grain = film.standard_normal((size, size), dtype=np.float32)
    image += np.float32(film.uniform(0.005, 0.016)) * grain
    exposed: Array = np.rint(255 * np.clip(image, 0, 1)).astype(np.uint8)
    return exposed
