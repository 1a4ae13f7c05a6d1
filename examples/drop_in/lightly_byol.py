"""Pretraining on X-rays with lightly's parts for BYOL."""

import copy

import torch
from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.utils.scheduler import cosine_schedule
from torch import Tensor, nn
from torchvision.models import resnet18
from torchvision.models.feature_extraction import create_feature_extractor

from examples.drop_in.data import pairs
from vqssl import DiSSECTObjective, MultiScaleQuantizer, SERFFusion


class Model(nn.Module):
    """BYOL of lightly's parts."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = create_feature_extractor(resnet18(), ["layer2", "layer3", "layer4", "flatten"])
        self.projection_head = BYOLProjectionHead(512, 1024, 128)
        self.prediction_head = BYOLPredictionHead(128, 1024, 128)
        self.backbone_momentum = copy.deepcopy(self.backbone)
        self.projection_head_momentum = copy.deepcopy(self.projection_head)
        deactivate_requires_grad(self.backbone_momentum)
        deactivate_requires_grad(self.projection_head_momentum)
        self.quantizer = MultiScaleQuantizer([128, 256, 512], codebook_size=64, dim=128)
        self.fusion = SERFFusion(dim=128, num_scales=3)

    def forward(self, x: Tensor) -> Tensor:
        """Return the prediction of a view."""
        return self.prediction_head(self.projection_head(self.backbone(x)["flatten"]))

    def forward_momentum(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Make the targets of a view."""
        *maps, features = self.backbone_momentum(x).values()
        z = self.projection_head_momentum(features)
        codes = self.quantizer(maps)
        return z, self.fusion(z, codes.quantized), codes.commitment_loss


def main(steps: int = 20) -> tuple[list[float], Model]:
    """Train for some steps; return the losses and the model."""
    torch.manual_seed(0)
    model = Model()
    criterion = DiSSECTObjective()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for step, (x0, x1) in enumerate(pairs(steps, size=48, channels=3)):
        momentum = cosine_schedule(step, steps, 0.99, 1.0)
        update_momentum(model.backbone, model.backbone_momentum, m=momentum)
        update_momentum(model.projection_head, model.projection_head_momentum, m=momentum)
        p0, p1 = model(x0), model(x1)
        (z0, s0, c0), (z1, s1, c1) = model.forward_momentum(x0), model.forward_momentum(x1)
        loss = criterion([p0, p1], [z0, z1], [s0, s1], (c0 + c1) / 2).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, model


if __name__ == "__main__":
    losses, model = main()
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")
    print("perplexity", [f"{usage.perplexity:.0f}" for usage in model.quantizer.usage()])
