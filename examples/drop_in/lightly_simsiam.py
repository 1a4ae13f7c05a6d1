"""Pretraining on X-rays with lightly's parts for SimSiam."""

import torch
from lightly.loss import NegativeCosineSimilarity
from lightly.models.modules import SimSiamPredictionHead, SimSiamProjectionHead
from torch import Tensor, nn
from torchvision.models import resnet18
from torchvision.models.feature_extraction import create_feature_extractor

from examples.drop_in.data import pairs
from vqssl import MultiScaleQuantizer, SERFFusion


class Model(nn.Module):
    """SimSiam of lightly's parts."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = create_feature_extractor(resnet18(), ["layer2", "layer3", "layer4", "flatten"])
        self.projection_head = SimSiamProjectionHead(512, 512, 128)
        self.prediction_head = SimSiamPredictionHead(128, 64, 128)
        self.quantizer = MultiScaleQuantizer([128, 256, 512], codebook_size=64, dim=128)
        self.fusion = SERFFusion(dim=128, num_scales=3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the prediction and the target of a view."""
        *maps, features = self.backbone(x).values()
        z = self.projection_head(features)
        # The maps make a target, so no gradient may reach the encoder through them.
        codes = self.quantizer([features.detach() for features in maps])
        return self.prediction_head(z), z.detach(), self.fusion(z.detach(), codes.quantized)


def main(steps: int = 20) -> tuple[list[float], Model]:
    """Train for some steps; return the losses and the model."""
    torch.manual_seed(0)
    model = Model()
    criterion = NegativeCosineSimilarity()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    losses = []
    for x0, x1 in pairs(steps, size=48, channels=3):
        p0, z0, s0 = model(x0)
        p1, z1, s1 = model(x1)
        loss = (criterion(p0, z1) + criterion(p1, z0)) / 2
        loss = (loss + (criterion(p0, s1.detach()) + criterion(p1, s0.detach())) / 2) / 2
        loss = loss + (criterion(s0, z0) + criterion(s1, z1)) / 2  # trains the fusion
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, model


if __name__ == "__main__":
    losses, model = main()
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")
    print("perplexity", [f"{usage.perplexity:.0f}" for usage in model.quantizer.usage()])
