"""Targets of code prediction: objects that say what a head predicts of another view's codes, and by which loss."""

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from torch import Tensor

from vqssl.functional.bags import BagReduction, bag_of_codes
from vqssl.functional.code_anchors import anchor_loss, code_anchor
from vqssl.functional.code_cross_entropy import code_cross_entropy

__all__ = ["CODE_TARGETS", "AnchorTarget", "BagTarget", "CodeTarget", "CodeTargetName", "PlaceTarget"]

CodeTargetName = Literal["anchor", "bag", "place"]


@runtime_checkable
class CodeTarget(Protocol):
    """A target, as :class:`vqssl.CodePrediction` calls it.

    >>> isinstance(BagTarget(), CodeTarget)
    True
    """

    @property
    def per_place(self) -> bool:
        """True if there is one target a place, False if one a view."""
        ...

    @property
    def centred(self) -> bool:
        """True if the mean over views is subtracted from the targets before they are compared."""
        ...

    def width(self, dim: int, codebook_size: int) -> int:
        """Return the width of the head's output."""
        ...

    def of_scale(self, quantized: Tensor, indices: Tensor, codebook_size: int) -> Tensor:
        """Return the targets of one scale: ``(B, ...)``, or ``(B, *places, ...)`` where they are per place.

        Args:
            quantized: ``(B, *places, D)``; D is 0 where only indices were given.
            indices: ``(B, *places)`` int64, -1 where a place has no code.
            codebook_size: K.
        """
        ...

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return a scalar. Targets of all zeros, and indices of -1, are left out."""
        ...


@dataclass(frozen=True)
class AnchorTarget:
    """The average code of a view (:func:`vqssl.functional.code_anchor`), by its direction.

    Args:
        centred: True to subtract the mean over views first. Without it, what all views share is nearly all of the
            target.

    >>> import vqssl
    >>> prediction = vqssl.CodePrediction(16, [8], dim=4, target=AnchorTarget(centred=False))
    """

    centred: bool = True
    per_place: bool = False

    def width(self, dim: int, codebook_size: int) -> int:
        """Return D."""
        return dim

    def of_scale(self, quantized: Tensor, indices: Tensor, codebook_size: int) -> Tensor:
        """Return ``(B, D)``."""
        return code_anchor(quantized, indices)

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the mean of 2 - 2 cos over views that have a target."""
        return anchor_loss(prediction, target)


@dataclass(frozen=True)
class BagTarget:
    """The distribution of codes over a view's places (:func:`vqssl.functional.bag_of_codes`), by cross-entropy.

    Args:
        reduction: ``"mean"`` counts how often a code occurs, ``"max"`` says whether it does.

    >>> import vqssl
    >>> prediction = vqssl.CodePrediction(16, [8], target=BagTarget(reduction="max"))
    """

    reduction: BagReduction = "mean"
    centred: bool = False
    per_place: bool = False

    def width(self, dim: int, codebook_size: int) -> int:
        """Return K."""
        return codebook_size

    def of_scale(self, quantized: Tensor, indices: Tensor, codebook_size: int) -> Tensor:
        """Return ``(B, K)``."""
        return bag_of_codes(indices, codebook_size, reduction=self.reduction)

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the mean cross-entropy over views that have a target."""
        return code_cross_entropy(prediction, target)


@dataclass(frozen=True)
class PlaceTarget:
    """The code of each place, by cross-entropy: what HuBERT and BEiT v2 predict. Places of index -1 are left out.

    >>> import vqssl
    >>> prediction = vqssl.CodePrediction([16], [8], target=PlaceTarget())
    """

    centred: bool = False
    per_place: bool = True

    def width(self, dim: int, codebook_size: int) -> int:
        """Return K."""
        return codebook_size

    def of_scale(self, quantized: Tensor, indices: Tensor, codebook_size: int) -> Tensor:
        """Return ``(B, *places)``."""
        return indices

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the mean cross-entropy over places that have a code."""
        return code_cross_entropy(prediction, target)


CODE_TARGETS: dict[CodeTargetName, CodeTarget] = {
    "anchor": AnchorTarget(),
    "bag": BagTarget(),
    "place": PlaceTarget(),
}
"""The targets by name."""
