"""Adam-v2 (CVPR 2024): parts and wholes. DINO's loss, four parts compose the whole, and the whole gives its parts.

Localisability: DINO's loss over two views and small crops. Composability: from the student's features of the four
quarters of a view a head predicts the teacher's features of the view; decomposability: from the student's features of
the view another one predicts the teacher's of each quarter. Weights 1 : 1 : 1, the first alone for a share of the
steps, as jlianglab trains them one after another. Simplified: quarters are half as large as the view in pixels
(images of 64 pixels suit it, their quarters have 32), the latter two losses are cosine regressions of pooled features,
and a crop is any small crop, not a cell of the pyramid of anatomy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

import vqssl
from examples.pretrain.encoder import Encoder
from examples.pretrain.methods.crops import multi_crop
from examples.pretrain.methods.interface import Step
from examples.pretrain.methods.losses import distillation, over_pairs
from examples.pretrain.methods.prototypes import PrototypeHead, SharpTargets
from examples.pretrain.methods.student import Embedded, Embedder, mlp
from vqssl.functional import cosine_regression_loss


@dataclass(frozen=True)
class AdamV2Options:
    """Heads, teacher and weights."""

    prototypes: int = 1024
    """K, of localisability."""
    hidden_dim: int = 2048
    """Hidden width of all heads."""
    bottleneck: int = 256
    """Width in which prototypes are compared."""
    momentum: float = 0.996
    """Of the teacher, at the first step; 1 at the last."""
    teacher_temperature: float = 0.04
    """Of the targets; the student's is 0.1."""
    local_crops: int = 2
    """Small crops of each image, which only predict."""
    alone: float = 0.3
    """Share of the steps in which localisability is alone."""
    title = "Adam-v2"


class AdamV2(nn.Module):
    """Student, momentum teacher, and heads for prototypes, for the whole and for the four parts."""

    Options = AdamV2Options

    def __init__(self, encoder: Encoder, options: AdamV2Options, *, total_steps: int, seed: int = 0) -> None:
        super().__init__()
        width = encoder.dim
        self.options = options
        self.steps_alone = round(options.alone * total_steps)
        head = PrototypeHead(width, options.hidden_dim, options.bottleneck, options.prototypes)
        self.student = Embedder(encoder, head)
        self.teacher = vqssl.MomentumTeacher(self.student, momentum=options.momentum, total_steps=total_steps)
        self.targets = SharpTargets(options.prototypes, options.teacher_temperature)
        self.compose = mlp(4 * width, options.hidden_dim, width)
        self.decompose = mlp(width, options.hidden_dim, 4 * width)

    @property
    def encoder(self) -> Encoder:
        """The student's encoder."""
        return self.student.encoder

    def views(self, images: Tensor, augment: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Return two views and the small crops."""
        return multi_crop(images, augment, self.options.local_crops)

    def forward(self, views: Sequence[Tensor]) -> Step:
        """Return the loss of two views `(B, C, S, S)`, S even, and of small crops of any one size after them."""
        whole = torch.cat(list(views[:2]))
        parts = rearrange(whole, "b c (y h) (x w) -> (b y x) c h w", y=2, x=2)
        seen, taught = self.student(whole), self.teacher(whole)
        scores = [*seen.embedding.chunk(2), *(self.student(view).embedding for view in views[2:])]
        localise = over_pairs(distillation, scores, self.targets(taught.embedding).chunk(2))
        composed = self.compose(joined(self.student(parts)))
        compose = cosine_regression_loss(composed, taught.features)
        four = joined(self.teacher(parts))
        split = [each.unflatten(1, (4, -1)) for each in (self.decompose(seen.features), four)]
        decompose = cosine_regression_loss(*split)
        together = self.teacher.num_updates >= self.steps_alone
        loss = localise + together * (compose + decompose)
        return Step(loss, {"localise": localise, "compose": compose, "decompose": decompose})

    def after_step(self) -> None:
        """Update the teacher."""
        self.teacher.update_(self.student)

    def figures(self) -> dict[str, float]:
        """Return the momentum of the next update."""
        return {"teacher_momentum": self.teacher.momentum_at(self.teacher.step)}

    def exports(self) -> dict[str, nn.Module]:
        """Return the student's encoder."""
        return {"encoder": self.encoder}


def joined(parts: Embedded) -> Tensor:
    """Return the features of the four parts of each view, side by side: `(4 B, C)` to `(B, 4 C)`."""
    return rearrange(parts.features, "(b p) c -> b (p c)", p=4)
