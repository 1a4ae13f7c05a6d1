"""Random views of a batch of images, by kornia, on the device of the images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

import kornia.augmentation as K
import numpy as np
import torch
from torch import Tensor, nn

from examples.pretrain.data.stored import StoredImages, stored_or_none
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


class FloatImages:
    """Images in a file as `(N, C, S, S)` float32 in [0, 1], read when they are indexed or split."""

    def __init__(self, images: StoredImages) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        return to_float(self.images[index.numpy() if isinstance(index, Tensor) else index])

    def split(self, size: int) -> Iterator[Tensor]:
        """Yield all images in order, `size` at a time."""
        for start in range(0, len(self), size):
            yield self[start : start + size]

    def to(self, device: str) -> Tensor:
        """Return all images in memory, on a device."""
        return self[:].to(device)


def to_float(images: np.ndarray) -> Tensor:
    """Return `(N, S, S[, 3])` uint8 or uint16 as `(N, C, S, S)` float32 in [0, 1]; those in a file stay there."""
    stored = stored_or_none(images)
    if stored is not None:
        return cast(Tensor, FloatImages(stored))
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
        mean, std = _moments(images)
        self.register_buffer("mean", torch.tensor(mean / full).float())
        self.register_buffer("std", torch.tensor(std / full).float().clamp_min(1e-3))

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised images, of the same shape `(B, C, S, S)`."""
        return (x - self.mean[:, None, None]) / self.std[:, None, None]


def _moments(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation of each channel, exact before they are rounded to float64.

    They come from counts of each value, so that neither the order nor the size of the parts matters.
    """
    counts = np.zeros((1 if images.ndim == 3 else 3, np.iinfo(images.dtype).max + 1), np.int64)
    for start in range(0, len(images), 64):
        channels = images[start : start + 64].reshape(-1, len(counts))
        for count, values in zip(counts, channels.T, strict=True):
            count += np.bincount(values, minlength=len(count))
    moments = []
    for count in counts:
        total = int(count.sum())
        (there,) = count.nonzero()
        first = sum(int(value) * int(count[value]) for value in there)
        second = sum(int(value) ** 2 * int(count[value]) for value in there)
        moments.append((first / total, math.sqrt((total * second - first**2) / total**2)))
    mean, std = np.array(moments).T
    return mean, std


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
