"""Cropping to the centre square and resizing, in the full depth of the images."""

from __future__ import annotations

import numpy as np
from PIL import Image


def resize(image: np.ndarray, size: int, filter: Image.Resampling = Image.Resampling.BILINEAR) -> np.ndarray:
    """Return the centre square of ``(H, W)`` or ``(H, W, 3)`` at ``(size, size)``, in the dtype of the image."""
    if image.ndim == 3:
        return np.stack([resize(image[..., channel], size, filter) for channel in range(3)], axis=-1)
    height, width = image.shape
    side = min(height, width)
    left, top = (width - side) // 2, (height - side) // 2  # whole pixels: a shift by half a pixel would blur
    image = image[top : top + side, left : left + side]
    if side == size:
        return image
    # Pillow filters 16-bit modes in 8 bits or not at all, but floats in full depth. Its bilinear filter widens when an
    # image shrinks, which is the antialiasing, and cannot overshoot the range.
    floats = Image.fromarray(image.astype(np.float32))
    whole: np.ndarray = np.rint(np.asarray(floats.resize((size, size), filter))).astype(image.dtype)
    return whole


def resize_all(images: np.ndarray, size: int, filter: Image.Resampling) -> np.ndarray:
    """Return :func:`resize` of every image, or the array itself if it has that size already."""
    if images.shape[1:3] == (size, size):
        return images
    if 0 in images.shape[1:3]:
        raise ValueError(f"images must have at least one pixel, got shape {images.shape}")
    resized = np.empty((len(images), size, size, *images.shape[3:]), images.dtype)
    for target, image in zip(resized, images, strict=True):
        target[...] = resize(image, size, filter)
    return resized
