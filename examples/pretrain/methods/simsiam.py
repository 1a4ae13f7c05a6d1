"""SimSiam (arXiv 2011.10566): the prediction of one view matches the embedding of another, which gets no gradient.

Projector, predictor and loss are those of facebookresearch/simsiam. Encoder, views, optimizer and schedule are this
example's: the reference starts its residual branches at zero and can keep the predictor's learning rate constant.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vqssl
from examples.pretrain.encoder import Encoder
from examples.pretrain.methods.interface import Step
from examples.pretrain.methods.student import Student


@dataclass(frozen=True)
class SimSiamOptions:
    """Projector and predictor. The defaults are those of the SimSiam paper."""

    dim: int = 2048
    """Width D of embeddings and predictions."""
    bottleneck: int = 512
    """Hidden width of the predictor."""


class SimSiam(nn.Module):
    """A student without a teacher: the mean of -cos(p, sg[z]) over ordered pairs of different views."""

    Options = SimSiamOptions

    def __init__(self, encoder: Encoder, options: SimSiamOptions, *, total_steps: int = 0, seed: int = 0) -> None:
        super().__init__()
        width, dim = encoder.dim, options.dim
        projector = nn.Sequential(
            *(nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(inplace=True)),
            *(nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(inplace=True)),
            *(nn.Linear(width, dim, bias=False), nn.BatchNorm1d(dim, affine=False)),
        )
        predictor = nn.Sequential(
            *(nn.Linear(dim, options.bottleneck, bias=False), nn.BatchNorm1d(options.bottleneck)),
            *(nn.ReLU(inplace=True), nn.Linear(options.bottleneck, dim)),
        )
        self.student = Student(encoder, projector, predictor)

    @property
    def encoder(self) -> Encoder:
        """The student's encoder."""
        return self.student.embedder.encoder

    def forward(self, views: Sequence[Tensor]) -> Step:
        """Return the loss of V views `(B, C, S, S)` of the same images; BatchNorm sees each view alone."""
        seen = [self.student(view) for view in views]
        targets = [each.embedding.detach() for each in seen]
        pairs = itertools.permutations(range(len(views)), 2)
        similarities = [F.cosine_similarity(seen[a].prediction, targets[b]).mean() for a, b in pairs]
        spread = vqssl.functional.target_spread(torch.cat(targets))
        return Step(-torch.stack(similarities).mean(), {"target_spread": spread})

    def after_step(self) -> None:
        """Do nothing: there is no teacher."""

    def figures(self) -> dict[str, float]:
        """Return nothing beyond the parts of the loss."""
        return {}

    def exports(self) -> dict[str, nn.Module]:
        """Return the encoder."""
        return {"encoder": self.encoder}
