"""Generated chest X-rays in two random views, in place of your own data."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from examples.pretrain.augment import Augmentation, to_float, views_of
from examples.pretrain.phantoms import make_phantoms


def xrays(count: int = 64, size: int = 32, channels: int = 1) -> Tensor:
    """Return images `(count, channels, size, size)` of mean 0 and standard deviation 1."""
    images = to_float(make_phantoms(count, size).images)
    images = (images - images.mean()) / images.std()
    return images.repeat(1, channels, 1, 1)


def pairs(steps: int, *, batch: int = 16, size: int = 32, channels: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield two views `(batch, channels, size, size)` of the same images, `steps` times."""
    images = xrays(4 * batch, size, channels)
    view = views_of(size, Augmentation(crop_scale=(0.4, 1.0)))
    for step in range(steps):
        if step % 4 == 0:
            order = torch.randperm(len(images))
        chosen = images[order[step % 4 * batch :][:batch]]
        yield view(chosen), view(chosen)
