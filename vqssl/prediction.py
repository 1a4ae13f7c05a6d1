"""CodePrediction: a student predicts the codes that a quantiser gives another view."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from vqssl.centring import CentringName, TargetCentring
from vqssl.checks import by_name, check_object, check_positive_int, policy_name
from vqssl.code_heads import (
    CODE_HEADS,
    CodeHead,
    CodeHeadName,
    GeneratedHead,
    HeadSizes,
    last_linear,
    restart_rows_,
)
from vqssl.code_targets import CODE_TARGETS, CodeTarget, CodeTargetName
from vqssl.foreign_keywords import names_foreign_keywords
from vqssl.foreign_methods import ForeignMethod
from vqssl.functional.cross_view import mean_over_pairs
from vqssl.functional.places import entries_at
from vqssl.multiscale import MultiScaleQuantizer
from vqssl.prediction_inputs import (
    CodesOfScale,
    check_places,
    check_views,
    codes_of_scales,
    features_of_scales,
    sizes_in,
    widths_in,
)
from vqssl.types import CodePredictionLoss, MultiScaleQuantized

__all__ = ["CodePrediction"]


class CodePrediction(nn.Module):
    r"""Heads that predict, from a student's features of one view, the codes of another view, and their loss.

    .. math:: \mathcal{L} = \frac{1}{S} \sum_s L\big(g_s(f^v), t_s^w\big), \qquad v \neq w

    f are features of a student, and t comes from what a :class:`~vqssl.MultiScaleQuantizer` returns for the other view,
    usually of a teacher's maps. Gradients reach the heads and f, never t. ``target`` says what is predicted:

    - ``"anchor"`` (default): the average code of a view, layer-normed and centred; L is 2 - 2 cos.
    - ``"bag"``: the distribution of codes over a view; L is the cross-entropy. BoWNet (arXiv 2002.12247) and OBoW
      (arXiv 2012.11552) predict it.
    - ``"place"``: the code of each place; L is the cross-entropy. For masked prediction (HuBERT, BEiT v2), where both
      are one view and places that were not masked have index -1; or for two crops with ``places`` from
      :func:`vqssl.functional.matched_cells`.

    Call :meth:`follow_` once after each optimizer step, if the codes come from a MultiScaleQuantizer that trains.
    Generated heads compute their weights from the codes, and where a head has one output a code, the row of a code that
    a revival has replaced starts again from zero.

    Args:
        in_dim: C, the width of pooled features ``(B, C)``, which all heads take; or one number a scale, for maps.
        quantizer: the quantiser whose codes are predicted; or K, one number a scale, for codes from anywhere. It is
            only read, and not kept.
        target: one of the names above, or an object as in :mod:`vqssl.code_targets`.
        head: ``"mlp"`` (linear, batch norm, ReLU, linear), ``"linear"``, ``"generated"`` (weights computed from the
            codes, :class:`~vqssl.code_heads.GeneratedHead`), or a function as in :mod:`vqssl.code_heads`.
        hidden_dim: of the heads.
        dim: D, where K was given and the target or the head needs it.
        centring: what is subtracted from centred targets: ``"batch"``, the mean over all views of the batch and all
            ranks, or ``"running"``, its moving average, for small batches.
        centre_momentum: of the moving average.
        channels_last: layout of maps, where K was given; else the quantiser's.
        process_group: the ranks over which targets are centred. None is the default group at the time of the call.

    Shape:
        Features ``(N, C)``, or S maps ``(N, C_s, *spatial_s)``; a :class:`~vqssl.types.MultiScaleQuantized` of the same
        N, or of fewer views. Output :class:`~vqssl.types.CodePredictionLoss`.

    Raises:
        TypeError: an argument of another type than above.
        ValueError: a size below 1, another number of widths than scales, an unknown name, a target of places without
            maps, or a missing ``dim``.

    >>> import torch, vqssl
    >>> quantizer = vqssl.MultiScaleQuantizer([16, 32], codebook_size=8, dim=4)
    >>> prediction = CodePrediction(32, quantizer, target="bag")
    >>> maps = [torch.randn(6, 16, 8, 8), torch.randn(6, 32, 4, 4)]  # a teacher's, of views a and b, joined
    >>> features = torch.randn(6, 32)  # the student's, of the same views
    >>> loss = prediction(features, quantizer(maps), views=2)
    >>> len(loss.losses), bool(loss.total > 0)
    (2, True)
    """

    births: Tensor | None
    follow = ForeignMethod("follow_(quantizer)")

    @names_foreign_keywords(
        {}, sizes_by_name="CodePrediction(in_dim, quantizer, hidden_dim=)", positional=2, what="other options"
    )
    def __init__(
        self,
        in_dim: int | Sequence[int],
        quantizer: MultiScaleQuantizer | Sequence[int],
        *,
        target: CodeTargetName | CodeTarget = "anchor",
        head: CodeHeadName | CodeHead = "mlp",
        hidden_dim: int = 512,
        dim: int | None = None,
        centring: CentringName = "batch",
        centre_momentum: float = 0.9,
        channels_last: bool = False,
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        if isinstance(quantizer, MultiScaleQuantizer):
            sizes = [quantizer.codebook(scale).codebook_size for scale in range(quantizer.num_scales)]
            dim, channels_last = quantizer.dim, quantizer.channels_last
        else:
            sizes = sizes_in(quantizer)
        self.target = _target(target)
        self.target_name = policy_name(target)
        self.codebook_sizes = tuple(sizes)
        self.takes_maps = not isinstance(in_dim, int)
        self.in_dims = widths_in(in_dim, len(sizes))
        if self.target.per_place and not self.takes_maps:
            raise ValueError(
                f"in_dim must be one width a scale for a target of places, got {in_dim}: write the channels of the "
                "student's maps, as a list"
            )
        check_positive_int("hidden_dim", hidden_dim)
        if dim is not None:
            check_positive_int("dim", dim)
        self.channels_last = channels_last
        self.hidden_dim = hidden_dim
        self.build_head = by_name("head", head, CODE_HEADS)
        widths = [self.target.width(dim or 0, size) for size in sizes]
        if dim is None and (0 in widths or head == "generated"):
            raise ValueError(
                f"dim must say how wide the codes are for target={self.target_name!r} and head={policy_name(head)!r}: "
                "write dim=, or give the quantiser instead of sizes"
            )
        self.dim = dim
        self.heads = nn.ModuleList(
            self.build_head(HeadSizes(channels, hidden_dim, width, dim or 0, size))
            for channels, width, size in zip(self.in_dims, widths, sizes, strict=True)
        )
        # How often each code had been replaced when its row was last right; None where no row belongs to a code.
        births = torch.zeros(sum(sizes), dtype=torch.int64)
        if isinstance(quantizer, MultiScaleQuantizer) and not (known := _births(quantizer)).is_meta:
            births = known.to(births.device)
        self.register_buffer("births", births if self.target.width(0, 1) == 1 and any(self._layers()) else None)
        self.centring = (
            TargetCentring(widths, how=centring, momentum=centre_momentum, process_group=process_group)
            if self.target.centred
            else None
        )

    @property
    def num_scales(self) -> int:
        """S, how many scales are predicted."""
        return len(self.codebook_sizes)

    def forward(
        self,
        features: Tensor | Sequence[Tensor],
        quantized: MultiScaleQuantized | Sequence[Tensor],
        *,
        views: int = 1,
        places: Sequence[Tensor] | None = None,
    ) -> CodePredictionLoss:
        """Compute the loss of a batch.

        Args:
            features: pooled features ``(N, C)``, or S maps, of the views that predict.
            quantized: the codes of the views that are predicted; or their indices alone, ``(N, *spatial)`` a scale,
                where the target needs no more. Nothing is predicted where an index is -1.
            views: 1 (default): row i of the features predicts row i of the codes, which belongs to another view. V: the
                codes hold V views of B images, joined along the batch, and the features V views or more. Each view then
                predicts the codes of all others, and the loss is the mean over these pairs. Views beyond V, such as
                small local crops, only predict.
            places: with a target of places and ``views=1``: for each cell of a student's map the cell of the target's
                map to predict, ``(N, *spatial)`` integers a scale, -1 for none. None: both maps show the same places.

        Returns:
            :class:`~vqssl.types.CodePredictionLoss`; call ``backward`` on ``total``.

        Raises:
            TypeError: features are not floating tensors, or indices or places are not integers.
            ValueError: another number of maps, codes or places than scales, the wrong width or device, batches that do
                not fit each other, or (on CPU) an index that the codebook does not have.
        """
        rows, codes = self._features(features), self._codes(quantized)
        if self.target.per_place:
            check_places(rows, codes, places)
        elif places is not None:
            raise ValueError(f"places are only for a target of places, got target={self.target_name!r}")
        for each, (_, indices) in zip(rows, codes, strict=True):
            check_views(each, indices, views)
        targets = self._targets(codes)
        if places is not None:
            targets = [entries_at(target, each) for target, each in zip(targets, places, strict=True)]
        losses = tuple(
            self._over_pairs(prediction, target, views)
            for prediction, target in zip(self._predict(rows), targets, strict=True)
        )
        return CodePredictionLoss(torch.stack(losses).mean(), losses)

    @torch.no_grad()
    def follow_(self, quantizer: MultiScaleQuantizer) -> None:
        """Follow the quantiser's present codes, which its next call uses.

        Generated heads get the codes. In heads with one output a code, the rows of codes that revivals have replaced
        since the last call get zero weights and the mean bias: what they learnt is of other codes. Under
        ``torch.distributed`` all ranks do the same.

        Args:
            quantizer: of the same scales.

        Raises:
            TypeError: it is not a MultiScaleQuantizer.
            ValueError: it has other scales or sizes.

        >>> quantizer = MultiScaleQuantizer([16], codebook_size=8, dim=4)
        >>> prediction = CodePrediction(16, quantizer, target="bag", head="generated")
        >>> prediction.follow_(quantizer)
        >>> torch.equal(prediction.heads[0].codes, quantizer.codebook(0).embed)
        True
        """
        if not isinstance(quantizer, MultiScaleQuantizer):
            raise TypeError(
                f"quantizer must be the MultiScaleQuantizer whose codes are predicted, got {type(quantizer).__name__}: "
                "write prediction.follow_(quantizer), with the quantiser that the module was built with"
            )
        sizes = tuple(quantizer.codebook(scale).codebook_size for scale in range(quantizer.num_scales))
        if sizes != self.codebook_sizes or self.dim not in (None, quantizer.dim):
            raise ValueError(
                f"quantizer must have codebooks of {list(self.codebook_sizes)} codes of width {self.dim}, got "
                f"{list(sizes)} of width {quantizer.dim}: give the quantiser that the module was built with"
            )
        for scale, head in enumerate(self.heads):
            if isinstance(head, GeneratedHead):
                head.codes.copy_(quantizer.codebook(scale).embed)
        if self.births is None:
            return
        births = _births(quantizer)
        for layer, born in zip(self._layers(), (births != self.births).split(sizes), strict=True):
            if layer is not None:
                restart_rows_(layer, born)
        self.births.copy_(births)

    def _layers(self) -> list[nn.Linear | None]:
        """Return the layer of each head whose rows belong to codes; None for generated ones, and others without."""
        return [
            None if isinstance(head, GeneratedHead) else last_linear(head, size)
            for head, size in zip(self.heads, self.codebook_sizes, strict=True)
        ]

    def predict(self, features: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return what the heads predict, one tensor a scale: ``(N, width)``, or ``(N, *spatial, width)`` a place.

        Args and errors are those of :meth:`forward`.

        >>> import torch
        >>> [tuple(each.shape) for each in CodePrediction(16, [8, 32], target="bag").predict(torch.randn(4, 16))]
        [(4, 8), (4, 32)]
        """
        return tuple(self._predict(self._features(features)))

    @torch.no_grad()
    def targets(self, quantized: MultiScaleQuantized | Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return what is to be predicted, one tensor a scale, without a gradient.

        In training mode, centred targets also update the moving average. Args and errors are those of :meth:`forward`.

        >>> import torch
        >>> indices = torch.tensor([[0, 1, 1, 1]])
        >>> CodePrediction(16, [2], target="bag").targets([indices])[0].tolist()
        [[0.25, 0.75]]
        """
        return tuple(self._targets(self._codes(quantized)))

    def _predict(self, rows: list[Tensor]) -> list[Tensor]:
        return [
            head(each.flatten(0, -2)).unflatten(0, each.shape[:-1]) for head, each in zip(self.heads, rows, strict=True)
        ]

    @torch.no_grad()
    def _targets(self, codes: list[CodesOfScale]) -> list[Tensor]:
        found = [
            self.target.of_scale(quantized, indices, size)
            for (quantized, indices), size in zip(codes, self.codebook_sizes, strict=True)
        ]
        return found if self.centring is None else self.centring(found)

    def _over_pairs(self, prediction: Tensor, target: Tensor, views: int) -> Tensor:
        if views == 1 or len(target) == 0:  # a rank without images still takes part in what all ranks do
            return self.target.loss(prediction[: len(target)], target)
        batch = len(target) // views
        return mean_over_pairs(self.target.loss, prediction.split(batch), target.split(batch))

    # ---- the input ----

    def _features(self, features: Tensor | Sequence[Tensor]) -> list[Tensor]:
        return features_of_scales(
            features,
            self.in_dims,
            maps=self.takes_maps,
            channels_last=self.channels_last,
            per_place=self.target.per_place,
        )

    def _codes(self, quantized: MultiScaleQuantized | Sequence[Tensor]) -> list[CodesOfScale]:
        codes = codes_of_scales(quantized, self.codebook_sizes, channels_last=self.channels_last)
        if self.target.width(0, 1) == 0 and not isinstance(quantized, MultiScaleQuantized):
            raise TypeError(
                f"quantized must hold the codes for target={self.target_name!r}, got indices alone: give what the "
                "quantiser returned"
            )
        return codes

    def extra_repr(self) -> str:
        """Return sizes and options, for ``repr``."""
        return f"codebook_sizes={list(self.codebook_sizes)}, target={self.target_name!r}"

    if TYPE_CHECKING:  # nn.Module's __call__ is Any to type checkers

        def __call__(
            self,
            features: Tensor | Sequence[Tensor],
            quantized: MultiScaleQuantized | Sequence[Tensor],
            *,
            views: int = 1,
            places: Sequence[Tensor] | None = None,
        ) -> CodePredictionLoss:
            """Call :meth:`forward`."""


def _target(target: CodeTargetName | CodeTarget) -> CodeTarget:
    if isinstance(target, str):
        if target not in CODE_TARGETS:
            raise ValueError(
                f"target must be one of {', '.join(map(repr, CODE_TARGETS))}, or an object, got {target!r}"
            )
        return CODE_TARGETS[target]
    check_object("target", target, CodeTarget, "BagTarget()")
    return target


def _births(quantizer: MultiScaleQuantizer) -> Tensor:
    """Return how often each code of each scale has been replaced, one after another."""
    return torch.cat([quantizer.codebook(scale).births for scale in range(quantizer.num_scales)])
