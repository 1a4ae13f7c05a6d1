"""Distortions that methods restore: cut-out, out-paint and a local shuffle of pixels, drawn for each image."""

from __future__ import annotations

import kornia.augmentation as K
import torch
from einops import rearrange
from torch import Tensor


def cut_out(images: Tensor, share: tuple[float, float] = (0.02, 0.2)) -> Tensor:
    """Return images `(B, C, S, S)` with a rectangle each, of a share of the area, set to 0: the mean, if normalised."""
    return K.RandomErasing(scale=share, ratio=(0.5, 2.0), p=1.0)(images)


def out_paint(images: Tensor, share: tuple[float, float] = (0.4, 0.7)) -> Tensor:
    """Return images `(B, C, S, S)` of which a rectangle each is kept; uniform noise of a unit variance surrounds it."""
    outside = cut_out(torch.ones_like(images[:, :1]), share)
    noise = (torch.rand_like(images) - 0.5) * 12**0.5
    return torch.where(outside > 0, noise, images)


def shuffle_pixels(images: Tensor, window: int = 4, probability: float = 0.3) -> Tensor:
    """Return images `(B, C, S, S)` with the pixels of some windows in another order; S must be a multiple of `window`.

    Args:
        images: of any values.
        window: side of a window in pixels.
        probability: of each window to be shuffled.

    Raises:
        ValueError: the side of the images is no multiple of the window's.
    """
    side, rest = divmod(images.shape[-1], window)
    if rest:
        raise ValueError(
            f"images must have a side of a multiple of {window} pixels to be shuffled in windows, got "
            f"{images.shape[-1]}: give another --image-size"
        )
    cells = rearrange(images, "b c (h p) (w q) -> b c (h w) (p q)", p=window, q=window)
    batch, channels, windows, pixels = cells.shape
    order = torch.rand(batch, 1, windows, pixels, device=images.device).argsort(-1)
    chosen = torch.rand(batch, 1, windows, 1, device=images.device) < probability
    shuffled = cells.gather(-1, order.expand(-1, channels, -1, -1))
    return rearrange(torch.where(chosen, shuffled, cells), "b c (h w) (p q) -> b c (h p) (w q)", h=side, p=window)


def distort(images: Tensor) -> Tensor:
    """Return images with shuffled pixels, of which one half has a rectangle cut out and the other one is painted out.

    Which half an image belongs to is drawn, as Models Genesis (arXiv 1908.06912) draws it.
    """
    shuffled = shuffle_pixels(images)
    inside = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return torch.where(inside, cut_out(shuffled), out_paint(shuffled))
