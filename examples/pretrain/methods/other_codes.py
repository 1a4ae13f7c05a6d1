"""Codes that are given to other views or images than those that they were found in."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vqssl.types import MultiScaleQuantized


def of_next_image(quantized: MultiScaleQuantized, count: int) -> MultiScaleQuantized:
    """Return the codes of `count` views, joined along the batch, each given to the image before."""
    return rearranged(quantized, lambda rows: torch.cat([view.roll(1, 0) for view in rows.chunk(count)]))


def of_other_view(quantized: MultiScaleQuantized) -> MultiScaleQuantized:
    """Return the codes of two views, joined along the batch, in the other order."""
    return rearranged(quantized, lambda rows: torch.cat(rows.chunk(2)[::-1]))


def rearranged(quantized: MultiScaleQuantized, order: Callable[[Tensor], Tensor]) -> MultiScaleQuantized:
    """Return codes and indices with their rows in another order."""
    return quantized._replace(
        quantized=tuple(map(order, quantized.quantized)), indices=tuple(map(order, quantized.indices))
    )
