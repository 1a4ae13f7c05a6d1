"""DiSSECT with place-aligned codes: BYOL, and heads that predict the code of each place that two crops share.

Radiographs are alike at equal places, so that a code says first of all where it is. The average of each place of the
whole image is therefore taken from the teacher's maps before they are quantised (`vqssl.PlaceCentring`), and the crops'
own matrices say which cells show the same place (`vqssl.functional.matched_cells`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import vqssl
from examples.pretrain.encoder import Encoder
from examples.pretrain.methods.byol import BYOL
from examples.pretrain.methods.code_step import step_with_codes
from examples.pretrain.methods.codebooks import codes_by_scale, make_quantizer, usage_by_scale
from examples.pretrain.methods.dissect_options import DiSSECTOptions, check_codebooks_alone
from examples.pretrain.methods.interface import Step
from examples.pretrain.methods.other_codes import of_other_view
from examples.pretrain.methods.shared_places import CentredMaps, grid_of, shared_cells


@dataclass(frozen=True)
class DiSSECTPlacesOptions:
    """Codebooks of DiSSECT, and the heads that predict their codes by place."""

    dissect: DiSSECTOptions = field(default_factory=DiSSECTOptions)
    """Student, teacher and codebooks; its fusion and refined target have no part here."""
    hidden_dim: int = 128
    """Hidden width of the heads, which every cell passes."""
    code_weight: float = 0.5
    """Weight of the predictions beside BYOL's loss."""
    grid: int = 8
    """Cells along each side of the grid whose averages are taken from the maps."""
    title = "DiSSECT with place-aligned codes"
    tuned = ("code_weight",)


class DiSSECTPlaces(nn.Module):
    """BYOL, a quantiser on the teacher's centred maps, and a head for each scale on the student's cells."""

    Options = DiSSECTPlacesOptions

    def __init__(self, encoder: Encoder, options: DiSSECTPlacesOptions, *, total_steps: int, seed: int = 0) -> None:
        super().__init__()
        check_codebooks_alone(options.dissect, of_teacher=True)
        self.byol = BYOL(encoder, options.dissect.byol, total_steps=total_steps)
        self.centring = CentredMaps(encoder.scale_channels, options.grid)
        self.quantizer = make_quantizer(encoder, options.dissect, seed)
        self.prediction = vqssl.CodePrediction(
            encoder.scale_channels, self.quantizer, target="place", hidden_dim=options.hidden_dim
        )
        self.objective = vqssl.DiSSECTObjective(code_weight=options.code_weight)
        self.matrices: list[Tensor] = []

    @property
    def encoder(self) -> Encoder:
        """The student's encoder."""
        return self.byol.encoder

    @property
    def target_encoder(self) -> nn.Module:
        """The teacher's encoder, whose maps are quantised."""
        return self.byol.target_encoder

    def views(self, images: Tensor, augment: Any) -> list[Tensor]:
        """Return two views, and keep the matrices from pixels of the images to those of each view."""
        views = []
        self.matrices = []
        for _ in range(2):
            views.append(augment(images))
            self.matrices.append(augment.transform_matrix)
        return views

    def forward(self, views: Sequence[Tensor]) -> Step:
        """Return the loss of the two views `(B, C, S, S)` that :meth:`views` drew last.

        Raises:
            ValueError: these are others.
        """
        if [len(view) for view in views] != [len(each) for each in self.matrices]:
            raise ValueError("views must be the two that views() drew last, which knows where the crops lie")
        first, second = self.matrices
        seen = self.byol.compare(views)
        quantized = self.quantizer(self.centring(seen.target_maps, views[0], torch.cat([first, second])))
        places = [shared_cells(first, second, grid_of(views[0], each)) for each in seen.student.maps]
        predicted = self.prediction(seen.student.maps, of_other_view(quantized), places=places)
        return step_with_codes(
            self.objective, seen, predicted, 2, scales=self.encoder.scales, commitment=quantized.commitment_loss
        )

    def codes(self, images: Tensor) -> dict[str, Tensor]:
        """Return the code indices `(B, H, W)` of normalised images `(B, C, S, S)`, by scale."""
        itself = torch.eye(3, device=images.device).expand(len(images), 3, 3)
        maps = self.centring(self.target_encoder(images)[1], images, itself)
        return codes_by_scale(self.encoder.scales, self.quantizer(maps))

    def after_step(self) -> None:
        """Update the teacher, and start the rows of replaced codes anew."""
        self.byol.after_step()
        self.prediction.follow_(self.quantizer)

    def figures(self) -> dict[str, float]:
        """Return BYOL's figures, and perplexity and number of dead codes of each scale."""
        return self.byol.figures() | usage_by_scale(self.quantizer, self.encoder.scales)

    def exports(self) -> dict[str, nn.Module]:
        """Return the student's encoder and the quantiser."""
        return {"encoder": self.encoder, "codebooks": self.quantizer}
