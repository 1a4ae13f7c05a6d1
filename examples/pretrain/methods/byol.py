"""BYOL (arXiv 2006.07733): the student predicts the embedding that a momentum teacher gives another view."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

import vqssl
from examples.pretrain.encoder import Encoder
from examples.pretrain.methods.interface import Step
from examples.pretrain.methods.student import Predicted, Student, mlp


@dataclass(frozen=True)
class BYOLOptions:
    """Projector, predictor and teacher. The defaults are those of the DiSSECT paper."""

    dim: int = 128
    """Width D of embeddings and predictions."""
    hidden_dim: int = 2048
    """Hidden width of projector and predictor."""
    momentum: float = 0.996
    """Of the teacher, at the first step."""
    final_momentum: float = 1.0
    """Of the teacher, at the last step."""
    buffers: Literal["ema", "copy", "own"] = "ema"
    """How the teacher's BatchNorm statistics follow the student's; see `vqssl.MomentumTeacher`."""


class Compared(NamedTuple):
    """Student and teacher on the same views, joined along the batch: V B rows."""

    student: Predicted
    target: Tensor
    """z_c, the teacher's embedding, `(V B, D)`."""
    target_maps: list[Tensor]
    """The teacher's maps, one a scale."""


class BYOL(nn.Module):
    """Student, momentum teacher, and the mean of 2 - 2 cos(p, z_c) over ordered pairs of different views."""

    Options = BYOLOptions

    def __init__(self, encoder: Encoder, options: BYOLOptions, *, total_steps: int, seed: int = 0) -> None:
        super().__init__()
        dim, hidden_dim = options.dim, options.hidden_dim
        self.student = Student(encoder, mlp(encoder.dim, hidden_dim, dim), mlp(dim, hidden_dim, dim))
        self.teacher = vqssl.MomentumTeacher(
            self.student.embedder,
            momentum=options.momentum,
            final_momentum=options.final_momentum,
            total_steps=total_steps,
            buffers=options.buffers,
        )
        self.objective = vqssl.DiSSECTObjective()  # without a refined target: BYOL's loss

    @property
    def encoder(self) -> Encoder:
        """The student's encoder."""
        return self.student.embedder.encoder

    @property
    def target_encoder(self) -> nn.Module:
        """The teacher's encoder."""
        return self.teacher.module.get_submodule("encoder")

    def compare(self, views: Sequence[Tensor]) -> Compared:
        """Return the outputs of student and teacher for V views `(B, C, S, S)`."""
        images = torch.cat(list(views))
        target = self.teacher(images)
        return Compared(self.student(images), target.embedding, target.maps)

    def forward(self, views: Sequence[Tensor]) -> Step:
        """Return the loss of V views `(B, C, S, S)` of the same images."""
        seen = self.compare(views)
        count = len(views)
        loss = self.objective(seen.student.prediction.chunk(count), seen.target.chunk(count))
        spread = vqssl.functional.target_spread(seen.target)
        return Step(loss.total, {"alignment_global": loss.alignment_global, "target_spread": spread})

    def after_step(self) -> None:
        """Update the teacher."""
        self.teacher.update_(self.student.embedder)

    def figures(self) -> dict[str, float]:
        """Return the momentum of the next update."""
        return {"teacher_momentum": self.teacher.momentum_at(self.teacher.step)}

    def exports(self) -> dict[str, nn.Module]:
        """Return the student's encoder."""
        return {"encoder": self.encoder}
