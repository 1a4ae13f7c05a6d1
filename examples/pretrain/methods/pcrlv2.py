"""PCRLv2 (TPAMI 2023): a U-Net without skips restores cut-out views, and its scales agree between views.

After funnyzhou/PCRLv2: a step draws one of the decoder's scales. Its pooled map predicts that of the other view
(SimSiam's cosine, local crops predict too), and a head restores the image at that scale; the whole decoder restores it
in full. The weight of the former restoration falls from 1 to 0 over the run: (1 + cos(pi t / T)) / 2. The encoder is
the example's ResNet and the decoder MONAI's, whose scales are five with the usual stem and four without its pooling.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.pretrain.decoder import Decoder
from examples.pretrain.encoder import Encoder
from examples.pretrain.methods.crops import multi_crop
from examples.pretrain.methods.distort import cut_out
from examples.pretrain.methods.interface import Step
from examples.pretrain.methods.losses import over_pairs
from examples.pretrain.methods.student import mlp


@dataclass(frozen=True)
class PCRLv2Options:
    """Heads, crops and weights."""

    dim: int = 512
    """Width of embeddings and predictions of every scale."""
    hidden_dim: int = 512
    """Hidden width of projectors and predictors."""
    local_crops: int = 2
    """Small crops of each image, which only predict."""
    cut_out: tuple[float, float] = (0.02, 0.2)
    """Smallest and largest share of a view that is cut out and restored."""
    restoration_weight: float = 1.0
    """Of the mean squared errors beside the cosine."""
    title = "PCRLv2"
    tuned = ("restoration_weight",)


class PCRLv2(nn.Module):
    """An encoder and a decoder without skips; at every scale of the latter a projector, a predictor and an image."""

    Options = PCRLv2Options
    steps_done: Tensor

    def __init__(self, encoder: Encoder, options: PCRLv2Options, *, total_steps: int, seed: int = 0) -> None:
        super().__init__()
        channels, sizes = encoder.resnet.conv1.in_channels, (options.hidden_dim, options.dim)
        self.options = options
        self.seed = seed
        self.total_steps = max(total_steps, 1)
        self.encoder = encoder
        self.decoder = Decoder(encoder, channels, skips=False)
        self.projectors = nn.ModuleList(mlp(width, *sizes) for width in self.decoder.widths)
        self.predictors = nn.ModuleList(mlp(options.dim, *sizes) for _ in self.decoder.widths)
        self.images = nn.ModuleList(nn.Conv2d(width, channels, 1) for width in self.decoder.widths)
        self.register_buffer("steps_done", torch.zeros((), dtype=torch.int64))

    def views(self, images: Tensor, augment: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Return two views and the local crops."""
        return multi_crop(images, augment, self.options.local_crops)

    def draw_scale(self) -> int:
        """Return the number of the decoder's scale for this step, from seed and step: equal on all ranks."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + int(self.steps_done))
        return int(torch.randint(len(self.projectors), (), generator=generator))

    def forward(self, views: Sequence[Tensor]) -> Step:
        """Return the loss of two views `(B, C, S, S)`, and of local crops of any one size after them."""
        scale = self.draw_scale()
        whole = torch.cat(list(views[:2]))
        maps = self.decoder.maps(self.encoder.pyramid(cut_out(whole, self.options.cut_out)))
        local = [self.decoder.maps(self.encoder.pyramid(view))[scale] for view in views[2:]]
        embedded = [self.projectors[scale](each.mean((2, 3))) for each in (*maps[scale].chunk(2), *local)]
        predicted = [self.predictors[scale](each) for each in embedded]
        cosine = over_pairs(minus_cosine, predicted, [each.detach() for each in embedded[:2]])
        full = F.mse_loss(self.decoder.image(maps[-1], whole.shape[2:]), whole)
        image = self.images[scale](maps[scale])
        at_scale = F.mse_loss(image, F.interpolate(whole, image.shape[2:], mode="area"))
        falling = (1 + torch.cos(torch.pi * (self.steps_done / self.total_steps).clamp(max=1))) / 2
        loss = cosine + self.options.restoration_weight * (full + falling * at_scale)
        return Step(loss, {"cosine": cosine, "restoration": full, "restoration_scale": at_scale})

    def after_step(self) -> None:
        """Count the step: the weight of the restoration at a scale falls with it."""
        self.steps_done.add_(1)

    def figures(self) -> dict[str, float]:
        """Return nothing beyond the parts of the loss."""
        return {}

    def exports(self) -> dict[str, nn.Module]:
        """Return the encoder."""
        return {"encoder": self.encoder}


def minus_cosine(prediction: Tensor, target: Tensor) -> Tensor:
    """Return SimSiam's loss of a pair, the mean of -cos over the batch."""
    return -F.cosine_similarity(prediction, target).mean()
