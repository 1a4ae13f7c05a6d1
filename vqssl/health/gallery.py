"""A gallery of codes: patches of images at the places that chose each code. Imports matplotlib on first use."""

from collections.abc import Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from vqssl.checks import check_code_range, check_indices, check_positive_int
from vqssl.functional import code_counts
from vqssl.health.show import canvas_for

__all__ = ["code_patches", "draw_codes"]


def code_patches(images: Tensor, indices: Tensor, code: int, *, count: int = 8, size: int | None = None) -> Tensor:
    """Return patches of images around places that chose a code, evenly spread over all that did.

    Args:
        images: ``(B, C, H, W)``.
        indices: ``(B, h, w)`` integers, the codes of a map of the same images; -1 where masked.
        code: which one.
        count: at most so many patches.
        size: of a patch in pixels; None is the part of the image that a place covers, ``H / h`` rounded up.

    Returns:
        ``(n, C, size, size)``, n from 0 to ``count``. Beyond the edge of an image they repeat its outermost pixels.

    Raises:
        TypeError: ``images`` is not a tensor, or ``indices`` are not integers.
        ValueError: the shapes do not belong together, or a number is below 1.

    >>> images = torch.arange(16.0).reshape(1, 1, 4, 4)
    >>> indices = torch.tensor([[[0, 1], [2, 1]]])
    >>> code_patches(images, indices, 1).tolist()
    [[[[2.0, 3.0], [6.0, 7.0]]], [[[10.0, 11.0], [14.0, 15.0]]]]
    """
    _check(images, indices)
    check_positive_int("count", count)
    if size is None:
        size = -(-images.shape[-2] // indices.shape[-2])
    check_positive_int("size", size)
    places = (indices == code).nonzero().cpu()
    if len(places) > count:
        places = places[torch.linspace(0, len(places) - 1, count).round().long()]
    scale = torch.tensor([side / cells for side, cells in zip(images.shape[-2:], indices.shape[-2:], strict=True)])
    # The corner of a patch whose middle is the middle of its place.
    corners = ((places[:, 1:] + 0.5) * scale - size / 2).round().long()
    margin = size
    found = [images.new_empty(0, images.shape[1], size, size)]
    for (image, *_), (top, left) in zip(places.tolist(), corners.tolist(), strict=True):
        wide = pad(images[image : image + 1].float(), (margin,) * 4, mode="replicate").to(images.dtype)
        found.append(wide[..., top + margin : top + margin + size, left + margin : left + margin + size])
    return torch.cat(found)


def draw_codes(
    images: Tensor,
    indices: Tensor,
    path: str | Path,
    *,
    codes: Sequence[int] | None = None,
    count: int = 8,
    size: int | None = None,
    title: str = "Patches by code",
) -> tuple[int, ...]:
    """Write a picture with a row for each code: patches of the images at places that chose it.

    Of a residual or product quantiser give the indices of one level or group, ``indices[..., 0]``.

    Args:
        images: ``(B, C, H, W)`` with one or three channels. All are shown on one scale, from the smallest value to the
            largest.
        indices: ``(B, h, w)`` integers, the codes of a map of the same images; -1 where masked.
        path: the file; its ending sets the format (``.png``, ``.pdf``, ``.svg``).
        codes: which ones; None is the 32 most used, most used first.
        count: patches a code.
        size: of a patch in pixels, see :func:`code_patches`. Features see more of an image than the part that their
            place covers: give a larger size to show it.
        title: of the picture.

    Returns:
        The codes in the order of the rows.

    Raises:
        TypeError: ``images`` is not a tensor, ``indices`` are not integers, or ``codes`` is not a list.
        ValueError: the shapes do not belong together, a code is not a number from 0, there is no code to show, or
            matplotlib has no format of that ending.
        ImportError: matplotlib is not installed.

    >>> import tempfile
    >>> indices = torch.tensor([[[0, 1], [2, 1]]])
    >>> draw_codes(torch.rand(1, 1, 8, 8), indices, tempfile.mkdtemp() + "/codes.png")
    (1, 0, 2)
    """
    _check(images, indices)
    check_positive_int("count", count)
    if images.shape[1] not in (1, 3):
        raise ValueError(
            f"images must have one channel or three, got {images.shape[1]}: choose some, such as images[:, :1]"
        )
    counts = code_counts(indices, max(int(indices.max()) + 1, 1)).long()
    if codes is None:
        codes = [code for code in counts.argsort(descending=True, stable=True).tolist() if counts[code]][:32]
        if not codes:
            raise ValueError("indices must hold a code, got -1 alone, the index of masked places: give others")
    else:
        _check_codes(codes)
    low, high = images.float().aminmax()
    figure, save = canvas_for(path, (0.9 + 0.7 * count, 0.5 + 0.7 * len(codes)))
    axes: Any = figure.subplots(len(codes), count, squeeze=False)
    for row, code in zip(axes, codes, strict=True):
        patches = (code_patches(images, indices, code, count=count, size=size).float() - low) / (high - low or 1.0)
        for axis in row:
            axis.set(xticks=[], yticks=[])
            axis.set_frame_on(False)
        for axis, patch in zip(row, patches.cpu(), strict=False):
            axis.imshow(patch.movedim(0, -1).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)
        used = int(counts[code]) if code < len(counts) else 0
        row[0].set_ylabel(f"{code}\n{used}×", rotation=0, ha="right", va="center", fontsize=9)
    figure.suptitle(title, weight="bold", parse_math=False)
    save()
    return tuple(codes)


def _check(images: Tensor, indices: Tensor) -> None:
    check_indices("indices", indices)
    if not isinstance(images, Tensor):
        raise TypeError(
            f"images must be a tensor (B, C, H, W), got {type(images).__name__}: write torch.as_tensor(images)"
        )
    if images.ndim != 4:
        cures = {2: "give images[None, None]", 3: "give images[:, None] of grey images, images[None] of a single one"}
        cure = cures.get(images.ndim, "give a batch of images")
        raise ValueError(f"images must be (B, C, H, W), got {tuple(images.shape)}: {cure}")
    if indices.ndim != 3:
        cures = {
            2: "give indices.unflatten(1, (h, w)) of places in a row, indices[None] of a single image",
            4: "give one level or group, indices[..., 0]",
        }
        cure = cures.get(indices.ndim, "give the indices of a map")
        raise ValueError(f"indices must be (B, h, w), got {tuple(indices.shape)}: {cure}")
    if len(images) != len(indices) or not indices.numel():
        raise ValueError(
            f"indices must be those of at least one place in each of the {len(images)} images, got "
            f"{tuple(indices.shape)}: give the codes of the same images"
        )
    check_code_range("indices", indices, 2**31)


def _check_codes(codes: Any) -> None:
    """Raise unless ``codes`` are numbers of codes, at least one."""
    if isinstance(codes, str | Tensor) or not isinstance(codes, Sequence):
        cure = "write codes.tolist()" if isinstance(codes, Tensor) and codes.ndim == 1 else "write codes=[0, 1]"
        raise TypeError(f"codes must be a list of code numbers, got {type(codes).__name__}: {cure}")
    if not codes or any(isinstance(code, bool) or not isinstance(code, Integral) or code < 0 for code in codes):
        raise ValueError(
            f"codes must be one or more numbers of codes, from 0, got {list(codes)!r:.80}: leave it out for the most "
            "used"
        )
