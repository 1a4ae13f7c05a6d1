"""The anatomy of a phantom: a random patient, the outlines of the chest, and what it absorbs without findings.

Coordinates: ``across`` runs from -1 (the patient's right, drawn on the left as on any frontal film) to 1, ``down`` from
-1 at the neck to 1 in the abdomen.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

Array = np.ndarray


@dataclass(frozen=True)
class Patient:
    """The anatomy of one patient; a number without a comment is a length in chest coordinates or an absorption."""

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
    air: float  # how much less the lungs absorb
    vessels: float
    stomach: tuple[float, float, float]  # across, down and radius of its air
    seed: int  # of vessels and texture, the same at all visits


def draw_patient(rng: np.random.Generator) -> Patient:
    """Draw the anatomy of a random patient."""
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


class Chest:
    """The outlines of one chest on the pixels of the render; all arrays are ``(side, side)`` float32."""

    def __init__(self, patient: Patient, across: Array, down: Array, breath: float) -> None:
        p = self.patient = patient
        self.across, self.down = across, down
        self.lateral = np.abs(across)
        self.left = across > 0
        # From 0 at the level where the cage is widest to 1 at the tops of the lungs.
        widest = 0.2
        rise = np.clip((widest - down) / (widest - p.apex), 0, 1)
        spread = (1 - rise**p.roundness) ** (1 / p.roundness)
        self.outer = p.apex_across + (p.wall - p.apex_across) * spread
        inner = p.apex_across + (p.inner - p.apex_across) * spread
        right, left = p.dome
        off_dome = (self.lateral - 0.32) / (p.wall - 0.32)
        self.dome = np.where(self.left, left, right) + np.float32(breath)
        self.diaphragm = self.dome + p.dome_drop * off_dome**2 * np.where(off_dome < 0, 0.25, 1)
        # Distance to the nearest outline of the lung; positive inside.
        self.depth = np.minimum(
            np.minimum(self.outer - self.lateral, self.lateral - inner),
            np.minimum(self.diaphragm - down, down - p.apex),
        )
        self.lung = ramp(self.depth, 0.04)
        heart_across, heart_down, long, short = p.heart
        dx, dy = across - heart_across, down - np.float32(heart_down + breath)
        cos, sin = np.cos(p.heart_tilt), np.sin(p.heart_tilt)
        self.heart_edge = 1 - np.sqrt(((cos * dx + sin * dy) / long) ** 2 + ((cos * dy - sin * dx) / short) ** 2)


def ramp(distance: Array, width: float) -> Array:
    """Return a soft edge: 0 to 1 over ``width``, one half where ``distance`` is 0."""
    return np.clip(distance * np.float32(1 / width) + np.float32(0.5), 0, 1)


def absorption(chest: Chest, lost: Array | float) -> Array:
    """Return what the chest absorbs, about 0 to 1; ``lost`` is the share of air that fluid has displaced."""
    p, across, down, lateral = chest.patient, chest.across, chest.down, chest.lateral
    texture, ripple = _textures(p.seed, down.shape[0])

    half_width = 0.3 + (p.body - 0.3) * ramp(down - p.shoulder - 0.16 * lateral**2, 0.25)
    body = ramp(half_width - lateral, 0.05)
    heart = ramp(chest.heart_edge, 0.2)
    arch = ramp(p.aorta - np.hypot(across - 0.12, down + 0.26), 0.05)
    below = ramp(down - chest.diaphragm, 0.06)

    # Heart and arch lie within the outlines of the lungs and take the place of air.
    air = chest.lung * (1 - 0.8 * np.maximum(heart, arch)) * (1 - lost)
    # Lungs are thinner towards the wall; the bases of an upright lung hold more blood.
    air = air * (0.82 + 0.5 * np.clip(chest.depth, 0, 0.3) - 0.1 * down + 0.12 * texture)

    middle = ramp(p.inner + 0.02 + 0.05 * np.clip(down, 0, 1) - lateral, 0.14)
    total = p.tissue * (0.92 + 0.25 * ramp(p.wall + 0.02 - lateral, 0.3)) + 0.16 * middle
    total += 0.14 * heart + 0.06 * arch + 0.2 * below - p.air * air
    total += _bones(chest) + p.vessels * air * _vessels(chest, ripple)
    total -= 0.07 * ramp(0.045 - lateral, 0.04) * ramp(-0.22 - down, 0.2)  # windpipe
    bubble_across, bubble_down, radius = p.stomach
    total -= 0.16 * ramp(radius - np.hypot(across - bubble_across, 1.5 * (down - bubble_down)), 0.05)
    return (total + 0.04 * texture) * body


def _bones(chest: Chest) -> Array:
    p, down, lateral = chest.patient, chest.down, chest.lateral
    cage = ramp(chest.outer + 0.04 - lateral, 0.05) * ramp(0.78 - down, 0.3)
    out = lateral / np.float32(p.wall)
    # The backs of the ribs fall outwards from the spine, steeply at the wall; the fronts fall inwards.
    back = (down - p.rib_slope * out**2 - 0.12 * out**6) / p.rib_gap + p.rib_offset
    front = (down + 0.42 * out) / (1.15 * p.rib_gap) + 1.7 * p.rib_offset
    ribs = _band(back) + 0.55 * _band(front) * ramp(out - 0.5, 0.2)
    spine = ramp(p.spine - lateral, 0.05) * (0.75 + 0.25 * np.cos(down * np.float32(2 * np.pi / p.rib_gap)))
    height, slope = p.clavicle
    bar = down - height + slope * lateral - 0.05 * np.sin(6 * lateral)
    clavicle = ramp(0.04 - np.abs(bar), 0.03) * ramp(lateral - 0.1, 0.05) * ramp(p.wall - lateral, 0.1)
    return p.rib_density * ribs * cage + 0.09 * spine + 0.15 * clavicle


def _band(phase: Array) -> Array:
    """Return a rounded bar in the middle of each period."""
    return np.clip(1.4 * np.cos(phase * np.float32(2 * np.pi)) - 0.4, 0, 1)


def _vessels(chest: Chest, ripple: Array) -> Array:
    """Return hila, and branches that leave them and fade outwards."""
    dx, dy = chest.lateral - 0.2, chest.down - 0.02
    reach = np.hypot(dx, dy)
    angle = np.arctan2(dy, dx) + np.where(chest.left, 0.9, 0).astype(np.float32)
    near = np.exp(-(reach**2) * np.float32(1 / 0.15**2))
    stems = (1 - np.abs(np.sin(4 * angle + 2 * ripple))) ** 3 * np.exp(reach * -2.5)
    twigs = (1 - np.abs(np.sin(9 * angle + 4 * ripple))) ** 3 * np.clip(3 * reach, 0, 1) * np.exp(reach * -2)
    return 1.1 * near + 1.3 * stems + 0.9 * twigs


@lru_cache(maxsize=4)  # images of one patient are drawn one after another
def _textures(seed: int, side: int) -> tuple[Array, Array]:
    """Return two ``(side, side)`` maps of about unit range: cloudy over several octaves, and smooth."""
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
    """Return ``(side, cells)`` weights that interpolate smoothly between knots."""
    at = np.linspace(0, cells - 1, side)[:, None]
    away = np.clip(np.abs(at - np.arange(cells)), 0, 1)
    weights: Array = (1 - away**2 * (3 - 2 * away)).astype(np.float32)
    return weights
