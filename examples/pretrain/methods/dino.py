"""DINOv2-style (arXiv 2304.07193): the student predicts the teacher's prototypes, of images and of hidden cells.

The loss has DINOv2's parts: DINO's cross-entropy over pairs of views and local crops, iBOT's at hidden cells, KoLeo.
"Style", because the encoder is a ResNet: cells are those of layer3 and are hidden in the pixels, where neighbours see
past the edge of a hidden cell; the targets are centred, without Sinkhorn's iterations; prototypes are few.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vqssl
from examples.pretrain.encoder import Encoder
from examples.pretrain.methods.crops import multi_crop
from examples.pretrain.methods.interface import Step
from examples.pretrain.methods.losses import distillation, hidden_cells, koleo, over_pairs
from examples.pretrain.methods.prototypes import Scorer, Scores, SharpTargets


@dataclass(frozen=True)
class DINOOptions:
    """Heads, targets and weights. The defaults are DINOv2's, with fewer prototypes."""

    prototypes: int = 1024
    """K, of images and of cells."""
    hidden_dim: int = 2048
    """Hidden width of the heads."""
    bottleneck: int = 256
    """Width in which prototypes are compared."""
    momentum: float = 0.992
    """Of the teacher, at the first step; 1 at the last."""
    teacher_temperature: float = 0.04
    """Of the targets; the student's is 0.1."""
    local_crops: int = 2
    """Small crops of each image, which only predict."""
    hidden: tuple[float, float] = (0.1, 0.5)
    """Smallest and largest share of cells that are hidden, in one half of the views."""
    koleo_weight: float = 0.1
    """Weight of KoLeo beside the two cross-entropies."""
    title = "DINOv2-style"
    tuned = ("koleo_weight",)


class DINOv2Style(nn.Module):
    """Student, momentum teacher, and CE of images + CE of hidden cells + 0.1 KoLeo."""

    Options = DINOOptions

    def __init__(self, encoder: Encoder, options: DINOOptions, *, total_steps: int, seed: int = 0) -> None:
        super().__init__()
        self.options = options
        self.student = Scorer(encoder, options.hidden_dim, options.bottleneck, options.prototypes)
        self.hidden_pixel = nn.Parameter(torch.zeros(encoder.resnet.conv1.in_channels))
        self.teacher = vqssl.MomentumTeacher(self.student, momentum=options.momentum, total_steps=total_steps)
        self.targets = nn.ModuleList(SharpTargets(options.prototypes, options.teacher_temperature) for _ in range(2))

    @property
    def encoder(self) -> Encoder:
        """The student's encoder."""
        return self.student.encoder

    def views(self, images: Tensor, augment: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Return two views and the local crops."""
        return multi_crop(images, augment, self.options.local_crops)

    def draw_hidden(self, shape: torch.Size, device: torch.device) -> Tensor:
        """Return `(B, H, W)` booleans: the hidden cells; none in about one half of the views."""
        low, high = self.options.hidden
        share = low + (high - low) * torch.rand(shape[0], 1, 1, device=device)
        chosen = torch.rand(shape[0], 1, 1, device=device) < 0.5
        return (torch.rand(shape, device=device) < share) & chosen

    def forward(self, views: Sequence[Tensor]) -> Step:
        """Return the loss of two views `(B, C, S, S)`, and of local crops of any one size after them."""
        whole = torch.cat(list(views[:2]))
        taught: Scores = self.teacher(whole)
        hidden = self.draw_hidden(taught.cells.shape[:3], whole.device)
        pixels = F.interpolate(hidden[:, None].float(), whole.shape[2:]) > 0
        seen: Scores = self.student(torch.where(pixels, self.hidden_pixel[:, None, None], whole))
        predicted = [*seen.image.chunk(2), *(self.student(view).image for view in views[2:])]
        image = over_pairs(distillation, predicted, self.targets[0](taught.image).chunk(2))
        cells = hidden_cells(seen.cells, self.targets[1](taught.cells), hidden)
        spread = torch.stack([koleo(each) for each in seen.features.chunk(2)]).mean()
        loss = image + cells + self.options.koleo_weight * spread
        return Step(loss, {"image": image, "cells": cells, "koleo": spread})

    def after_step(self) -> None:
        """Update the teacher."""
        self.teacher.update_(self.student)

    def figures(self) -> dict[str, float]:
        """Return the momentum of the next update."""
        return {"teacher_momentum": self.teacher.momentum_at(self.teacher.step)}

    def exports(self) -> dict[str, nn.Module]:
        """Return the student's encoder."""
        return {"encoder": self.encoder}
