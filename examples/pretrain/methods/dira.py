"""DiRA (CVPR 2022): MoCo-v2 on distorted views, a U-Net that restores them, and an adversary that judges the result.

Loss as in jlianglab/DiRA: InfoNCE + 10 MSE to the clean view + 0.001 of a least-squares adversary, which takes part
after a share of the steps. Views are distorted by cut-out, out-paint and shuffled pixels. The U-Net is this example's
encoder with MONAI's decoder; the adversary is MONAI's. It learns with the same optimizer in the same step, from
its own loss, and not in a step of its own. Without it (`--dira.adversary-weight 0`) the method's name is DiR.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from monai.networks.nets.patchgan_discriminator import PatchDiscriminator
from torch import Tensor, nn
from torch.nn import functional as F

import vqssl
from examples.pretrain.decoder import Decoder
from examples.pretrain.encoder import Encoder
from examples.pretrain.methods.adversary import adversary_loss, judgement
from examples.pretrain.methods.distort import distort
from examples.pretrain.methods.interface import Step
from examples.pretrain.methods.key_queue import KeyQueue
from examples.pretrain.methods.losses import info_nce
from examples.pretrain.methods.student import Embedder, plain_mlp


@dataclass(frozen=True)
class DiRAOptions:
    """MoCo, restoration and adversary. The defaults are the release's, but for a shorter queue."""

    dim: int = 128
    """Width of queries and keys."""
    hidden_dim: int = 512
    """Hidden width of their projector."""
    momentum: float = 0.999
    """Of the encoder of keys."""
    queue: int = 4096
    """Number of keys in the queue."""
    temperature: float = 0.2
    """Of InfoNCE."""
    restoration_weight: float = 10.0
    """Of the mean squared error."""
    adversary_weight: float = 0.001
    """Of the adversary's judgement; 0 leaves it out."""
    warmup: float = 0.5
    """Share of the steps before the adversary's judgement counts."""

    tuned = ("restoration_weight",)

    @property
    def title(self) -> str:
        """Name in tables."""
        return "DiRA" if self.adversary_weight else "DiR"


class DiRA(nn.Module):
    """Query and key encoder, queue, decoder and adversary."""

    Options = DiRAOptions

    def __init__(self, encoder: Encoder, options: DiRAOptions, *, total_steps: int, seed: int = 0) -> None:
        super().__init__()
        channels = encoder.resnet.conv1.in_channels
        self.options = options
        self.warmup_steps = round(options.warmup * total_steps)
        self.student = Embedder(encoder, plain_mlp(encoder.dim, options.hidden_dim, options.dim))
        self.teacher = vqssl.MomentumTeacher(self.student, momentum=options.momentum)
        self.queue = KeyQueue(options.queue, options.dim)
        self.decoder = Decoder(encoder, channels)
        self.adversary = (
            PatchDiscriminator(2, channels=16, in_channels=channels, num_layers_d=2)
            if options.adversary_weight
            else None
        )

    @property
    def encoder(self) -> Encoder:
        """The encoder of queries."""
        return self.student.encoder

    def forward(self, views: Sequence[Tensor]) -> Step:
        """Return the loss of V clean views `(B, C, S, S)`: the first asks, each other one is a key."""
        view, *others = views
        pyramid = self.encoder.pyramid(distort(view))
        query = self.student.projector(pyramid[-1].mean((2, 3)))
        keys = [self.teacher(distort(other)).embedding for other in others]
        contrasts = [info_nce(query, key, self.queue.keys.clone(), self.options.temperature) for key in keys]
        restored = self.decoder(pyramid, view.shape[2:])
        parts = {"contrast": torch.stack(contrasts).mean(), "restoration": F.mse_loss(restored, view)}
        loss = parts["contrast"] + self.options.restoration_weight * parts["restoration"]
        if self.adversary is not None:
            judged, learnt = judgement(self.adversary, restored), adversary_loss(self.adversary, restored, view)
            counts = self.teacher.num_updates >= self.warmup_steps
            # The adversary's own loss has weight 1: its gradient reaches nothing else.
            loss = loss + self.options.adversary_weight * counts * judged + learnt
            parts |= {"judged": judged, "adversary": learnt}
        if self.training:
            self.queue.put(torch.cat(keys))
        return Step(loss, parts)

    def after_step(self) -> None:
        """Update the encoder of keys."""
        self.teacher.update_(self.student)

    def figures(self) -> dict[str, float]:
        """Return nothing beyond the parts of the loss."""
        return {}

    def exports(self) -> dict[str, nn.Module]:
        """Return the encoder of queries."""
        return {"encoder": self.encoder}
