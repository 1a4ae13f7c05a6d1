"""Pretraining on X-rays with a vision transformer and a moving average of timm."""

import timm
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from examples.drop_in.data import pairs
from vqssl import DiSSECTObjective, MultiScaleQuantizer, SERFFusion


def mlp(in_dim: int, out_dim: int) -> nn.Sequential:
    """Return a perceptron of one hidden layer."""
    return nn.Sequential(nn.Linear(in_dim, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, out_dim))


class Student(nn.Module):
    """Vision transformer of timm and projector."""

    def __init__(self) -> None:
        super().__init__()
        options = {"img_size": 48, "patch_size": 8, "in_chans": 1, "num_classes": 0, "depth": 4}
        self.backbone = timm.create_model("vit_tiny_patch16_224", **options)
        self.projector = mlp(self.backbone.embed_dim, 64)

    def forward(self, x):
        """Encode images."""
        tokens, layers = self.backbone.forward_intermediates(x, indices=[1, 2, 3], output_fmt="NLC")
        return self.projector(self.backbone.forward_head(tokens)), layers


class Model(nn.Module):
    """Student, predictor and momentum teacher."""

    def __init__(self) -> None:
        super().__init__()
        self.student = Student()
        self.predictor = mlp(64, 64)
        self.teacher = ModelEmaV3(self.student, decay=0.99).requires_grad_(False)
        self.quantizer = MultiScaleQuantizer([192, 192, 192], codebook_size=64, dim=64, channels_last=True)
        self.fusion = SERFFusion(dim=64, num_scales=3, channels_last=True)
        self.objective = DiSSECTObjective()

    def forward(self, images: Tensor) -> Tensor:
        """Return the loss of two views, joined along the batch."""
        p = self.predictor(self.student(images)[0]).chunk(2)
        z, layers = self.teacher(images)
        codes = self.quantizer(layers)
        refined = self.fusion(z, codes.quantized)
        return self.objective(p, z.chunk(2), refined.chunk(2), codes.commitment_loss).total


def main(steps: int = 20) -> tuple[list[float], Model]:
    """Train for some steps; return the losses and the model."""
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    losses = []
    for views in pairs(steps, size=48):
        loss = model(torch.cat(views))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.teacher.update(model.student)
        losses.append(loss.item())
    return losses, model


if __name__ == "__main__":
    losses, model = main()
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")
    print("perplexity", [f"{usage.perplexity:.0f}" for usage in model.quantizer.usage()])
