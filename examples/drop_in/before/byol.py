"""Pretraining on X-rays in plain PyTorch."""

import copy

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from examples.drop_in.data import pairs


def mlp(in_dim: int, out_dim: int) -> nn.Sequential:
    """Return a perceptron of one hidden layer."""
    return nn.Sequential(nn.Linear(in_dim, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, out_dim))


def stage(in_channels: int, out_channels: int) -> nn.Sequential:
    """Return a strided convolution with BatchNorm and ReLU."""
    conv = nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU())


class Student(nn.Module):
    """Encoder and projector."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([stage(1, 32), stage(32, 64), stage(64, 128)])
        self.projector = mlp(128, 64)

    def forward(self, x):
        """Encode images."""
        for stage in self.stages:
            x = stage(x)
        return self.projector(x.mean((2, 3)))


class Model(nn.Module):
    """Student, predictor and momentum teacher."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.student = Student()
        self.predictor = mlp(64, 64)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Return the loss of two views, joined along the batch."""
        p = self.predictor(self.student(images)).chunk(2)
        z = self.teacher(images).chunk(2)
        return 2 - cosine_similarity(p[0], z[1]).mean() - cosine_similarity(p[1], z[0]).mean()

    @torch.no_grad()
    def update_teacher(self) -> None:
        """Move the teacher towards the student."""
        for slow, fast in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            slow.lerp_(fast, 0.01)


def main(steps: int = 20) -> tuple[list[float], Model]:
    """Train for some steps; return the losses and the model."""
    torch.manual_seed(0)
    model = Model(steps)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for views in pairs(steps):
        loss = model(torch.cat(views))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.update_teacher()
        losses.append(loss.item())
    return losses, model


if __name__ == "__main__":
    losses, model = main()
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")
