"""The codebooks of methods that quantise maps: how they are built, what they quantise, and what is shown of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from torch import Tensor, nn

import vqssl
from examples.pretrain.encoder import Encoder
from examples.pretrain.methods.byol import Compared
from examples.pretrain.methods.dissect_options import DiSSECTOptions
from vqssl.types import MultiScaleQuantized

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


def maps_to_quantize(seen: Compared, whose: Literal["teacher", "student"]) -> list[Tensor]:
    """Return the maps of the teacher or of the student, without a gradient."""
    # The student's maps are other inputs of the codebooks, not another gradient.
    return seen.target_maps if whose == "teacher" else [each.detach() for each in seen.student.maps]


def codes_by_scale(scales: Sequence[str], quantized: MultiScaleQuantized) -> dict[str, Tensor]:
    """Return the code indices `(B, H, W)` of each scale, by its name."""
    return dict(zip(scales, quantized.indices, strict=True))


def usage_figures(codebooks: Mapping[str, vqssl.EMACodebook]) -> dict[str, float]:
    """Return perplexity and number of dead codes of each codebook, by the name of its scale, for the log."""
    found: dict[str, float] = {}
    for name, codebook in codebooks.items():
        usage = codebook.usage()
        found |= {f"perplexity_{name}": usage.perplexity.item(), f"dead_{name}": usage.dead.item()}
    return found


def usage_by_scale(quantizer: vqssl.MultiScaleQuantizer, scales: Sequence[str]) -> dict[str, float]:
    """Return :func:`usage_figures` of the codebooks of a quantiser."""
    return usage_figures({name: quantizer.codebook(scale) for scale, name in enumerate(scales)})
