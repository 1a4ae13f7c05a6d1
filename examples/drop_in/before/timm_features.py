"""Pretraining on X-rays with a pyramid of features and a moving average of timm."""

import timm
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from examples.drop_in.data import pairs


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
        return self.projector(maps[-1].mean((2, 3)))


class Model(nn.Module):
    """Student, predictor and momentum teacher."""

    def __init__(self) -> None:
        super().__init__()
        self.student = Student()
        self.predictor = mlp(64, 64)
        self.teacher = ModelEmaV3(self.student, decay=0.99).requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Return the loss of two views, joined along the batch."""
        p = self.predictor(self.student(images)).chunk(2)
        z = self.teacher(images).chunk(2)
        return 2 - cosine_similarity(p[0], z[1]).mean() - cosine_similarity(p[1], z[0]).mean()


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
