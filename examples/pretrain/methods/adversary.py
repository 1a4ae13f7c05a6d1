"""The two sides of a least-squares adversary (LSGAN, arXiv 1611.04076): what is learnt by it, and what it learns."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def judgement(adversary: nn.Module, restored: Tensor) -> Tensor:
    """Return how far restored images are from 1, "real", to an adversary that gets no gradient (LSGAN)."""
    weights = {name: weight.detach() for name, weight in adversary.named_parameters()}
    return (torch.func.functional_call(adversary, weights, restored)[-1] - 1).square().mean()


def adversary_loss(adversary: nn.Module, restored: Tensor, real: Tensor) -> Tensor:
    """Return the adversary's error: 0 for restored images, which get no gradient, and 1 for real ones (LSGAN)."""
    return (adversary(restored.detach())[-1].square().mean() + (adversary(real)[-1] - 1).square().mean()) / 2
