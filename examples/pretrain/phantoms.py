"""Generated frontal chest X-rays with two subtle findings, for runs that need no patient's data.

An image is a sum of absorptions in chest coordinates: ``across`` runs from -1 (the patient's right, drawn on
the left as on any frontal film) to 1, ``down`` from -1 at the neck to 1 in the abdomen. Brightness is
absorption, as on film. Nothing here is calibrated: the phantoms copy what makes the task hard (anatomy,
pose and exposure vary far more than the findings do), not any device.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.ndimage import gaussian_filter

from examples.pretrain.data.imageset import ImageSet

FINDINGS = ("nodule", "effusion")
NODULE, EFFUSION = 1, 2  # bits of the masks

OVERSAMPLING = 2  # the render is this many times finer than the image, against jagged edges

# Last words of the seeds. Images use [seed, image], which numpy reads as [seed, image, 0].
_PATIENT, _VISITS, _LABELS, _NODULES, _FLUID = 1, 2, 3, 4, 5

Array = np.ndarray


def make_phantoms(count: int, image_size: int = 64, *, seed: int = 0, finding_rate: float = 0.35) -> ImageSet:
    """Draws ``count`` phantoms; image i depends on ``seed`` and i only, never on ``count``.

    Patients have one to three consecutive images, which share anatomy but not pose, exposure or findings.
    Nodules are one to five soft blobs in the lungs, each 5 to 12 % of the width across; an effusion is
    fluid above the diaphragm, on one or both sides, from a trace in the angle at the chest wall to half a lung.
    Each image has each finding with probability ``finding_rate``, independently, and without it would be the
    same image otherwise.

    Args:
        count: number of images N.
        image_size: side S in pixels, at least 16.
        seed: a whole number, 0 or more.
        finding_rate: probability of each finding, in [0, 1].

    Returns:
        ``images`` (N, S, S) uint8; ``labels`` (N, 2) uint8, nodule and effusion; ``masks`` (N, S, S) uint8, 1 where
        there is a nodule, 2 an effusion, 3 both; ``groups`` (N,) int64 patients. Each finding that the
        labels name, and each nodule of several, has at least one pixel in the mask.

    Raises:
        TypeError: ``count``, ``image_size`` or ``seed`` is no whole number.
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
        patient = _draw_patient(np.random.default_rng([seed, int(groups[i]), _PATIENT]))
        labels[i] = np.random.default_rng([seed, i, _LABELS]).random(2) < finding_rate
        # a stream for each finding, so that one is drawn alike with the other and without it
        nodules = np.random.default_rng([seed, i, _NODULES]) if labels[i, 0] else None
        fluid = np.random.default_rng([seed, i, _FLUID]) if labels[i, 1] else None
        film = np.random.default_rng([seed, i])
        images[i], masks[i] = _draw_image(patient, film, nodules, fluid, image_size)
    return ImageSet(images, labels, groups, masks, None, FINDINGS)


@dataclass(frozen=True)
class Patient:
    """Anatomy, in chest coordinates; what the draw below does not explain is a length or an absorption."""

    wall: float  # half-width of the rib cage
    body: float  # half-width of the trunk
    shoulder: float  # height of the shoulders
    apex: float  # height of the tops of the lungs
    apex_across: float
    roundness: float  # exponent of the lungs' upper outline
    inner: float  # from the midline to the lungs
    dome: tuple[float, float]  # heights of the right and the left diaphragm
    dome_drop: float  # from the dome to the lateral angle
    heart: tuple[float, float, float, float]  # across, down and the two half-axes
    heart_tilt: float
    aorta: float  # radius of its arch
    rib_gap: float
    rib_offset: float
    rib_slope: float
    rib_density: float
    clavicle: tuple[float, float]  # height and slope
    spine: float  # half-width
    tissue: float  # absorption of the chest wall
    air: float  # how much of it the lungs take away
    vessels: float
    stomach: tuple[float, float, float]  # across, down and radius of its air
    seed: int  # of vessels and texture, which stay the same between visits


def _draw_patient(rng: np.random.Generator) -> Patient:
    u = rng.uniform
    wall = u(0.68, 0.84)
    dome = u(0.44, 0.62)
    return Patient(
        wall=wall,
        body=wall + u(0.12, 0.3),
        shoulder=u(-0.94, -0.8),
        apex=u(-0.84, -0.7),
        apex_across=u(0.28, 0.36),
        roundness=u(1.8, 2.6),
        inner=u(0.1, 0.16),
        dome=(dome, dome + u(0.0, 0.09)),
        dome_drop=u(0.14, 0.26),
        heart=(u(0.08, 0.17), dome - u(0.1, 0.2), u(0.33, 0.46), u(0.22, 0.3)),
        heart_tilt=u(0.55, 0.95),
        aorta=u(0.07, 0.11),
        rib_gap=u(0.145, 0.18),
        rib_offset=u(0, 1),
        rib_slope=u(0.16, 0.34),
        rib_density=u(0.06, 0.12),
        clavicle=(u(-0.66, -0.54), u(0.1, 0.3)),
        spine=u(0.07, 0.1),
        tissue=u(0.46, 0.58),
        air=u(0.3, 0.4),
        vessels=u(0.09, 0.18),
        stomach=(u(0.3, 0.5), dome + u(0.2, 0.3), u(0.05, 0.14)),
        seed=int(rng.integers(2**32)),
    )


def _draw_image(
    patient: Patient,
    film: np.random.Generator,
    nodules: np.random.Generator | None,
    effusion: np.random.Generator | None,
    size: int,
) -> tuple[Array, Array]:
    """One image and its mask, both ``(size, size)`` uint8; a finding without a generator is absent."""
    x, y = _grid(size * OVERSAMPLING)
    across, down = _pose(x, y, film)
    breath = film.uniform(-0.05, 0.05)  # a deeper breath lowers the diaphragm
    chest = Chest(patient, across, down, breath)

    fluid, lost = (None, 0.0) if effusion is None else _draw_fluid(chest, effusion)
    absorption = _absorption(chest, lost)
    masks = []
    if nodules is not None:
        blobs, inside = _draw_nodules(chest, x, y, nodules)
        absorption += blobs
        masks += [(NODULE, cover) for cover in inside]
    if fluid is not None:
        masks.append((EFFUSION, fluid * chest.lung))

    mask = np.zeros((size, size), np.uint8)
    for bit, cover in masks:
        share = _shrink(cover)
        # a nodule of one pixel may lie across four: keep the most covered one of them then
        mask |= np.where(share >= min(0.5, float(share.max())), bit, 0).astype(np.uint8)
    return _expose(absorption, film, size), mask


@lru_cache(maxsize=4)
def _grid(side: int) -> tuple[Array, Array]:
    """``(1, side)`` and ``(side, 1)`` pixel centres in [-1, 1]."""
    line = ((np.arange(side, dtype=np.float32) + 0.5) * (2 / side) - 1).astype(np.float32)
    return line[None, :], line[:, None]


def _pose(x: Array, y: Array, film: np.random.Generator) -> tuple[Array, Array]:
    tilt, zoom = film.normal(0, 0.035), film.uniform(0.96, 1.13)
    right, low = film.normal(0, 0.035, size=2)
    cos, sin = np.float32(np.cos(tilt) / zoom), np.float32(np.sin(tilt) / zoom)
    return cos * x + sin * y - np.float32(right), cos * y - sin * x - np.float32(low)


def _ramp(distance: Array, width: float) -> Array:
    """0 to 1 over ``width``, one half where ``distance`` is 0: a soft edge."""
    return np.clip(distance * np.float32(1 / width) + np.float32(0.5), 0, 1)


class Chest:
    """The outlines of one chest, on the pixels of the render; all arrays are ``(side, side)`` float32."""

    def __init__(self, patient: Patient, across: Array, down: Array, breath: float) -> None:
        p = self.patient = patient
        self.across, self.down = across, down
        self.lateral = np.abs(across)
        self.left = across > 0
        # from 0 at the level where the cage is widest to 1 at the tops of the lungs
        widest = 0.2
        rise = np.clip((widest - down) / (widest - p.apex), 0, 1)
        spread = (1 - rise**p.roundness) ** (1 / p.roundness)
        self.outer = p.apex_across + (p.wall - p.apex_across) * spread
        inner = p.apex_across + (p.inner - p.apex_across) * spread
        right, left = p.dome
        off_dome = (self.lateral - 0.32) / (p.wall - 0.32)
        self.dome = np.where(self.left, left, right) + np.float32(breath)
        self.diaphragm = self.dome + p.dome_drop * off_dome**2 * np.where(off_dome < 0, 0.25, 1)
        # how far inside its lung a point is: the nearest of the outlines
        self.depth = np.minimum(
            np.minimum(self.outer - self.lateral, self.lateral - inner),
            np.minimum(self.diaphragm - down, down - p.apex),
        )
        self.lung = _ramp(self.depth, 0.04)
        heart_across, heart_down, long, short = p.heart
        dx, dy = across - heart_across, down - np.float32(heart_down + breath)
        cos, sin = np.cos(p.heart_tilt), np.sin(p.heart_tilt)
        self.heart_edge = 1 - np.sqrt(((cos * dx + sin * dy) / long) ** 2 + ((cos * dy - sin * dx) / short) ** 2)


def _absorption(chest: Chest, lost: Array | float) -> Array:
    """What the chest absorbs, about 0 to 1; ``lost`` is the share of air whose place fluid has taken."""
    p, across, down, lateral = chest.patient, chest.across, chest.down, chest.lateral
    texture, ripple = _textures(p.seed, down.shape[0])

    half_width = 0.3 + (p.body - 0.3) * _ramp(down - p.shoulder - 0.16 * lateral**2, 0.25)
    body = _ramp(half_width - lateral, 0.05)
    heart = _ramp(chest.heart_edge, 0.2)
    arch = _ramp(p.aorta - np.hypot(across - 0.12, down + 0.26), 0.05)
    below = _ramp(down - chest.diaphragm, 0.06)

    # what is left of the air: the heart and the arch lie within the lungs' outlines
    air = chest.lung * (1 - 0.8 * np.maximum(heart, arch)) * (1 - lost)
    # thinner towards the wall, and more blood in the bases of an upright lung
    air = air * (0.82 + 0.5 * np.clip(chest.depth, 0, 0.3) - 0.1 * down + 0.12 * texture)

    middle = _ramp(p.inner + 0.02 + 0.05 * np.clip(down, 0, 1) - lateral, 0.14)
    total = p.tissue * (0.92 + 0.25 * _ramp(p.wall + 0.02 - lateral, 0.3)) + 0.16 * middle
    total += 0.14 * heart + 0.06 * arch + 0.2 * below - p.air * air
    total += _bones(chest) + p.vessels * air * _vessels(chest, ripple)
    total -= 0.07 * _ramp(0.045 - lateral, 0.04) * _ramp(-0.22 - down, 0.2)  # windpipe
    bubble_across, bubble_down, radius = p.stomach
    total -= 0.16 * _ramp(radius - np.hypot(across - bubble_across, 1.5 * (down - bubble_down)), 0.05)
    return (total + 0.04 * texture) * body


def _bones(chest: Chest) -> Array:
    p, down, lateral = chest.patient, chest.down, chest.lateral
    cage = _ramp(chest.outer + 0.04 - lateral, 0.05) * _ramp(0.78 - down, 0.3)
    out = lateral / np.float32(p.wall)
    # the backs of the ribs fall from the spine outwards, and steeply at the wall; the fronts fall inwards
    back = (down - p.rib_slope * out**2 - 0.12 * out**6) / p.rib_gap + p.rib_offset
    front = (down + 0.42 * out) / (1.15 * p.rib_gap) + 1.7 * p.rib_offset
    ribs = _band(back) + 0.55 * _band(front) * _ramp(out - 0.5, 0.2)
    spine = _ramp(p.spine - lateral, 0.05) * (0.75 + 0.25 * np.cos(down * np.float32(2 * np.pi / p.rib_gap)))
    height, slope = p.clavicle
    bar = down - height + slope * lateral - 0.05 * np.sin(6 * lateral)
    clavicle = _ramp(0.04 - np.abs(bar), 0.03) * _ramp(lateral - 0.1, 0.05) * _ramp(p.wall - lateral, 0.1)
    return p.rib_density * ribs * cage + 0.09 * spine + 0.15 * clavicle


def _band(phase: Array) -> Array:
    """A rounded bar in the middle of each period."""
    return np.clip(1.4 * np.cos(phase * np.float32(2 * np.pi)) - 0.4, 0, 1)


def _vessels(chest: Chest, ripple: Array) -> Array:
    """Hila, and branches that leave them and fade outwards."""
    dx, dy = chest.lateral - 0.2, chest.down - 0.02
    reach = np.hypot(dx, dy)
    angle = np.arctan2(dy, dx) + np.where(chest.left, 0.9, 0).astype(np.float32)
    near = np.exp(-(reach**2) * np.float32(1 / 0.15**2))
    stems = (1 - np.abs(np.sin(4 * angle + 2 * ripple))) ** 3 * np.exp(reach * -2.5)
    twigs = (1 - np.abs(np.sin(9 * angle + 4 * ripple))) ** 3 * np.clip(3 * reach, 0, 1) * np.exp(reach * -2)
    return 1.1 * near + 1.3 * stems + 0.9 * twigs


@lru_cache(maxsize=4)  # the images of a patient follow each other
def _textures(seed: int, side: int) -> tuple[Array, Array]:
    """Two ``(side, side)`` maps of about unit range: cloudy over several octaves, and smooth."""
    rng = np.random.default_rng(seed)
    smooth = _cloud(rng, 5, side)
    cloudy = 0.5 * _cloud(rng, 4, side) + 0.5 * _cloud(rng, 9, side) + 0.5 * _cloud(rng, 18, side)
    return cloudy, smooth


def _cloud(rng: np.random.Generator, cells: int, side: int) -> Array:
    weights = _interpolation(cells, side)
    knots = rng.standard_normal((cells, cells), dtype=np.float32)
    cloud: Array = weights @ knots @ weights.T
    return cloud


@lru_cache(maxsize=16)
def _interpolation(cells: int, side: int) -> Array:
    """``(side, cells)`` weights that pass smoothly from knot to knot."""
    at = np.linspace(0, cells - 1, side)[:, None]
    away = np.clip(np.abs(at - np.arange(cells)), 0, 1)
    weights: Array = (1 - away**2 * (3 - 2 * away)).astype(np.float32)
    return weights


def _draw_fluid(chest: Chest, rng: np.random.Generator) -> tuple[Array, Array]:
    """Where fluid is, below a level that climbs at the chest wall as a meniscus does, and the air lost to it."""
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
    fluid = _ramp(chest.down - level, 0.1)
    return fluid, fluid * np.float32(rng.uniform(0.5, 0.9))  # part of the lung in front and behind stays clear


def _draw_nodules(chest: Chest, x: Array, y: Array, rng: np.random.Generator) -> tuple[Array, list[Array]]:
    """What the nodules absorb, and where each of them is."""
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
        inside.append(_ramp(1 - off, 0.2))
    return total, inside


def _shrink(fine: Array) -> Array:
    """Means over the pixels of the image."""
    side = fine.shape[0] // OVERSAMPLING
    means: Array = fine.reshape(side, OVERSAMPLING, side, OVERSAMPLING).mean(axis=(1, 3))
    return means


def _expose(absorption: Array, film: np.random.Generator, size: int) -> Array:
    """The film: blur, exposure, contrast, a gradient over the field, tone curve and noise; uint8."""
    focus = film.uniform(0.4, 0.9) * OVERSAMPLING * max(1.0, size / 64)
    image = _shrink(gaussian_filter(absorption, focus, truncate=2.5))
    x, y = _grid(size)
    slope_x, slope_y = film.normal(0, 0.03, size=2)
    image = film.uniform(1.0, 1.25) * (1 - np.exp(image * np.float32(-1.4))) + film.uniform(-0.05, 0.05)  # saturates
    image = image + np.float32(slope_x) * x + np.float32(slope_y) * y
    image = np.clip(image, 0, 1) ** film.uniform(0.8, 1.4)
    grain = film.standard_normal((size, size), dtype=np.float32)
    image += np.float32(film.uniform(0.005, 0.016)) * grain
    exposed: Array = np.rint(255 * np.clip(image, 0, 1)).astype(np.uint8)
    return exposed
