"""An autoencoder of images with a codebook of vqssl."""

import torch
from torch import Tensor, nn
from torch.nn.functional import l1_loss

from vqssl import ChannelsFirst, EMACodebook


class Autoencoder(nn.Module):
    """Convolutions around a quantiser of maps."""

    def __init__(self, codebook_size: int = 64, dim: int = 16) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(1, 32, 4, stride=4), nn.GELU(), nn.Conv2d(32, dim, 1))
        codebook = EMACodebook(
            dim=dim, codebook_size=codebook_size, decay=0.8, commitment_weight=1.0, estimator="rotation"
        )
        self.quantizer = ChannelsFirst(codebook)
        self.decoder = nn.Sequential(nn.Conv2d(dim, 32, 1), nn.GELU(), nn.ConvTranspose2d(32, 1, 4, stride=4))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the rebuilt images, the indices `(B, H, W)` and the commitment loss."""
        quantized, indices, commitment = self.quantizer(self.encoder(images))
        return self.decoder(quantized), indices, commitment


def train(model: nn.Module, images: Tensor, steps: int) -> list[float]:
    """Train for some steps; return the losses."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(steps):
        rebuilt, _, commitment = model(images)
        loss = l1_loss(rebuilt, images) + 10 * commitment
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
