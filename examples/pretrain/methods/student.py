"""The student that several methods share: encoder, projector and predictor."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from examples.pretrain.encoder import Encoder


def mlp(in_dim: int, hidden_dim: int, out_dim: int) -> nn.Sequential:
    """Return BYOL's projector or predictor: Linear, BatchNorm, ReLU, Linear."""
    return nn.Sequential(
        nn.Linear(in_dim, hidden_dim), nn.BatchNorm1d(hidden_dim), nn.ReLU(inplace=True), nn.Linear(hidden_dim, out_dim)
    )


def plain_mlp(in_dim: int, hidden_dim: int, out_dim: int) -> nn.Sequential:
    """Return an MLP without BatchNorm: Linear, ReLU, Linear."""
    return nn.Sequential(nn.Linear(in_dim, hidden_dim), nn.ReLU(inplace=True), nn.Linear(hidden_dim, out_dim))


class Embedded(NamedTuple):
    """The output of encoder and projector."""

    embedding: Tensor
    """z, `(B, D)`."""
    maps: list[Tensor]
    """The encoder's maps, one a scale."""
    features: Tensor
    """The encoder's pooled features, `(B, C)`: the input of the projector."""


class Embedder(nn.Module):
    """Encoder and projector: the part of a student that a teacher copies."""

    def __init__(self, encoder: Encoder, projector: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = projector

    def forward(self, images: Tensor) -> Embedded:
        """Return the embedding of images, and what the encoder returns of them."""
        features, maps = self.encoder(images)
        return Embedded(self.projector(features), maps, features)


class Predicted(NamedTuple):
    """The output of a student."""

    prediction: Tensor
    """p, `(B, D)`."""
    embedding: Tensor
    """z, `(B, D)`: the input of the predictor."""
    maps: list[Tensor]
    """The encoder's maps, one a scale."""
    features: Tensor
    """The encoder's pooled features, `(B, C)`."""


class Student(nn.Module):
    """Encoder, projector and predictor.

    Args:
        encoder: images to features and maps.
        projector: features `(B, C)` to embeddings `(B, D)`.
        predictor: embeddings to predictions `(B, D)`.
    """

    def __init__(self, encoder: Encoder, projector: nn.Module, predictor: nn.Module) -> None:
        super().__init__()
        self.embedder = Embedder(encoder, projector)
        self.predictor = predictor

    def forward(self, images: Tensor) -> Predicted:
        """Return prediction, embedding, maps and features of images `(B, C, S, S)`."""
        embedded = self.embedder(images)
        return Predicted(self.predictor(embedded.embedding), *embedded)
