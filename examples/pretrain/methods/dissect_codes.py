"""DiSSECT with code prediction: BYOL, and heads that predict the teacher's quantised maps of another view.

The paper's codes make a second target that BYOL's own prediction has to match. Here every scale has a target and a head
of its own (`vqssl.CodePrediction`), as in BoWNet (arXiv 2002.12247) and OBoW (arXiv 2012.11552).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn

import vqssl
from examples.pretrain.encoder import Encoder
from examples.pretrain.methods.byol import BYOL
from examples.pretrain.methods.code_controls import CodeTargets, SoftBagTarget
from examples.pretrain.methods.codebooks import make_quantizer, usage_figures
from examples.pretrain.methods.dissect import DiSSECTOptions
from examples.pretrain.methods.interface import Step

FUSION = ("operator", "residual", "serf_mlp", "refinement", "target_weights", "centred")
"""Options of DiSSECT that are not of its codebooks."""


@dataclass(frozen=True)
class DiSSECTCodesOptions:
    """Codebooks of DiSSECT, and what is predicted of them."""

    dissect: DiSSECTOptions = field(default_factory=DiSSECTOptions)
    """Student, teacher and codebooks; its fusion and refined target have no part here."""
    target: Literal["anchor", "bag", "soft-bag"] = "anchor"
    """The average code of a view, or the bag of its codes (see `vqssl.CodePrediction`), or of soft ones (OBoW)."""
    head: Literal["mlp", "linear", "generated"] = "mlp"
    """The heads."""
    hidden_dim: int = 512
    """Hidden width of the heads."""
    code_weight: float = 0.5
    """Weight of the predictions beside BYOL's loss."""
    control: Literal["none", "maps", "product", "shuffled"] = "none"
    """For comparison: predict the maps before quantisation, product codes of them, or the codes of another image."""
    title = "DiSSECT with code prediction"
    tuned = ("code_weight",)


def check(options: DiSSECTCodesOptions) -> None:
    """Raise ValueError if an option says what another one has no use for."""
    if options.control in ("maps", "product") and options.target != "anchor":
        raise ValueError(
            f"control {options.control} needs target anchor, got {options.target}: other targets are made of the "
            "codes themselves"
        )
    if options.target == "soft-bag" and (options.dissect.metric != "euclidean" or options.control != "none"):
        raise ValueError(
            f"target soft-bag needs the metric euclidean and no control, got {options.dissect.metric} and "
            f"{options.control}"
        )
    ours, without = options.dissect, DiSSECTOptions()
    unused = [name for name in FUSION if getattr(ours, name) != getattr(without, name)]
    if unused:
        raise ValueError(
            f"code prediction has no fusion and no refined target, got dissect.{unused[0]} = "
            f"{getattr(ours, unused[0])}: leave it out"
        )


class DiSSECTCodes(nn.Module):
    """BYOL, a quantiser on the teacher's maps, and a head for each scale on the student's pooled features."""

    Options = DiSSECTCodesOptions

    def __init__(self, encoder: Encoder, options: DiSSECTCodesOptions, *, total_steps: int, seed: int = 0) -> None:
        super().__init__()
        self.byol = BYOL(encoder, options.dissect.byol, total_steps=total_steps)
        check(options)
        self.quantize = options.dissect.quantize
        self.quantizer = make_quantizer(encoder, options.dissect, seed)
        self.targets = CodeTargets(
            options.target,
            options.control,
            scales=len(encoder.scales),
            dim=options.dissect.byol.dim,
            codebook_size=options.dissect.codebook_size,
            seed=seed,
        )
        self.prediction = vqssl.CodePrediction(
            encoder.dim,
            self.quantizer,
            target=SoftBagTarget() if options.target == "soft-bag" else options.target,
            head=options.head,
            hidden_dim=options.hidden_dim,
        )
        self.objective = vqssl.DiSSECTObjective(code_weight=options.code_weight)

    @property
    def encoder(self) -> Encoder:
        """The student's encoder."""
        return self.byol.encoder

    @property
    def target_encoder(self) -> nn.Module:
        """The encoder whose maps are quantised."""
        return self.byol.target_encoder if self.quantize == "teacher" else self.encoder

    def forward(self, views: Sequence[Tensor]) -> Step:
        """Return the loss of V views `(B, C, S, S)` of the same images."""
        seen = self.byol.compare(views)
        count = len(views)
        maps = seen.target_maps if self.quantize == "teacher" else [scale.detach() for scale in seen.student.maps]
        quantized = self.quantizer(maps)
        targets = self.targets(quantized, maps, self.quantizer, count)
        predicted = self.prediction(seen.student.features, targets, views=count)
        loss = self.objective(seen.student.prediction.chunk(count), seen.target.chunk(count), code_loss=predicted.total)
        parts = {"alignment_global": loss.alignment_global, "commitment": quantized.commitment_loss}
        parts |= {f"code_{name}": each for name, each in zip(self.encoder.scales, predicted.losses, strict=True)}
        return Step(loss.total, {**parts, "target_spread": vqssl.functional.target_spread(seen.target)})

    def codes(self, images: Tensor) -> dict[str, Tensor]:
        """Return the code indices `(B, H, W)` of normalised images `(B, C, S, S)`, by scale."""
        maps = self.target_encoder(images)[1]
        return dict(zip(self.encoder.scales, self.quantizer(maps).indices, strict=True))

    def after_step(self) -> None:
        """Update the teacher, and the codes that generated heads know."""
        self.byol.after_step()
        self.prediction.follow_(self.quantizer)

    def figures(self) -> dict[str, float]:
        """Return BYOL's figures, and perplexity and number of dead codes of each scale."""
        return self.byol.figures() | usage_figures(self.quantizer, self.encoder.scales)

    def exports(self) -> dict[str, nn.Module]:
        """Return the student's encoder and the quantiser."""
        return {"encoder": self.encoder, "codebooks": self.quantizer}
