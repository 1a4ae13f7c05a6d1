"""OTCXR-like (WACV 2025): cells of two views are aligned by optimal transport; VICReg's terms prevent collapse.

No code of OTCXR was found: "-like". Here the cells of the last map are embedded, an entropic transport plan between the
cells of two views says which belong together, and the invariance term is the cost under that plan, which is a constant.
Variance and covariance are those of the mean embedding of an image, weighted as in VICReg. There is no teacher.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from examples.pretrain.encoder import Encoder
from examples.pretrain.methods.interface import Step
from examples.pretrain.methods.losses import covariance_loss, variance_loss
from examples.pretrain.methods.student import mlp
from examples.pretrain.methods.transport import transport_plan


@dataclass(frozen=True)
class OTCXROptions:
    """Embeddings, transport and weights."""

    dim: int = 512
    """Width of the embeddings."""
    hidden_dim: int = 2048
    """Hidden width of the projector of cells."""
    strength: float = 0.05
    """Of the plan's entropy, in units of 1 - cos."""
    iterations: int = 30
    """Of Sinkhorn."""
    weights: tuple[float, float, float] = (25.0, 25.0, 1.0)
    """Of transport, variance and covariance."""
    title = "OTCXR-like"
    tuned = ("weights",)


class OTCXR(nn.Module):
    """A student without a teacher: the transport cost between cells of two views, and VICReg's other two terms."""

    Options = OTCXROptions

    def __init__(self, encoder: Encoder, options: OTCXROptions, *, total_steps: int = 0, seed: int = 0) -> None:
        super().__init__()
        self.options = options
        self.encoder = encoder
        self.projector = mlp(encoder.dim, options.hidden_dim, options.dim)

    def embed(self, images: Tensor) -> Tensor:
        """Return the embeddings of the cells of images, `(B, N, D)`."""
        cells = rearrange(self.encoder.pyramid(images)[-1], "b c h w -> (b h w) c")
        embedded: Tensor = self.projector(cells)
        return embedded.unflatten(0, (len(images), -1))

    def transport(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the mean cost, 1 - cos, of moving the cells `(B, N, D)` of one view to those of another."""
        cost = 1 - F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).mT
        plan = transport_plan(cost, strength=self.options.strength, iterations=self.options.iterations)
        return (plan * cost).sum((1, 2)).mean()

    def forward(self, views: Sequence[Tensor]) -> Step:
        """Return the loss of V views `(B, C, S, S)` of the same images."""
        cells = [self.embed(view) for view in views]
        images = [each.mean(1) for each in cells]
        parts = {
            "transport": torch.stack([self.transport(a, b) for a, b in itertools.combinations(cells, 2)]).mean(),
            "variance": torch.stack([variance_loss(each) for each in images]).mean(),
            "covariance": 2 * torch.stack([covariance_loss(each) for each in images]).mean(),
        }
        weighted = [weight * part for weight, part in zip(self.options.weights, parts.values(), strict=True)]
        return Step(torch.stack(weighted).sum(), parts)

    def after_step(self) -> None:
        """Do nothing: there is no teacher."""

    def figures(self) -> dict[str, float]:
        """Return nothing beyond the parts of the loss."""
        return {}

    def exports(self) -> dict[str, nn.Module]:
        """Return the encoder."""
        return {"encoder": self.encoder}
