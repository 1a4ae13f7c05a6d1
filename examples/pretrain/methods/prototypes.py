"""Prototypes, as DINO has them: the head that scores them, and a teacher's sharp and centred distributions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vqssl
from examples.pretrain.encoder import STAGES, Encoder


class PrototypeHead(nn.Module):
    """An MLP to a bottleneck, and its cosine with K prototypes: features `(*batch, C)` to logits `(*batch, K)`."""

    def __init__(self, in_dim: int, hidden_dim: int, bottleneck: int, prototypes: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            *(nn.Linear(in_dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, hidden_dim), nn.GELU()),
            nn.Linear(hidden_dim, bottleneck),
        )
        self.prototypes = nn.Parameter(torch.randn(prototypes, bottleneck))

    def forward(self, features: Tensor) -> Tensor:
        """Return the cosines."""
        return F.linear(F.normalize(self.mlp(features), dim=-1), F.normalize(self.prototypes, dim=-1))


class Scores(NamedTuple):
    """Logits of the prototypes, and what they are computed from."""

    image: Tensor
    """`(B, K)`."""
    cells: Tensor
    """`(B, H, W, K)`."""
    features: Tensor
    """The pooled features `(B, C)`."""


class Scorer(nn.Module):
    """Encoder and two heads, of images and of cells: the part of DINOv2's student that the teacher copies.

    Args:
        encoder: images to maps.
        sizes: hidden width, bottleneck and number of prototypes of each head.
    """

    def __init__(self, encoder: Encoder, *sizes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.of_image = PrototypeHead(encoder.dim, *sizes)
        self.of_cells = PrototypeHead(encoder.widths[2], *sizes)

    def forward(self, images: Tensor) -> Scores:
        """Return the scores of images, and of the cells of layer3."""
        maps = self.encoder.pyramid(images)[-len(STAGES) :]
        features = maps[-1].mean((2, 3))
        return Scores(self.of_image(features), self.of_cells(maps[2].movedim(1, -1)), features)


class SharpTargets(nn.Module):
    """softmax((logits - c) / temperature), without a gradient; c is the running mean of the logits, over the ranks."""

    def __init__(self, prototypes: int, temperature: float, momentum: float = 0.9) -> None:
        super().__init__()
        self.temperature = temperature
        self.centring = vqssl.TargetCentring([prototypes], how="running", momentum=momentum)

    @torch.no_grad()
    def forward(self, logits: Tensor) -> Tensor:
        """Return the distributions `(*batch, K)`."""
        return (self.centring([logits])[0] / self.temperature).softmax(-1)
