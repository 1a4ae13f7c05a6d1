"""DiSSECT (arXiv 2509.18765): BYOL with a second target, refined by quantised maps of several scales."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn

import vqssl
from examples.pretrain.encoder import Encoder
from examples.pretrain.methods.byol import BYOL, BYOLOptions
from examples.pretrain.methods.codebooks import make_quantizer, usage_figures
from examples.pretrain.methods.interface import Step


@dataclass(frozen=True)
class DiSSECTOptions:
    """Codebooks, fusion and objective. The defaults are the paper's, except `operator`, `projection`, `refinement`."""

    byol: BYOLOptions = field(default_factory=BYOLOptions)
    """DiSSECT's own student and teacher. Codes have width `byol.dim`, and the SERF MLP `byol.hidden_dim`."""
    codebook_size: int = 2048
    """K, the codes of each scale."""
    shared_codebook: bool = False
    """Use one codebook for all scales."""
    metric: Literal["euclidean", "cosine"] = "euclidean"
    """Distance between tokens and codes."""
    ema: Literal["count_weighted", "batch_mean"] = "count_weighted"
    """Update rule of the codes; "batch_mean" is the paper's Eq. 1."""
    codebook_decay: float = 0.99
    """gamma of the update rule."""
    projection: Literal["orthogonal", "learned", "linear"] = "orthogonal"
    """A fixed map with layer norm, a learned map with layer norm, or a learned map alone (whose output shrinks)."""
    quantize: Literal["teacher", "student"] = "teacher"
    """Whose maps are quantised."""
    operator: Literal["spatial", "channel", "batch", "pooled", "concat"] = "spatial"
    """Reading of Eq. 6; see `vqssl.SERFFusion`."""
    residual: bool | None = None
    """Add z_c to the operator's output; None: wherever the widths agree."""
    centred: bool = False
    """Subtract from the fusion's inputs what all views share: the means of z_c and of each quantised map."""
    serf_mlp: bool = True
    """Apply an MLP after the operator."""
    refinement: Literal["predict", "align", "detached"] = "predict"
    """What trains the fusion; see `vqssl.DiSSECTObjective`."""
    target_weights: tuple[float, float] = (0.5, 0.5)
    """Weights of the targets z_c and z_s."""
    commitment_weight: float = 1.0
    """lambda of the commitment loss."""
    tuned = ("target_weights",)


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
        # Detached: the student's maps are other inputs of the codebooks, not another gradient.
        maps = seen.target_maps if self.quantize == "teacher" else [scale.detach() for scale in seen.student.maps]
        quantized = self.quantizer(maps)
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
        maps = self.target_encoder(images)[1]
        return dict(zip(self.encoder.scales, self.quantizer(maps).indices, strict=True))

    def after_step(self) -> None:
        """Update the teacher."""
        self.byol.after_step()

    def figures(self) -> dict[str, float]:
        """Return BYOL's figures, and perplexity and number of dead codes of each scale."""
        return self.byol.figures() | usage_figures(self.quantizer, self.encoder.scales)

    def exports(self) -> dict[str, nn.Module]:
        """Return the student's encoder and the quantiser."""
        return {"encoder": self.encoder, "codebooks": self.quantizer}
