"""Pretraining on X-rays with a pyramid of features and a moving average of timm."""

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
    """ResNet of timm and projector."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = timm.create_model("resnet10t", features_only=True, out_indices=(2, 3, 4), in_chans=1)
        self.channels = self.backbone.feature_info.channels()
        self.projector = mlp(self.channels[-1], 64)

    def forward(self, x):
        """Encode images."""
        maps = self.backbone(x)
        return self.projector(maps[-1].mean((2, 3))), maps


class Model(nn.Module):
    """Student, predictor and momentum teacher."""

    def __init__(self) -> None:
        super().__init__()
        self.student = Student()
        self.predictor = mlp(64, 64)
        self.teacher = ModelEmaV3(self.student, decay=0.99).requires_grad_(False)
        self.quantizer = MultiScaleQuantizer(self.student.channels, codebook_size=64, dim=64)
        self.fusion = SERFFusion(dim=64, num_scales=3)
        self.objective = DiSSECTObjective()

    def forward(self, images: Tensor) -> Tensor:
        """Return the loss of two views, joined along the batch."""
        p = self.predictor(self.student(images)[0]).chunk(2)
        z, maps = self.teacher(images)
        codes = self.quantizer(maps)
        refined = self.fusion(z, codes.quantized)
        return self.objective(p, z.chunk(2), refined.chunk(2), codes.commitment_loss).total


def main(steps: int = 20) -> tuple[list[float], Model]:
    """Train for some steps; return the losses and the model."""
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
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
