"""Soft codes as OBoW (arXiv 2012.11552) assigns words: how much of each code a place is, and bags of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import vqssl
from examples.pretrain import ranks

Maps = Sequence[Tensor]


class SoftCodes(nn.Module):
    """How much of each code every place is.

    The sharpness is 10 over the moving average of the squared distance to the nearest code.
    """

    mean_distance: Tensor

    def __init__(self, scales: int) -> None:
        super().__init__()
        self.register_buffer("mean_distance", torch.zeros(scales))

    @torch.no_grad()
    def forward(
        self, tokens: Maps, quantized: Maps, quantizer: vqssl.MultiScaleQuantizer, momentum: float = 0.99
    ) -> tuple[Tensor, ...]:
        """Return the shares `(B, K, H, W)` of the codes in projected maps."""
        distances = torch.stack([(z - q).square().sum(1).mean() for z, q in zip(tokens, quantized, strict=True)])
        if self.training:
            ranks.average_([distances])
            first = self.mean_distance == 0
            self.mean_distance.copy_(torch.where(first, distances, self.mean_distance.lerp(distances, 1 - momentum)))
        sharpness = 10 / self.mean_distance.clamp_min(1e-6)
        return tuple(
            vqssl.functional.soft_codes(z.movedim(1, -1), quantizer.codebook(scale).embed, sharpness[scale]).movedim(
                -1, 1
            )
            for scale, z in enumerate(tokens)
        )


@dataclass(frozen=True)
class SoftBagTarget:
    """A `vqssl.code_targets.CodeTarget`: the bag of soft codes, by their largest shares over the places, as in OBoW."""

    centred: bool = False
    per_place: bool = False

    def width(self, dim: int, codebook_size: int) -> int:
        """Return K."""
        return codebook_size

    def of_scale(self, quantized: Tensor, indices: Tensor, codebook_size: int) -> Tensor:
        """Return `(B, K)`, of the shares `(B, H, W, K)` that stand in place of quantised maps."""
        return vqssl.functional.bag_of_codes(quantized, codebook_size, reduction="max")

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the mean cross-entropy."""
        return vqssl.functional.code_cross_entropy(prediction, target)
