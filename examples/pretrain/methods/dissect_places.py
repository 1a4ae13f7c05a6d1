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
from examples.pretrain.methods.codebooks import make_quantizer, usage_figures
from examples.pretrain.methods.dissect import DiSSECTOptions
from examples.pretrain.methods.interface import Step
from vqssl.functional import Grid, canonical_cells, matched_cells
from vqssl.types import MultiScaleQuantized


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
        self.byol = BYOL(encoder, options.dissect.byol, total_steps=total_steps)
        self.grid = (options.grid, options.grid)
        self.centring = nn.ModuleList(
            vqssl.PlaceCentring(channels, options.grid**2) for channels in encoder.scale_channels
        )
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
        quantized = self._quantize(seen.target_maps, torch.cat([first, second]), size_of(views[0]))
        grids = [Grid(size_of(views[0]), size_of(each)) for each in seen.student.maps]
        places = [torch.cat([matched_cells(first, second, g, g), matched_cells(second, first, g, g)]) for g in grids]
        predicted = self.prediction(seen.student.maps, of_other_view(quantized), places=places)
        loss = self.objective(seen.student.prediction.chunk(2), seen.target.chunk(2), code_loss=predicted.total)
        parts = {"alignment_global": loss.alignment_global, "commitment": quantized.commitment_loss}
        parts |= {f"code_{name}": each for name, each in zip(self.encoder.scales, predicted.losses, strict=True)}
        return Step(loss.total, {**parts, "target_spread": vqssl.functional.target_spread(seen.target)})

    def _quantize(self, maps: Sequence[Tensor], to_view: Tensor, size: tuple[int, int]) -> MultiScaleQuantized:
        whole = Grid(size, self.grid)
        cells = [canonical_cells(to_view, Grid(size, size_of(each)), whole) for each in maps]
        return self.quantizer(
            [centre(each, where) for centre, each, where in zip(self.centring, maps, cells, strict=True)]
        )

    def codes(self, images: Tensor) -> dict[str, Tensor]:
        """Return the code indices `(B, H, W)` of normalised images `(B, C, S, S)`, by scale."""
        itself = torch.eye(3, device=images.device).expand(len(images), 3, 3)
        found = self._quantize(self.target_encoder(images)[1], itself, size_of(images))
        return dict(zip(self.encoder.scales, found.indices, strict=True))

    def after_step(self) -> None:
        """Update the teacher, and start the rows of replaced codes anew."""
        self.byol.after_step()
        self.prediction.follow_(self.quantizer)

    def figures(self) -> dict[str, float]:
        """Return BYOL's figures, and perplexity and number of dead codes of each scale."""
        return self.byol.figures() | usage_figures(self.quantizer, self.encoder.scales)

    def exports(self) -> dict[str, nn.Module]:
        """Return the student's encoder and the quantiser."""
        return {"encoder": self.encoder, "codebooks": self.quantizer}


def size_of(maps: Tensor) -> tuple[int, int]:
    """Return the height and the width of images or maps `(B, C, H, W)`."""
    return maps.shape[-2], maps.shape[-1]


def of_other_view(quantized: MultiScaleQuantized) -> MultiScaleQuantized:
    """Return the codes of two views, joined along the batch, in the other order."""

    def swapped(rows: Tensor) -> Tensor:
        return torch.cat(rows.chunk(2)[::-1])

    return quantized._replace(
        quantized=tuple(map(swapped, quantized.quantized)), indices=tuple(map(swapped, quantized.indices))
    )
