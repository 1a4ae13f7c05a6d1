"""DiSSECT (arXiv 2509.18765): BYOL with a second target, refined by quantised maps of several scales."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

import vqssl
from examples.pretrain.encoder import Encoder
from examples.pretrain.methods.byol import BYOL
from examples.pretrain.methods.codebooks import codes_by_scale, make_quantizer, maps_to_quantize, usage_by_scale
from examples.pretrain.methods.dissect_options import DiSSECTOptions
from examples.pretrain.methods.interface import Step


class DiSSECT(nn.Module):
    """BYOL, a quantiser on the maps, and a fusion that refines the teacher's embedding z_c to a second target z_s."""

    Options = DiSSECTOptions

    def __init__(self, encoder: Encoder, options: DiSSECTOptions, *, total_steps: int, seed: int = 0) -> None:
        super().__init__()
        self.byol = BYOL(encoder, options.byol, total_steps=total_steps)
        self.quantize = options.quantize
        self.quantizer = make_quantizer(encoder, options, seed)
        self.fusion = vqssl.SERFFusion(
            dim=options.byol.dim,
            num_scales=len(encoder.scales),
            operator=options.operator,
            residual=options.residual,
            hidden_dim=options.byol.hidden_dim if options.serf_mlp else None,
        )
        dim, scales = options.byol.dim, len(encoder.scales)
        self.centring = vqssl.TargetCentring([dim] * (1 + scales)) if options.centred else None
        self.objective = vqssl.DiSSECTObjective(
            target_weights=options.target_weights,
            commitment_weight=options.commitment_weight,
            refinement=options.refinement,
        )

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
        quantized = self.quantizer(maps_to_quantize(seen, self.quantize))
        refined = self.refined(seen.target, quantized.quantized)
        loss = self.objective(
            seen.student.prediction.chunk(count),
            seen.target.chunk(count),
            refined.chunk(count),
            quantized.commitment_loss,
        )
        parts = {name: value for name, value in loss._asdict().items() if name != "total"}
        return Step(loss.total, {**parts, "target_spread": vqssl.functional.target_spread(seen.target)})

    def refined(self, z_c: Tensor, quantized: Sequence[Tensor]) -> Tensor:
        """Return the refined target `(B, D)` of an embedding `(B, D)` and of quantised maps `(B, D, H, W)`."""
        if self.centring is not None:
            z_c, *tokens = self.centring([z_c, *(each.movedim(1, -1) for each in quantized)])
            quantized = [each.movedim(-1, 1) for each in tokens]
        return self.fusion(z_c, quantized)

    def codes(self, images: Tensor) -> dict[str, Tensor]:
        """Return the code indices `(B, H, W)` of normalised images `(B, C, S, S)`, by scale."""
        return codes_by_scale(self.encoder.scales, self.quantizer(self.target_encoder(images)[1]))

    def after_step(self) -> None:
        """Update the teacher."""
        self.byol.after_step()

    def figures(self) -> dict[str, float]:
        """Return BYOL's figures, and perplexity and number of dead codes of each scale."""
        return self.byol.figures() | usage_by_scale(self.quantizer, self.encoder.scales)

    def exports(self) -> dict[str, nn.Module]:
        """Return the student's encoder and the quantiser."""
        return {"encoder": self.encoder, "codebooks": self.quantizer}
