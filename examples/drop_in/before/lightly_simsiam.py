"""Pretraining on X-rays with lightly's parts for SimSiam."""

import torch
from lightly.loss import NegativeCosineSimilarity
from lightly.models.modules import SimSiamPredictionHead, SimSiamProjectionHead
from torch import Tensor, nn
from torchvision.models import resnet18

from examples.drop_in.data import pairs


class Model(nn.Module):
    """SimSiam of lightly's parts."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = resnet18()
        self.backbone.fc = nn.Identity()
        self.projection_head = SimSiamProjectionHead(512, 512, 128)
        self.prediction_head = SimSiamPredictionHead(128, 64, 128)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the prediction and the target of a view."""
        features = self.backbone(x)
        z = self.projection_head(features)
        return self.prediction_head(z), z.detach()


def main(steps: int = 20) -> tuple[list[float], Model]:
    """Train for some steps; return the losses and the model."""
    torch.manual_seed(0)
    model = Model()
    criterion = NegativeCosineSimilarity()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    losses = []
    for x0, x1 in pairs(steps, size=48, channels=3):
        p0, z0 = model(x0)
        p1, z1 = model(x1)
        loss = (criterion(p0, z1) + criterion(p1, z0)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, model


if __name__ == "__main__":
    losses, model = main()
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")
