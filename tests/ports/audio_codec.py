"""An audio codec with a residual quantiser of vqssl."""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import l1_loss

from vqssl import ChannelsFirst, ResidualQuantizer


class Codec(nn.Module):
    """Convolutions around a residual quantiser; ten samples a frame."""

    def __init__(self, codebook_size: int = 32, dim: int = 16, levels: int = 4, frame_rate: int = 1600) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv1d(1, 32, 10, stride=10), nn.ELU(), nn.Conv1d(32, dim, 3, padding=1))
        residual = ResidualQuantizer(
            dim=dim, codebook_size=codebook_size, num_levels=levels, commitment_weight=1 / levels
        )
        self.quantizer = ChannelsFirst(residual)
        self.kilobits_a_level = math.log2(codebook_size) * frame_rate / 1000
        self.decoder = nn.Sequential(
            nn.Conv1d(dim, 32, 3, padding=1), nn.ELU(), nn.ConvTranspose1d(32, 1, 10, stride=10)
        )

    def forward(self, audio: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the rebuilt audio `(B, 1, N)`, the codes `(levels, B, T)` and the commitment loss."""
        out = self.quantizer(self.encoder(audio))
        return self.decoder(out.quantized), out.indices.movedim(-1, 0), out.commitment_loss

    def encode(self, audio: Tensor, kilobits: float) -> Tensor:
        """Return codes `(levels, B, T)` for a bandwidth in kilobits a second."""
        levels = max(1, int(kilobits / self.kilobits_a_level))
        return self.quantizer.quantize(self.encoder(audio)).indices.movedim(-1, 0)[:levels]

    def decode(self, codes: Tensor) -> Tensor:
        """Return audio of codes of any number of levels."""
        return self.decoder(self.quantizer.lookup(codes.movedim(0, -1)))


def train(model: nn.Module, audio: Tensor, steps: int) -> list[float]:
    """Train for some steps; return the losses."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        rebuilt, _, commitment = model(audio)
        loss = l1_loss(rebuilt, audio) + commitment
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
