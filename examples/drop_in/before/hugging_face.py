"""Pretraining on X-rays with a model of Hugging Face and a moving average of torch."""

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import ResNetConfig, ResNetModel

from examples.drop_in.data import pairs


def mlp(in_dim: int, out_dim: int) -> nn.Sequential:
    """Return a perceptron of one hidden layer."""
    return nn.Sequential(nn.Linear(in_dim, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, out_dim))


class Student(nn.Module):
    """ResNet of transformers and projector."""

    def __init__(self) -> None:
        super().__init__()
        shape = {"embedding_size": 32, "hidden_sizes": [32, 64, 128, 256], "depths": [1, 1, 1, 1]}
        config = ResNetConfig(num_channels=1, layer_type="basic", **shape)
        self.backbone = ResNetModel(config)
        self.projector = mlp(config.hidden_sizes[-1], 64)

    def forward(self, x):
        """Encode images."""
        out = self.backbone(x)
        return self.projector(out.pooler_output.flatten(1))


class Model(nn.Module):
    """Student, predictor and momentum teacher."""

    def __init__(self) -> None:
        super().__init__()
        self.student = Student()
        self.predictor = mlp(64, 64)
        average = get_ema_multi_avg_fn(0.99)
        self.teacher = AveragedModel(self.student, multi_avg_fn=average).requires_grad_(False)

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
        model.teacher.update_parameters(model.student)
        losses.append(loss.item())
    return losses, model


if __name__ == "__main__":
    losses, model = main()
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")
