"""Pretraining on heartbeats: one-dimensional signals of different lengths."""

import numpy as np
import torch
from torch import Tensor, nn

from vqssl import DiSSECTObjective, MomentumTeacher, MultiScaleQuantizer, SERFFusion


def recordings(rng: np.random.Generator, count: int, length: int = 256) -> tuple[Tensor, Tensor]:
    """Return beats `(count, 1, length)` of various rates, and a mask `(count, length)` of what was recorded."""
    phase = (np.arange(length) / rng.uniform(40, 80, (count, 1)) + rng.uniform(0, 1, (count, 1))) % 1
    waves = ((0.15, 0.3, 0.03), (0.37, -0.4, 0.01), (0.4, 2.0, 0.015), (0.43, -0.6, 0.015), (0.7, 0.5, 0.06))
    heights = rng.uniform(0.5, 1.5, (len(waves), count, 1))
    beats = sum(h * top * np.exp(-(((phase - at) / w) ** 2)) for h, (at, top, w) in zip(heights, waves, strict=True))
    recorded = np.arange(length) < rng.integers(length // 4, length, (count, 1), endpoint=True)
    return torch.tensor(beats * recorded, dtype=torch.float32)[:, None], torch.tensor(recorded)


def view(signals: Tensor) -> Tensor:
    """Return a random view."""
    return signals * (0.7 + 0.6 * torch.rand(len(signals), 1, 1)) + 0.1 * torch.randn_like(signals)


def mlp(in_dim: int, out_dim: int) -> nn.Sequential:
    """Return a perceptron of one hidden layer."""
    return nn.Sequential(nn.Linear(in_dim, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, out_dim))


def stage(in_channels: int, out_channels: int) -> nn.Sequential:
    """Return a strided convolution with BatchNorm and ReLU."""
    conv = nn.Conv1d(in_channels, out_channels, 7, stride=4, padding=3)
    return nn.Sequential(conv, nn.BatchNorm1d(out_channels), nn.ReLU())


class Student(nn.Module):
    """Encoder of signals and projector."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([stage(1, 32), stage(32, 64)])
        self.projector = mlp(64, 64)

    def forward(self, x, recorded):
        """Encode signals; `recorded` marks what to average."""
        maps = [x := stage(x) for stage in self.stages]
        weights = recorded[:, None, ::16].float()
        return self.projector((x * weights).sum(-1) / weights.sum(-1)), maps


class Model(nn.Module):
    """Student, predictor and momentum teacher."""

    def __init__(self) -> None:
        super().__init__()
        self.student = Student()
        self.predictor = mlp(64, 64)
        self.teacher = MomentumTeacher(self.student, momentum=0.99)
        self.quantizer = MultiScaleQuantizer([32, 64], codebook_size=64, dim=64)
        self.fusion = SERFFusion(dim=64, num_scales=2)
        self.objective = DiSSECTObjective()

    def forward(self, signals: Tensor, recorded: Tensor) -> Tensor:
        """Return the loss of two views, joined along the batch."""
        p = self.predictor(self.student(signals, recorded)[0]).chunk(2)
        z, maps = self.teacher(signals, recorded)
        masks = [recorded[:, ::4], recorded[:, ::16]]
        codes = self.quantizer(maps, masks)
        refined = self.fusion(z, codes.quantized, masks)
        return self.objective(p, z.chunk(2), refined.chunk(2), codes.commitment_loss).total

    def update_teacher(self) -> None:
        """Move the teacher towards the student."""
        self.teacher.update_(self.student)


def main(steps: int = 20) -> tuple[list[float], Model]:
    """Train for some steps; return the losses and the model."""
    torch.manual_seed(0)
    model = Model()
    rng = np.random.default_rng(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(steps):
        signals, recorded = recordings(rng, 32)
        loss = model(torch.cat([view(signals), view(signals)]), recorded.repeat(2, 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.update_teacher()
        losses.append(loss.item())
    return losses, model


if __name__ == "__main__":
    losses, model = main()
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")
    print("perplexity", [f"{usage.perplexity:.0f}" for usage in model.quantizer.usage()])
