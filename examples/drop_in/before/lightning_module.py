"""Pretraining on X-rays with Lightning."""

import copy

import lightning
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from torch.utils.data import DataLoader

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


class Model(lightning.LightningModule):
    """Student, predictor and momentum teacher."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.student = Student()
        self.predictor = mlp(64, 64)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.losses: list[float] = []

    def training_step(self, views: list[Tensor]) -> Tensor:
        """Return the loss of two views."""
        images = torch.cat(views)
        p = self.predictor(self.student(images)).chunk(2)
        z = self.teacher(images).chunk(2)
        loss = 2 - cosine_similarity(p[0], z[1]).mean() - cosine_similarity(p[1], z[0]).mean()
        self.log("loss", loss)
        self.losses.append(loss.item())
        return loss

    @torch.no_grad()
    def on_train_batch_end(self, *_) -> None:
        """Move the teacher towards the student."""
        for slow, fast in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            slow.lerp_(fast, 0.01)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main(steps: int = 20) -> tuple[list[float], Model]:
    """Train for some steps; return the losses and the model."""
    lightning.seed_everything(0, verbose=False)
    model = Model(steps)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(max_steps=steps, accelerator="cpu", enable_model_summary=False, **quiet)
    trainer.fit(model, DataLoader(list(pairs(steps)), batch_size=None))  # type: ignore[arg-type]
    return model.losses, model


if __name__ == "__main__":
    losses, model = main()
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")
