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
from examples.pretrain.methods.code_controls import CodeTargets, check_targets
from examples.pretrain.methods.code_step import step_with_codes
from examples.pretrain.methods.codebooks import codes_by_scale, make_quantizer, maps_to_quantize, usage_by_scale
from examples.pretrain.methods.dissect_options import DiSSECTOptions, check_codebooks_alone
from examples.pretrain.methods.interface import Step
from examples.pretrain.methods.soft_codes import SoftBagTarget


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


class DiSSECTCodes(nn.Module):
    """BYOL, a quantiser on the teacher's maps, and a head for each scale on the student's pooled features."""

    Options = DiSSECTCodesOptions

    def __init__(self, encoder: Encoder, options: DiSSECTCodesOptions, *, total_steps: int, seed: int = 0) -> None:
        super().__init__()
        check_codebooks_alone(options.dissect)
        check_targets(options.target, options.control, options.dissect.metric)
        self.byol = BYOL(encoder, options.dissect.byol, total_steps=total_steps)
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
        maps = maps_to_quantize(seen, self.quantize)
        quantized = self.quantizer(maps)
        targets = self.targets(quantized, maps, self.quantizer, count)
        predicted = self.prediction(seen.student.features, targets, views=count)
        return step_with_codes(
            self.objective, seen, predicted, count, scales=self.encoder.scales, commitment=quantized.commitment_loss
        )

    def codes(self, images: Tensor) -> dict[str, Tensor]:
        """Return the code indices `(B, H, W)` of normalised images `(B, C, S, S)`, by scale."""
        return codes_by_scale(self.encoder.scales, self.quantizer(self.target_encoder(images)[1]))

    def after_step(self) -> None:
        """Update the teacher, and the codes that generated heads know."""
        self.byol.after_step()
        self.prediction.follow_(self.quantizer)

    def figures(self) -> dict[str, float]:
        """Return BYOL's figures, and perplexity and number of dead codes of each scale."""
        return self.byol.figures() | usage_by_scale(self.quantizer, self.encoder.scales)

    def exports(self) -> dict[str, nn.Module]:
        """Return the student's encoder and the quantiser."""
        return {"encoder": self.encoder, "codebooks": self.quantizer}
