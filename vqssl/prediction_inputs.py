"""What code prediction is given: features and codes of each scale in one layout, and whether they fit each other."""

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

from vqssl.checks import (
    check_code_range,
    check_device,
    check_floating,
    check_indices,
    check_one_a_scale,
    check_positive_int,
)
from vqssl.types import MultiCodeQuantized, MultiScaleQuantized, Quantized

__all__ = [
    "CodesOfScale",
    "check_places",
    "check_views",
    "codes_of_scales",
    "features_of_scales",
    "sizes_in",
    "widths_in",
]

CodesOfScale = tuple[Tensor, Tensor]
"""Codes ``(N, *spatial, D)``, D = 0 where there are none, and indices ``(N, *spatial)``."""


def sizes_in(sizes: Sequence[int]) -> list[int]:
    """Return the sizes of codebooks that were given in place of a quantiser.

    Raises:
        TypeError: it is a number, or another module than a quantiser of scales.
        ValueError: there is none, or a size below 1.
    """
    if isinstance(sizes, int | nn.Module):
        found = sizes if isinstance(sizes, int) else type(sizes).__name__
        raise TypeError(
            f"quantizer must be a MultiScaleQuantizer, or the size of each scale's codebook, got {found}: write [K]"
        )
    if not sizes:
        raise ValueError("quantizer must have at least one scale, got none: give the size of each codebook")
    for size in sizes:
        check_positive_int("each codebook size", size)
    return list(sizes)


def widths_in(in_dim: int | Sequence[int], scales: int) -> tuple[int, ...]:
    """Return the width of the features of each scale.

    Raises:
        TypeError: a width is not an int.
        ValueError: a width below 1, or another number of widths than scales.

    >>> widths_in(16, 3), widths_in([16, 32], 2)
    ((16, 16, 16), (16, 32))
    """
    dims = (in_dim,) * scales if isinstance(in_dim, int) else tuple(in_dim)
    for dim in dims:
        check_positive_int("in_dim", dim)
    if len(dims) != scales:
        raise ValueError(
            f"in_dim must be one width for all, or one for each of the quantiser's {scales} scales, got {list(dims)}"
        )
    return dims


def features_of_scales(
    features: Tensor | Sequence[Tensor], widths: Sequence[int], *, maps: bool, channels_last: bool, per_place: bool
) -> list[Tensor]:
    """Return one tensor a scale, channels last: ``(N, C)``, or maps ``(N, *spatial, C)`` where heads predict places.

    Args:
        features: pooled ``(N, C)``, or one map a scale.
        widths: C of each scale.
        maps: True if there is one map a scale.
        channels_last: layout of the maps.
        per_place: True keeps maps, False averages them over their places.

    Raises:
        TypeError: not floating tensors, or another number of them.
        ValueError: another width or number of axes.

    >>> maps = [torch.ones(2, 3, 4, 4)]
    >>> [each.shape for each in features_of_scales(maps, [3], maps=True, channels_last=False, per_place=False)]
    [torch.Size([2, 3])]
    """
    if not maps:
        several = "give the pooled features; of an encoder that returns (features, maps), the first"
        check_floating("features", features, several)  # type: ignore[arg-type]
        assert isinstance(features, Tensor)
        if features.ndim != 2 or features.shape[1] != widths[0]:
            raise ValueError(
                f"features must be (N, C) with C = {widths[0]}, got shape {tuple(features.shape)}: pool maps "
                "first, or write CodePrediction([...], ...) with the channels of the maps"
            )
        return [features] * len(widths)
    check_one_a_scale("features", features, len(widths))
    found = []
    for scale, (feature, channels) in enumerate(zip(features, widths, strict=True)):
        check_floating(f"features[{scale}]", feature)
        axis = -1 if channels_last else 1
        if feature.ndim < 3 or feature.shape[axis] != channels:
            layout = "(N, ..., C)" if channels_last else "(N, C, *spatial)"
            raise ValueError(
                f"features[{scale}] must be {layout} with C = {channels}, got shape {tuple(feature.shape)}: give "
                f"one map a scale, with channels {list(widths)}"
            )
        last = feature if channels_last else rearrange(feature, "b c ... -> b ... c")
        found.append(last if per_place else last.flatten(1, -2).mean(1))
    return found


def codes_of_scales(
    quantized: MultiScaleQuantized | Sequence[Tensor], sizes: Sequence[int], *, channels_last: bool
) -> list[CodesOfScale]:
    """Return codes, channels last, and indices of each scale; codes of width 0 where only indices were given.

    Args:
        quantized: what a quantiser of scales returned, or indices alone, ``(N, *spatial)`` a scale.
        sizes: of the codebooks.
        channels_last: layout of the codes.

    Raises:
        TypeError: the result of a single quantiser, or indices that are not integers.
        ValueError: another number of scales than sizes, or (on CPU) an index that the codebook does not have.

    >>> codes, indices = codes_of_scales([torch.tensor([[0, 1]])], [8], channels_last=True)[0]
    >>> codes.shape, indices.tolist()
    (torch.Size([1, 2, 0]), [[0, 1]])
    """
    if isinstance(quantized, Quantized | MultiCodeQuantized):
        raise TypeError(
            "quantized must be what a MultiScaleQuantizer returned, or a list of indices, one tensor a scale, got "
            f"{type(quantized).__name__} of a single quantiser"
        )
    if isinstance(quantized, MultiScaleQuantized):
        check_one_a_scale("quantized", quantized.indices, len(sizes))
        name, of_scales = "quantized.indices", quantized.indices
        codes = [each if channels_last else rearrange(each, "b d ... -> b ... d") for each in quantized.quantized]
    else:
        check_one_a_scale("quantized", quantized, len(sizes))
        name, of_scales = "quantized", tuple(quantized)
        for scale, indices in enumerate(of_scales):
            check_indices(f"quantized[{scale}]", indices)
        codes = [indices.new_zeros(*indices.shape, 0, dtype=torch.float32) for indices in of_scales]
    for scale, (indices, size) in enumerate(zip(of_scales, sizes, strict=True)):
        if indices.device.type == "cpu":  # elsewhere it would synchronise
            check_code_range(f"{name}[{scale}]", indices, size)
    return list(zip(codes, of_scales, strict=True))


def check_views(features: Tensor, indices: Tensor, views: int) -> None:
    """Raise unless the codes are of ``views`` views, and the features of the same images in at least as many views.

    Args:
        features: of a scale, of the views that predict.
        indices: of the same scale, of the views that are predicted.
        views: how many views the codes hold.

    Raises:
        ValueError: they do not fit, or are on two devices.
    """
    check_device("quantized", indices, features.device, "features")
    check_positive_int("views", views)
    rows, predicted = len(features), len(indices)
    if predicted % views:
        raise ValueError(f"quantized must hold {views} views of equally many images, got {predicted} rows")
    batch = predicted // views
    same = rows == predicted if views == 1 or batch == 0 else rows >= predicted and rows % batch == 0
    if not same:
        more = "" if views == 1 else f", or for more than {views} views of the same images"
        raise ValueError(
            f"features must have one row for each row of the codes, {predicted}{more}, got {rows}: join the views "
            "along the batch, those that are predicted first"
        )


def check_places(
    features: Sequence[Tensor], codes: Sequence[CodesOfScale], places: Sequence[Tensor] | None = None
) -> None:
    """Raise unless each cell of a student's map has one place to predict.

    Args:
        features: of each scale, ``(N, *spatial, C)``.
        codes: of each scale.
        places: of each scale, which cell of the codes' map each cell of the features' map predicts; None for the same.

    Raises:
        TypeError: places are not integers.
        ValueError: another number of them than scales, or of other sizes than the maps.
    """
    if places is not None:
        check_one_a_scale("places", places, len(features))
    for scale, (each, (_, indices)) in enumerate(zip(features, codes, strict=True)):
        name, of_cells = f"quantized.indices[{scale}]", indices
        if places is not None:
            name, of_cells = f"places[{scale}]", places[scale]
            check_indices(name, of_cells)
            check_device(name, of_cells, each.device, "features")
        if of_cells.shape[1:] != each.shape[1:-1] or len(of_cells) != len(indices):
            raise ValueError(
                f"{name} must have one entry for each cell of features[{scale}], {tuple(each.shape[:-1])}, got "
                f"{tuple(of_cells.shape)}: for views of other places or sizes, give places from "
                "vqssl.functional.matched_cells"
            )
