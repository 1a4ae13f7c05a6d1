"""A VQ-VAE on X-rays."""

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from examples.drop_in.data import pairs
from vqssl import EMACodebook


class Model(nn.Module):
    """Convolutional VQ-VAE."""

    def __init__(self, codebook_size: int = 64, dim: int = 16) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 32, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, dim, 4, stride=2, padding=1),
            nn.BatchNorm2d(dim),
        )
        self.codebook = EMACodebook(codebook_size=codebook_size, dim=dim)
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(dim, 32, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(32, 1, 4, stride=2, padding=1),
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the reconstruction, the indices and the loss of the codes."""
        z = self.encoder(images).movedim(1, -1)
        quantized, indices, loss = self.codebook(z)
        return self.decoder(quantized.movedim(-1, 1)), indices, loss


def main(steps: int = 20) -> tuple[list[float], Model]:
    """Train for some steps; return the losses and the model."""
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for images, _ in pairs(steps, batch=32):
        reconstructed, _, loss = model(images)
        loss = loss + mse_loss(reconstructed, images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, model


if __name__ == "__main__":
    losses, model = main()
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")
    print(f"perplexity {model.codebook.usage().perplexity:.0f}")
