"""The codebooks of methods that quantise maps: how they are built, and what the log shows of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

import vqssl
from examples.pretrain.encoder import Encoder

if TYPE_CHECKING:
    from examples.pretrain.methods.dissect import DiSSECTOptions

PROJECTIONS = {"orthogonal": None, "learned": vqssl.LearnedProjection, "linear": nn.Linear}


def make_quantizer(encoder: Encoder, options: DiSSECTOptions, seed: int) -> vqssl.MultiScaleQuantizer:
    """Return the quantiser of the encoder's maps."""
    return vqssl.MultiScaleQuantizer(
        encoder.scale_channels,
        codebook_size=options.codebook_size,
        dim=options.byol.dim,
        shared=options.shared_codebook,
        projection=PROJECTIONS[options.projection],
        metric=options.metric,
        ema=options.ema,
        decay=options.codebook_decay,
        seed=seed,
    )


def usage_figures(quantizer: vqssl.MultiScaleQuantizer, scales: Sequence[str]) -> dict[str, float]:
    """Return perplexity and number of dead codes of each scale, for the log."""
    found: dict[str, float] = {}
    for scale, name in enumerate(scales):
        usage = quantizer.codebook(scale).usage()
        found |= {f"perplexity_{name}": usage.perplexity.item(), f"dead_{name}": usage.dead.item()}
    return found
