"""Random views of a batch of images, by kornia, on the device of the images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import kornia.augmentation as K
import numpy as np
import torch
from torch import Tensor, nn

from examples.pretrain.ranges import check_range


@dataclass(frozen=True)
class Augmentation:
    """The paper's augmentation: random resized crop, flip, blur, then normalisation. `jitter` is an addition."""

    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Smallest and largest share of the area that a crop keeps."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    blur: float = 0.5
    """Probability of a Gaussian blur."""
    jitter: float = 0.0
    """Largest relative change of brightness and contrast; 0 in the paper."""


def check_augmentation(config: Augmentation) -> None:
    """Raise ValueError unless every option is in its range."""
    small, large = config.crop_scale
    check_range("the first of --augmentation.crop-scale", small, above=0, most=1)
    check_range("the second of --augmentation.crop-scale", large, least=small, most=1)
    check_range("--augmentation.flip", config.flip, least=0, most=1)
    check_range("--augmentation.blur", config.blur, least=0, most=1)
    check_range("--augmentation.jitter", config.jitter, least=0, most=1)


def to_float(images: np.ndarray) -> Tensor:
    """Return `(N, S, S[, 3])` uint8 or uint16 as `(N, C, S, S)` float32 in [0, 1]."""
    full = np.iinfo(images.dtype).max
    channels_last = images[..., None] if images.ndim == 3 else images
    # By numpy: torch has few operators for uint16.
    return torch.from_numpy(np.ascontiguousarray((channels_last / np.float32(full)).transpose(0, 3, 1, 2)))


class Normalize(nn.Module):
    """The map x -> (x - mean) / std by channel, with the statistics of the training images."""

    mean: Tensor
    std: Tensor

    def __init__(self, images: np.ndarray) -> None:
        super().__init__()
        full = float(np.iinfo(images.dtype).max)
        channels = images.reshape(-1, 1 if images.ndim == 3 else 3)
        self.register_buffer("mean", torch.tensor(channels.mean(0, dtype=np.float64) / full).float())
        self.register_buffer("std", torch.tensor(channels.std(0, dtype=np.float64) / full).float().clamp_min(1e-3))

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised images, of the same shape `(B, C, S, S)`."""
        return (x - self.mean[:, None, None]) / self.std[:, None, None]


def views_of(size: int, config: Augmentation) -> nn.Module:
    """Return a module that maps `(B, C, size, size)` in [0, 1] to one random view of each image."""
    kernel = max(3, size // 10 // 2 * 2 + 1)  # SimCLR's rule: a tenth of the side, odd
    jitter = (1 - config.jitter, 1 + config.jitter)
    return K.AugmentationSequential(
        K.RandomResizedCrop((size, size), scale=config.crop_scale, ratio=(3 / 4, 4 / 3), p=1.0),
        K.RandomHorizontalFlip(p=config.flip),
        K.RandomBrightness(brightness=jitter, p=0.8 if config.jitter else 0.0),
        K.RandomContrast(contrast=jitter, p=0.8 if config.jitter else 0.0),
        K.RandomGaussianBlur((kernel, kernel), (0.1, 2.0), p=config.blur),
    )


def two_views(images: Tensor, augment: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Return two independent views of each image."""
    return [augment(images) for _ in range(2)]
