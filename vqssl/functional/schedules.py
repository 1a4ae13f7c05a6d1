"""Schedules. They return plain Python floats, because torch.load refuses checkpoints with other scalars."""

import math
from typing import overload

import torch
from torch import Tensor

from vqssl.checks import check_range

__all__ = ["cosine_momentum"]


@overload
def cosine_momentum(step: int, total_steps: int, start: float = 0.996, end: float = 1.0) -> float: ...
@overload
def cosine_momentum(step: Tensor, total_steps: int, start: float = 0.996, end: float = 1.0) -> Tensor: ...
def cosine_momentum(step: int | Tensor, total_steps: int, start: float = 0.996, end: float = 1.0) -> float | Tensor:
    r"""Return the teacher's momentum at a step of a run (BYOL, arXiv 2006.07733, section 3.3).

    .. math:: m_t = m_T - (m_T - m_0) \cdot \tfrac{1}{2} \big( \cos(\pi t / T) + 1 \big)

    Args:
        step: t, counted from 0; beyond T the momentum stays at ``end``. An int, or an integer tensor: an int counter
            makes ``torch.compile`` recompile at every step.
        total_steps: T; 0 is a run of one step, at ``end``.
        start: m_0, 0 to 1.
        end: m_T, 0 to 1.

    Returns:
        The momentum: a float for an int, a float64 tensor on the same device for a tensor.

    Raises:
        TypeError: ``start`` or ``end`` is not a number.
        ValueError: ``step`` is a negative int, ``total_steps`` is negative, or a momentum is outside [0, 1].

    >>> [round(cosine_momentum(t, 100), 4) for t in (0, 50, 100)]
    [0.996, 0.998, 1.0]
    """
    check_range("start", start, 0, 1, rule="a momentum weighs the old weights")
    check_range("end", end, 0, 1, rule="a momentum weighs the old weights")
    if total_steps < 0:
        raise ValueError(f"total_steps must be at least 0, got {total_steps}: give the length of the run in steps")
    if isinstance(step, Tensor):
        t = (step.double() / total_steps).clamp_max(1.0) if total_steps else torch.ones_like(step, dtype=torch.float64)
        return end - (end - start) * (torch.cos(math.pi * t) + 1) / 2
    if step < 0:
        raise ValueError(f"step must not be negative, got {step}: count from 0")
    progress = min(step / total_steps, 1.0) if total_steps else 1.0
    return float(end - (end - start) * (math.cos(math.pi * progress) + 1) / 2)
