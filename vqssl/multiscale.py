"""MultiScaleQuantizer: projection, codebook and commitment for each level of a feature pyramid."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Self, Unpack

import torch
from einops import rearrange
from torch import Tensor, nn

from vqssl.checks import (
    check_device,
    check_floating,
    check_floating_dtype,
    check_mask,
    check_one_a_scale,
    check_positive_int,
    check_seed,
)
from vqssl.codebook import EMACodebook, warn_of_random_codes
from vqssl.codebook_options import CodebookOptions
from vqssl.foreign_keywords import FOREIGN_KEYWORDS, names_foreign_keywords
from vqssl.functional.masking import zero_where_masked
from vqssl.loading import check_before_loading
from vqssl.projection import Projection, ProjectionName, projection_of
from vqssl.several_codebooks import (
    codebook_at,
    codebooks_in,
    freeze_all,
    set_first_codes_,
    sizes_of,
    usage_of_all,
)
from vqssl.types import CodebookUsage, MultiScaleQuantized, Quantized
from vqssl.update import update_codebooks

__all__ = ["MultiScaleQuantizer"]

# Not in the decorator: Sphinx cannot parse a dictionary that unpacks another there.
KEYWORDS = {
    **FOREIGN_KEYWORDS,
    "codebook_dim": "dim=, the width to which each map is projected",
    "accept_image_fmap": "nothing if it is True, channels_last=True if it is False",
}


class MultiScaleQuantizer(nn.Module):
    r"""A quantiser of one or several feature maps, each projected to the common code width first.

    .. math:: z^s = \phi_s(h^s), \qquad q^s = e^s_{k}, \qquad L_{VQ} = \sum_s \beta \,
        \mathrm{mean}\,(z^s - \mathrm{sg}[q^s])^2

    (DiSSECT, arXiv 2509.18765, Eqs. 4 and 5.) All scales are quantised with the codes from before the step; then, in
    training mode, the codebooks are updated.

    The commitment loss has a gradient only where the maps have one or the projection learns. With a teacher's maps and
    the default projection it is only a diagnostic. Detach maps of a network that is being trained, for example in
    SimSiam, unless commitment is meant to pull its features towards the codes.

    Args:
        in_channels: C_s, the channels of each map, one number a scale.
        codebook_size: K, for all scales or one number a scale.
        dim: D, the common code width.
        shared: True if all scales use one codebook, updated once a step with the tokens of all scales.
        channels_last: False for maps with channels first and any number of spatial axes, ``(B, C, T)``,
            ``(B, C, H, W)``, ``(B, C, D, H, W)``; True for tokens ``(B, ..., C)``. Outputs come in the same layout.
        projection: of the channels of each map to ``dim``: ``"orthogonal"``, also None (default), is a fixed
            :class:`~vqssl.OrthogonalProjection` drawn from ``seed + s``; ``"learned"`` a
            :class:`~vqssl.LearnedProjection`, whose parameters belong in the optimizer; ``"identity"`` leaves maps with
            C_s = D as they are; or a function ``(in_channels, dim) -> module`` for tokens, channels last.
        seed: scale s draws from ``seed + s``.
        device: of projections and codebooks.
        dtype: of projections and codebooks.
        **codebook_options: what :class:`~vqssl.EMACodebook` takes by name: ``decay``, ``metric``,
            ``commitment_weight``, ``revival`` and so on.

    Shape:
        Input: a sequence of S maps ``(B, C_s, *spatial_s)``, and optionally a sequence of S masks ``(B, *spatial_s)``
        (True where a token counts; an entry may be None). Scales are quantised independently of each other, so that B
        may differ between them. Output: :class:`~vqssl.types.MultiScaleQuantized`.

    Raises:
        TypeError: an argument of another type than above, sizes by position, or another library's keyword.
        ValueError: no scale, another number of sizes than scales, several sizes for a shared codebook, or what
            :class:`~vqssl.EMACodebook` refuses.

    >>> import torch
    >>> quantizer = MultiScaleQuantizer([16, 32], codebook_size=8, dim=4)
    >>> out = quantizer([torch.randn(2, 16, 8, 8), torch.randn(2, 32, 4, 4)])
    >>> [tuple(q.shape) for q in out.quantized], [tuple(k.shape) for k in out.indices]
    ([(2, 4, 8, 8), (2, 4, 4, 4)], [(2, 8, 8), (2, 4, 4)])
    """

    @names_foreign_keywords(
        KEYWORDS,
        sizes_by_name="MultiScaleQuantizer(in_channels, codebook_size=, dim=)",
        positional=1,
        passed_on=CodebookOptions.__annotations__,
    )
    def __init__(
        self,
        in_channels: Sequence[int],
        *,
        codebook_size: int | Sequence[int],
        dim: int,
        shared: bool = False,
        channels_last: bool = False,
        projection: ProjectionName | Projection | None = None,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **codebook_options: Unpack[CodebookOptions],
    ) -> None:
        super().__init__()
        if isinstance(in_channels, int):
            raise TypeError(
                f"in_channels must be a sequence, one number a scale, got {in_channels}: write [{in_channels}]"
            )
        self.in_channels = tuple(in_channels)
        if not self.in_channels:
            raise ValueError("in_channels must name at least one scale, got none: give the channels of each map")
        for channels in self.in_channels:
            check_positive_int("each of in_channels", channels)
        self.dim = dim
        self.shared = shared
        self.channels_last = channels_last
        sizes = sizes_of(codebook_size, len(self.in_channels), "scale", shared=shared)
        check_seed(seed)
        check_floating_dtype(dtype)
        self.projections = nn.ModuleList(
            projection_of(projection, channels, dim, seed=seed + scale)
            for scale, channels in enumerate(self.in_channels)
        )
        self.projections.to(device=device, dtype=dtype)
        self.codebooks = nn.ModuleList(
            EMACodebook(codebook_size=size, dim=dim, seed=seed + scale, device=device, dtype=dtype, **codebook_options)
            for scale, size in enumerate(sizes)
        )
        check_before_loading(self)

    @property
    def num_scales(self) -> int:
        """S, how many maps a call takes."""
        return len(self.in_channels)

    def forward(self, features: Sequence[Tensor], masks: Sequence[Tensor | None] | None = None) -> MultiScaleQuantized:
        """Project and quantise each map, and in training mode update the codebooks.

        Args:
            features: S maps ``(B, C_s, *spatial_s)``, or ``(B, ..., C_s)`` where ``channels_last``.
            masks: S masks ``(B, *spatial_s)``, or None.

        Returns:
            :class:`~vqssl.types.MultiScaleQuantized`.

        Raises:
            TypeError: a map is not a floating tensor, a mask is not boolean, or one tensor came instead of a sequence.
            ValueError: another number of maps or masks than scales, the wrong channels or device, or a mask of another
                shape. No codebook has changed then.
        """
        masks = self._check(features, masks)
        if self.training:
            self._check_ranks()
        tokens = [
            project(self._channels_last(feature, mask))
            for project, feature, mask in zip(self.projections, features, masks, strict=True)
        ]
        warn_of_random_codes(self, self._own_codebooks())
        if self.training:
            self._initialize(tokens, masks)
        results = self._quantize(tokens, masks)
        if self.training:
            self._update(tokens, results)
        losses = tuple(result.commitment_loss for result in results)
        return MultiScaleQuantized(
            quantized=tuple(self._layout_of_input(result.quantized) for result in results),
            indices=tuple(result.indices for result in results),
            commitment_loss=torch.stack(losses).sum(),
            commitment_losses=losses,
        )

    def codebook(self, scale: int) -> EMACodebook:
        """Return the codebook of a scale, 0 to S - 1 in the order of ``in_channels``; one for all where shared.

        Raises:
            ValueError: there is no such scale.

        >>> MultiScaleQuantizer([16, 32], codebook_size=8, dim=4).codebook(1)
        EMACodebook(codebook_size=8, dim=4, decay=0.99, ...)
        """
        return codebook_at(self.codebooks, scale, self.num_scales, "scale")

    def usage(self, dead_below: float = 0.1) -> tuple[CodebookUsage, ...]:
        """Return :meth:`vqssl.EMACodebook.usage` of each scale; of the one codebook where shared.

        >>> [usage.dead.item() for usage in MultiScaleQuantizer([16, 32], codebook_size=8, dim=4).usage()]
        [0, 0]
        """
        return usage_of_all(self.codebooks, dead_below)

    def freeze(self, frozen: bool = True) -> Self:
        """Freeze all codebooks, see :meth:`vqssl.EMACodebook.freeze`; ``freeze(False)`` resumes their updates."""
        freeze_all(self.codebooks, frozen)
        return self

    def extra_repr(self) -> str:
        """Return sizes and options, for ``repr``."""
        options = [f"dim={self.dim}"]
        options += [name for name in ("shared", "channels_last") if getattr(self, name)]
        return f"in_channels={list(self.in_channels)}, {', '.join(options)}"

    # ---- parts ----

    def _own_codebooks(self) -> list[EMACodebook]:
        return codebooks_in(self.codebooks)

    def _check_ranks(self) -> None:
        layout = {
            "in_channels": str(self.in_channels),
            "shared": self.shared,
            "projection": type(self.projections[0]).__name__,
        }
        for number, codebook in enumerate(self._own_codebooks()):
            codebook.check_ranks(scale=number, **layout)

    def _initialize(self, tokens: list[Tensor], masks: Sequence[Tensor | None]) -> None:
        if not any(codebook.needs_codes for codebook in self._own_codebooks()):
            return
        if self.shared:
            self.codebook(0).initialize_(self._joined(tokens), _joined_masks(tokens, masks))
            return
        set_first_codes_(self.codebooks, tokens, masks)

    def _quantize(self, tokens: list[Tensor], masks: Sequence[Tensor | None]) -> list[Quantized]:
        return [
            self.codebook(scale).quantize(z, mask) for scale, (z, mask) in enumerate(zip(tokens, masks, strict=True))
        ]

    def _update(self, tokens: list[Tensor], results: list[Quantized]) -> None:
        indices = [result.indices for result in results]
        if self.shared:
            tokens, indices = [self._joined(tokens)], [torch.cat([k.reshape(-1) for k in indices])]
        codebooks = self._own_codebooks()
        tokens = [codebook.as_compared(z) for codebook, z in zip(codebooks, tokens, strict=True)]
        update_codebooks(codebooks, tokens, indices, compared=True)

    def _joined(self, tokens: list[Tensor]) -> Tensor:
        return torch.cat([z.reshape(-1, self.dim) for z in tokens])

    def _channels_last(self, feature: Tensor, mask: Tensor | None) -> Tensor:
        tokens = feature if self.channels_last else rearrange(feature, "b c ... -> b ... c")
        # A NaN under the mask must not reach the projection: it would make the gradient of its weights NaN.
        return zero_where_masked(tokens, mask)

    def _layout_of_input(self, quantized: Tensor) -> Tensor:
        return quantized if self.channels_last else rearrange(quantized, "b ... c -> b c ...")

    def _check(self, features: Sequence[Tensor], masks: Sequence[Tensor | None] | None) -> Sequence[Tensor | None]:
        masks = [None] * self.num_scales if masks is None else masks
        check_one_a_scale("features", features, self.num_scales)
        check_one_a_scale("masks", masks, self.num_scales)
        layout = "(B, ..., C)" if self.channels_last else "(B, C, *spatial)"
        for scale, feature in enumerate(features):  # all before any shape: (z, maps) starts with a tensor
            check_floating(f"features[{scale}]", feature, "of a model that returns (z, maps), give the maps alone")
        for scale, (feature, channels) in enumerate(zip(features, self.in_channels, strict=True)):
            axis = -1 if self.channels_last else 1
            if feature.ndim < 2 or feature.shape[axis] != channels:
                raise ValueError(
                    f"features[{scale}] must be {layout} with C = {channels}, got shape {tuple(feature.shape)}: "
                    f"{self._cure(features)}"
                )
            check_device(f"features[{scale}]", feature, self.codebook(scale).embed.device)
            shape = feature.shape[:-1] if self.channels_last else feature.shape[:1] + feature.shape[2:]
            check_mask(masks[scale], shape, feature.device, f"masks[{scale}]")
        return masks

    def _cure(self, features: Sequence[Tensor]) -> str:
        """Return what to write instead of maps whose channels do not fit."""
        expected = list(self.in_channels)
        other_axis = 1 if self.channels_last else -1
        if [f.shape[other_axis] if f.ndim > 1 else None for f in features] == expected:
            return f"write MultiScaleQuantizer(..., channels_last={not self.channels_last}) for this layout"
        return (
            f"give one map a scale, with channels {expected} in this order, or write MultiScaleQuantizer([...], ...) "
            "with the channels of your maps"
        )

    if TYPE_CHECKING:  # nn.Module's __call__ is Any to type checkers

        def __call__(
            self, features: Sequence[Tensor], masks: Sequence[Tensor | None] | None = None
        ) -> MultiScaleQuantized:
            """Call :meth:`forward`."""


def _joined_masks(tokens: list[Tensor], masks: Sequence[Tensor | None]) -> Tensor | None:
    if all(mask is None for mask in masks):
        return None
    return torch.cat(
        [
            (torch.ones(z.shape[:-1], dtype=torch.bool, device=z.device) if mask is None else mask).reshape(-1)
            for z, mask in zip(tokens, masks, strict=True)
        ]
    )
