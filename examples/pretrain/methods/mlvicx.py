"""MLVICX (JBHI 2024): VICReg's loss on the global embedding and on an embedding of every stage; no teacher.

Weights 25, 25, 1, as in azad6629/mlvicx. Each stage of the encoder (five with the usual stem) has a side branch: a
1 x 1 map to a common width, which stays as it was drawn (the release makes it after its optimizer), and attention over
the cells, by which they are averaged. The encoder starts untrained, where the release's is ImageNet's.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from examples.pretrain.encoder import Encoder
from examples.pretrain.methods.interface import Step
from examples.pretrain.methods.losses import vicreg
from examples.pretrain.methods.student import mlp


@dataclass(frozen=True)
class MLVICXOptions:
    """Widths and weights. The defaults are the release's."""

    dim: int = 4096
    """Width of the global embedding, and hidden width of its projector."""
    side_dim: int = 512
    """Width of the embeddings of the stages."""
    weights: tuple[float, float, float] = (25.0, 25.0, 1.0)
    """Of invariance, variance and covariance."""
    train_maps: bool = False
    """Train the 1 x 1 maps of the side branches too."""
    title = "MLVICX"
    tuned = ("weights",)


class SideBranch(nn.Module):
    """A 1 x 1 map and attention pooling, `(B, C, H, W)` to `(B, D)`: a softmax of scores weights the cells."""

    def __init__(self, channels: int, dim: int, *, train_map: bool) -> None:
        super().__init__()
        self.map = nn.Conv2d(channels, dim, 1).requires_grad_(train_map)
        self.score = nn.Conv2d(dim, 1, 1)

    def forward(self, features: Tensor) -> Tensor:
        """Return the embedding."""
        cells = self.map(features)
        weights = self.score(cells).flatten(2).softmax(-1)  # (B, 1, H W)
        return (weights * cells.flatten(2)).sum(-1)


class MLVICX(nn.Module):
    """A student without a teacher: the sum of VICReg's losses of the global embedding and of each stage."""

    Options = MLVICXOptions

    def __init__(self, encoder: Encoder, options: MLVICXOptions, *, total_steps: int = 0, seed: int = 0) -> None:
        super().__init__()
        self.options = options
        self.encoder = encoder
        self.projector = mlp(encoder.dim, options.dim, options.dim)
        self.sides = nn.ModuleList(
            SideBranch(channels, options.side_dim, train_map=options.train_maps)
            for channels in encoder.pyramid_channels
        )

    def embed(self, images: Tensor) -> list[Tensor]:
        """Return the global embedding of images `(B, C, S, S)`, and one of each stage, fine to coarse."""
        pyramid = self.encoder.pyramid(images)
        sides = [side(each) for side, each in zip(self.sides, pyramid, strict=True)]
        return [self.projector(pyramid[-1].mean((2, 3))), *sides]

    def forward(self, views: Sequence[Tensor]) -> Step:
        """Return the loss of V views `(B, C, S, S)` of the same images, over their pairs."""
        seen = [self.embed(view) for view in views]
        levels = [
            torch.stack([vicreg(a, b, self.options.weights) for a, b in itertools.combinations(level, 2)]).mean()
            for level in zip(*seen, strict=True)
        ]
        whole, *sides = levels
        return Step(torch.stack(levels).sum(), {"global": whole, "stages": torch.stack(sides).sum()})

    def after_step(self) -> None:
        """Do nothing: there is no teacher."""

    def figures(self) -> dict[str, float]:
        """Return nothing beyond the parts of the loss."""
        return {}

    def exports(self) -> dict[str, nn.Module]:
        """Return the encoder."""
        return {"encoder": self.encoder}
