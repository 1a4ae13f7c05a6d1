"""What code prediction may predict instead of codes: soft or product codes, the maps themselves, another image's codes.

Each says what the codes are worth: the maps lose nothing to quantisation, and another image's codes say nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import vqssl
from examples.pretrain import ranks
from vqssl.types import MultiScaleQuantized

Maps = Sequence[Tensor]


def projected(quantizer: vqssl.MultiScaleQuantizer, maps: Maps) -> list[Tensor]:
    """Return the tokens that a quantiser looks up codes for, as maps `(B, D, H, W)`."""
    return [
        project(each.movedim(1, -1)).movedim(-1, 1) for project, each in zip(quantizer.projections, maps, strict=True)
    ]


def of_next_image(quantized: MultiScaleQuantized, count: int) -> MultiScaleQuantized:
    """Return the codes of `count` views, each given to the image before."""

    def rolled(rows: Tensor) -> Tensor:
        return torch.cat([view.roll(1, 0) for view in rows.chunk(count)])

    return quantized._replace(
        quantized=tuple(map(rolled, quantized.quantized)), indices=tuple(map(rolled, quantized.indices))
    )


class ProductCodes(nn.Module):
    """Each scale quantised in four groups of channels: K^4 codes, so that little is lost."""

    def __init__(self, scales: int, dim: int, codebook_size: int, seed: int) -> None:
        super().__init__()
        self.scales = nn.ModuleList(
            vqssl.ChannelsFirst(
                vqssl.ProductQuantizer(codebook_size=codebook_size, dim=dim, num_groups=4, seed=seed + 4 * scale)
            )
            for scale in range(scales)
        )

    def forward(self, tokens: Maps) -> tuple[Tensor, ...]:
        """Return the quantised maps `(B, D, H, W)` of projected ones."""
        return tuple(quantizer(each).quantized for quantizer, each in zip(self.scales, tokens, strict=True))


class SoftCodes(nn.Module):
    """How much of each code every place is, as OBoW (arXiv 2012.11552) assigns words.

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


class CodeTargets(nn.Module):
    """What the heads predict, in place of the codes that a quantiser gave.

    Args:
        target: "soft-bag" for soft codes.
        control: "maps" for the projected maps, "product" for product codes of them, "shuffled" for another image's
            codes.
        scales: the number of maps.
        dim: the width of codes.
        codebook_size: of each group of product codes.
        seed: of product codes.
    """

    def __init__(self, target: str, control: str, *, scales: int, dim: int, codebook_size: int, seed: int) -> None:
        super().__init__()
        self.control = control
        self.soft = SoftCodes(scales) if target == "soft-bag" else None
        self.product = ProductCodes(scales, dim, codebook_size, seed) if control == "product" else None

    def forward(
        self, quantized: MultiScaleQuantized, maps: Maps, quantizer: vqssl.MultiScaleQuantizer, count: int
    ) -> MultiScaleQuantized:
        """Return the targets of `count` views, whose `maps` the quantiser gave the codes `quantized`."""
        if self.control == "shuffled":
            return of_next_image(quantized, count)
        if self.control == "none" and self.soft is None:
            return quantized
        tokens = projected(quantizer, maps)
        if self.soft is not None:
            return quantized._replace(quantized=self.soft(tokens, quantized.quantized, quantizer))
        return quantized._replace(quantized=tuple(tokens) if self.product is None else self.product(tokens))


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
