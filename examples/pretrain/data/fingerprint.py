"""Fingerprints: whether two sets of images are the same, and in what they differ."""

from __future__ import annotations

import hashlib
import json
import re

import numpy as np

PARTS = ("names", "labels", "label names", "groups", "masks")
"""What a fingerprint holds beside the images themselves."""


def fingerprint_of(images: np.ndarray, **parts: np.ndarray | tuple[str, ...] | None) -> str:
    """Return shape, dtype and digests of every image and of what is known about them, as JSON.

    Args:
        images: `(N, ...)`.
        parts: arrays or tuples of one entry an image or class, by the names in `PARTS` with underscores; None where
            unknown.
    """
    each = [hashlib.blake2b(np.ascontiguousarray(image).data, digest_size=16).digest() for image in images]
    found = {
        "images": f"{images.shape} {images.dtype}",
        "contents": _digest(b"".join(sorted(each))),
        "order": _digest(b"".join(each)),
        **{name.replace("_", " "): _digest_of(part) for name, part in parts.items()},
    }
    return json.dumps(found)


def is_fingerprint(text: str) -> bool:
    """Return True for a fingerprint by this version or an earlier one."""
    shape = r"\(\d+, \d+, \d+(, 3)?\) uint(8|16)"
    return re.fullmatch(rf'{shape} \d+|\{{"images": "{shape}", .*\}}', text) is not None


def side_of(fingerprint: str) -> int:
    """Return the side of the images in pixels: `(N, S, S) ...` is in every fingerprint."""
    return int(fingerprint.split(",")[1])


def changes(theirs: str, ours: str, images: np.ndarray, *, images_only: bool = False) -> list[str]:
    """Return what differs, each as a clause. What one of the two does not know, such as labels, is not compared.

    Args:
        theirs: fingerprint of an earlier run, perhaps by an earlier version.
        ours: fingerprint of `images`.
        images: needed for earlier versions.
        images_only: whether to compare the images and their order alone.
    """
    if not theirs.startswith("{"):
        return [] if theirs == _version_2(images) else ["the training images are others"]
    before, now = json.loads(theirs), json.loads(ours)
    found = []
    if before["images"] != now["images"]:
        found.append(f"the training images were {before['images']}, are {now['images']}")
    elif before["contents"] != now["contents"]:
        found.append("the training images are others")
    elif before["order"] != now["order"]:
        found.append("the training images are in another order")
    if images_only:
        return found
    known = [name for name in PARTS if None not in (before.get(name), now.get(name))]
    return found + [f"their {name} are others" for name in known if before[name] != now[name]]


def _version_2(images: np.ndarray) -> str:
    """Return the fingerprint that checkpoints of format 2 hold, which looks at some 64 images only."""
    checksum = int(images[:: max(1, len(images) // 64)].sum(dtype="uint64"))
    return f"{images.shape} {images.dtype} {checksum}"


def _digest_of(part: np.ndarray | tuple[str, ...] | None) -> str | None:
    if part is None or len(part) == 0:
        return None
    if isinstance(part, np.ndarray) and part.ndim > 1:
        return _digest(f"{part.shape} {part.dtype}".encode() + part.tobytes())
    # Values, not bytes: a longest name elsewhere, or another width of integers, changes no label.
    return _digest(repr(part.tolist() if isinstance(part, np.ndarray) else list(part)).encode())


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
