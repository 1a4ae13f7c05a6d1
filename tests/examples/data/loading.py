"""Helpers of the tests on data: loading, and messages with their three parts: rule, what was received, cure."""

import numpy as np
import pytest
from PIL import Image

from examples.pretrain.data import load_images


def says(error, *parts):
    """Assert that the message has all parts, in this order."""
    message, at = str(error.value), 0
    for part in parts:
        assert part in message[at:], f"{part!r} is not where it should be in {message!r}"
        at = message.index(part, at) + len(part)


def refuses(path, *parts, size=4):
    """Assert that loading fails with a message that begins with the path."""
    with pytest.raises(ValueError, match=r".+") as error:
        load_images(path, size, progress=False)
    says(error, str(path), *parts)


def read(folder, size=6):
    """Load a folder without a progress bar."""
    return load_images(folder, size, progress=False)


def grey(rng, shape=(6, 6), dtype=np.uint8):
    """Return a random image."""
    return rng.integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def save(folder, name, array, **options):
    """Write an image file, with the folders above it."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path
