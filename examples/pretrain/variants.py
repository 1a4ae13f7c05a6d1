"""The variants of the sweep: the paper's Table V, BYOL, and the open choices of the method, on the `small` preset."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from examples.pretrain.presets import PRESETS
from examples.pretrain.train import Pretraining

SMALL = PRESETS["small"][1]
FULL = SMALL.pretraining("dissect")


def dissect(**changes: Any) -> Pretraining:
    """Return DiSSECT with other options."""
    return replace(FULL, options=replace(FULL.options, **changes))


def with_teacher(**changes: Any) -> Pretraining:
    """Return DiSSECT with other options of its student and teacher."""
    return dissect(byol=replace(FULL.options.byol, **changes))


def on_scales(*scales: str) -> Pretraining:
    """Return DiSSECT on other stages of the encoder."""
    return replace(FULL, encoder=replace(FULL.encoder, scales=scales))


VARIANTS: dict[str, Pretraining] = {
    # The paper's Table V, and BYOL.
    "byol": SMALL.pretraining("byol"),
    "full": FULL,
    "no-serf": dissect(operator="concat"),
    "no-mlp": dissect(serf_mlp=False),
    "coarse-only": on_scales("layer4"),
    "medium-only": on_scales("layer3"),
    "fine-only": on_scales("layer2"),
    "only-z_c": dissect(target_weights=(1.0, 0.0)),
    "only-z_s": dissect(target_weights=(0.0, 1.0)),
    "no-momentum": with_teacher(momentum=0.0, final_momentum=0.0),
    # Readings of Eq. 6, with and without z_c added.
    "spatial-no-residual": dissect(residual=False),
    "channel": dissect(operator="channel"),
    "channel-no-residual": dissect(operator="channel", residual=False),
    "batch": dissect(operator="batch"),
    "batch-no-residual": dissect(operator="batch", residual=False),
    "pooled-no-residual": dissect(operator="pooled", residual=False),
    # What trains phi, psi, alpha and the MLP.
    "literal": dissect(operator="channel", residual=False, refinement="align", projection="learned"),
    "align": dissect(refinement="align"),
    "detached": dissect(refinement="detached"),
    "phi-learned": dissect(projection="learned"),
    "phi-learned-no-norm": dissect(projection="linear"),
    "phi-learned-no-mlp": dissect(projection="learned", serf_mlp=False),
    # Codebooks and teacher.
    "eq-1": dissect(ema="batch_mean"),
    "cosine": dissect(metric="cosine"),
    "shared": dissect(shared_codebook=True),
    "student-features": dissect(quantize="student"),
    "buffers-copy": with_teacher(buffers="copy"),
    "buffers-own": with_teacher(buffers="own"),
}
