"""Pretraining on X-rays with Lightning."""

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from examples.drop_in.data import pairs
from vqssl import DiSSECTObjective, MomentumTeacher, MultiScaleQuantizer, SERFFusion


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
        maps = [x := stage(x) for stage in self.stages]
        return self.projector(x.mean((2, 3))), maps


class Model(lightning.LightningModule):
    """Student, predictor and momentum teacher."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.student = Student()
        self.predictor = mlp(64, 64)
        self.teacher = MomentumTeacher(self.student, momentum=0.99, total_steps=steps)
        self.quantizer = MultiScaleQuantizer([32, 64, 128], codebook_size=64, dim=64)
        self.fusion = SERFFusion(dim=64, num_scales=3)
        self.objective = DiSSECTObjective()
        self.losses: list[float] = []

    def training_step(self, views: list[Tensor]) -> Tensor:
        """Return the loss of two views."""
        images = torch.cat(views)
        p = self.predictor(self.student(images)[0]).chunk(2)
        z, maps = self.teacher(images)
        codes = self.quantizer(maps)
        refined = self.fusion(z, codes.quantized)
        loss = self.objective(p, z.chunk(2), refined.chunk(2), codes.commitment_loss).total
        self.log("loss", loss)
        self.log("perplexity", self.quantizer.codebook(2).usage().perplexity)
        self.losses.append(loss.item())
        return loss

    def on_train_batch_end(self, *_) -> None:
        """Move the teacher towards the student."""
        self.teacher.update_(self.student)

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
