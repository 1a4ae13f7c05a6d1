"""What code prediction may predict instead of codes: soft or product codes, the maps themselves, another image's codes.

Each says what the codes are worth: the maps lose nothing to quantisation, and another image's codes say nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

import vqssl
from examples.pretrain.methods.other_codes import of_next_image
from examples.pretrain.methods.soft_codes import SoftCodes
from vqssl.types import MultiScaleQuantized

Maps = Sequence[Tensor]


def projected(quantizer: vqssl.MultiScaleQuantizer, maps: Maps) -> list[Tensor]:
    """Return the tokens that a quantiser looks up codes for, as maps `(B, D, H, W)`."""
    return [
        project(each.movedim(1, -1)).movedim(-1, 1) for project, each in zip(quantizer.projections, maps, strict=True)
    ]


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


def check_targets(target: str, control: str, metric: str) -> None:
    """Raise ValueError if a target cannot be made of what a control predicts, or of codes found by a metric."""
    if control in ("maps", "product") and target != "anchor":
        raise ValueError(
            f"control {control} needs target anchor, got {target}: other targets are made of the codes themselves"
        )
    if target == "soft-bag" and (metric != "euclidean" or control != "none"):
        raise ValueError(f"target soft-bag needs the metric euclidean and no control, got {metric} and {control}")


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
