"""The variants of the sweep: the paper's Table V, BYOL, the open choices of the method, and codes as targets.

Each is a function of the preset, whose encoder, augmentations, optimizer and length it keeps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from examples.pretrain.presets import Experiment
from examples.pretrain.train import Pretraining

Variant = Callable[[Experiment], Pretraining]


def method(name: str, **changes: Any) -> Variant:
    """Return a method with other options than the preset's."""

    def build(preset: Experiment) -> Pretraining:
        plan = preset.pretraining(name)
        return replace(plan, options=replace(plan.options, **changes))

    return build


def dissect(**changes: Any) -> Variant:
    """Return DiSSECT with other options."""
    return method("dissect", **changes)


def with_teacher(**changes: Any) -> Variant:
    """Return DiSSECT with other options of its student and teacher."""

    def build(preset: Experiment) -> Pretraining:
        return dissect(byol=replace(preset.options["dissect"].byol, **changes))(preset)

    return build


def codes(target: str = "anchor", **changes: Any) -> Variant:
    """Return DiSSECT with code prediction, with other options."""
    return method("dissect_codes", target=target, **changes)


def codes_of(*, byol: dict[str, Any] | None = None, **changes: Any) -> Variant:
    """Return DiSSECT with code prediction, with other codebooks, or another student and teacher."""

    def build(preset: Experiment) -> Pretraining:
        own = preset.options["dissect_codes"].dissect
        changed = replace(own, byol=replace(own.byol, **(byol or {})), **changes)
        return codes(dissect=changed)(preset)

    return build


def on_scales(variant: Variant, *scales: str) -> Variant:
    """Return a variant on other stages of the encoder."""

    def build(preset: Experiment) -> Pretraining:
        plan = variant(preset)
        return replace(plan, encoder=replace(plan.encoder, scales=scales))

    return build


def longer(variant: Variant, times: float) -> Variant:
    """Return a variant that trains for more epochs."""

    def build(preset: Experiment) -> Pretraining:
        plan = variant(preset)
        epochs = round(times * plan.optimization.epochs)
        return replace(plan, optimization=replace(plan.optimization, epochs=epochs))

    return build


VARIANTS: dict[str, Variant] = {
    # The paper's Table V, and BYOL.
    "byol": method("byol"),
    "full": dissect(),
    "no-serf": dissect(operator="concat"),
    "no-mlp": dissect(serf_mlp=False),
    "coarse-only": on_scales(dissect(), "layer4"),
    "medium-only": on_scales(dissect(), "layer3"),
    "fine-only": on_scales(dissect(), "layer2"),
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
    # SERF with centred inputs: its head predicts z_c, stays as it is, or is trained by the alignment, as published.
    "centred": dissect(centred=True, residual=False),
    "centred-detached": dissect(centred=True, residual=False, refinement="detached"),
    "centred-align": dissect(centred=True, residual=False, refinement="align"),
    "centred-literal": dissect(
        centred=True, operator="channel", residual=False, refinement="align", projection="learned"
    ),
    # Codes as targets.
    "anchors": codes(),
    "bags": codes("bag"),
    "soft-bags": codes("soft-bag"),
    "places": method("dissect_places"),
    "anchors-linear": codes(head="linear"),
    "bags-linear": codes("bag", head="linear"),
    "bags-generated": codes("bag", head="generated"),
    "anchors-64-codes": codes_of(codebook_size=64),
    "anchors-1024-codes": codes_of(codebook_size=1024),
    "anchors-4096-codes": codes_of(codebook_size=4096),
    "anchors-fine": on_scales(codes(), "layer2"),
    "anchors-medium": on_scales(codes(), "layer3"),
    "anchors-coarse": on_scales(codes(), "layer4"),
    "anchors-eq-1": codes_of(ema="batch_mean"),
    "anchors-student-features": codes_of(quantize="student"),
    "anchors-no-momentum": codes_of(byol={"momentum": 0.0, "final_momentum": 0.0}),
    # Controls of it: what is predicted is no code, a finer one, or another image's; the same compute without codes.
    "anchors-of-maps": codes(control="maps"),
    "anchors-of-product-codes": codes(control="product"),
    "anchors-of-others": codes(control="shuffled"),
    "bags-of-others": codes("bag", control="shuffled"),
    "byol-longer": longer(method("byol"), 1.5),
}
