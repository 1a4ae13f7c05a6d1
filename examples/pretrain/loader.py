"""Batches of images that are in memory, or in a file that worker processes read ahead of the training step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from examples.pretrain import ranks
from examples.pretrain.augment import FloatImages
from examples.pretrain.data.cache import cores

MOST_WORKERS = 4
"""Of a rank. One reads and converts some thousand images of 224 px a second; a step takes longer."""


def load_batches(images: Tensor | FloatImages, batches: Sequence[Tensor], *, pin: bool) -> Iterable[Tensor]:
    """Return the images of each batch of indices, in order.

    Draws nothing from torch's global generator, so that results do not depend on where the images are.

    Args:
        images: `(N, C, S, S)` in [0, 1].
        batches: indices `(B,)`.
        pin: whether to copy batches from a file to pinned memory, from where a GPU takes them without waiting.
    """
    if isinstance(images, Tensor):
        return (images[index] for index in batches)
    return DataLoader(
        cast(Dataset, images),
        batch_size=None,
        sampler=batches,
        num_workers=min(MOST_WORKERS, cores() // ranks.world_size()),
        pin_memory=pin,
        generator=torch.Generator(),
    )
