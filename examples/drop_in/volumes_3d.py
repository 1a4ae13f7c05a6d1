"""Pretraining on volumes with MONAI's ResNet."""

import numpy as np
import torch
from monai.networks.nets.resnet import ResNetFeatures
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from vqssl import DiSSECTObjective, MultiScaleQuantizer, SERFFusion


def volumes(count: int, size: int, rng: np.random.Generator) -> Tensor:
    """Return blobs of several sizes in a noisy ball, `(count, 1, size, size, size)`."""
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, size)] * 3, indexing="ij"), -1)
    places, widths = rng.uniform(-0.6, 0.6, (6, count, 1, 1, 1, 3)), rng.uniform(0.05, 0.25, (6, count, 1, 1, 1))
    blobs = sum(np.exp(-(((grid - at) / w[..., None]) ** 2).sum(-1)) for at, w in zip(places, widths, strict=True))
    ball = ((grid**2).sum(-1) < 0.9) * rng.uniform(0.3, 0.7, (count, 1, 1, 1))
    noise = 0.1 * rng.standard_normal((count, size, size, size))
    return torch.tensor(blobs + ball + noise, dtype=torch.float32)[:, None]


def view(x: Tensor) -> Tensor:
    """Return a random view."""
    flipped = x.flip([axis for axis in (2, 3, 4) if torch.rand(()) < 0.5])
    return flipped * (0.7 + 0.6 * torch.rand(len(x), 1, 1, 1, 1)) + 0.1 * torch.randn_like(x)


def mlp(in_dim: int, out_dim: int) -> nn.Sequential:
    """Return a perceptron of one hidden layer."""
    return nn.Sequential(nn.Linear(in_dim, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, out_dim))


class Student(nn.Module):
    """3-D ResNet of MONAI and projector."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = ResNetFeatures("resnet10", pretrained=False, spatial_dims=3, in_channels=1)
        self.projector = mlp(512, 64)

    def forward(self, x):
        """Encode volumes."""
        maps = self.backbone(x)
        return self.projector(maps[-1].mean((2, 3, 4))), maps[1:4]


class Model(nn.Module):
    """Student, predictor and momentum teacher."""

    def __init__(self) -> None:
        super().__init__()
        self.student = Student()
        self.predictor = mlp(64, 64)
        average = get_ema_multi_avg_fn(0.99)
        self.teacher = AveragedModel(self.student, multi_avg_fn=average).requires_grad_(False)
        self.quantizer = MultiScaleQuantizer([64, 128, 256], codebook_size=64, dim=64)
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
    scans = volumes(16, 32, np.random.default_rng(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for step in range(steps):
        batch = scans.roll(-4 * step, 0)[:4]
        loss = model(torch.cat([view(batch), view(batch)]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.teacher.update_parameters(model.student)
        losses.append(loss.item())
    return losses, model


if __name__ == "__main__":
    losses, model = main()
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")
    print("perplexity", [f"{usage.perplexity:.0f}" for usage in model.quantizer.usage()])
