"""Multi-crop: two views of each image, and small local crops (SwAV, arXiv 2006.09882; DINO)."""

from __future__ import annotations

from collections.abc import Callable

import kornia.augmentation as K
from torch import Tensor, nn

from examples.pretrain.augment import two_views


def multi_crop(
    images: Tensor, augment: Callable[[Tensor], Tensor], count: int, share: tuple[float, float] = (0.1, 0.4)
) -> list[Tensor]:
    """Return two views `(B, C, S, S)`, and `count` local crops of half the side, which keep a share of the area."""
    side = images.shape[-1] // 2
    local = nn.Sequential(K.RandomResizedCrop((side, side), scale=share, p=1.0), K.RandomHorizontalFlip())
    return two_views(images, augment) + [local(images) for _ in range(count)]
