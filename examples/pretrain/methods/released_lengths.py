"""Lengths of codes as the release of CoBooM (azad6629/coboom at d6a4d2f) averages them."""

from __future__ import annotations

import torch
from torch import Tensor

import vqssl


@torch.no_grad()
def released_lengths(codebook: vqssl.EMACodebook, index_sum: Tensor, indices: Tensor) -> Tensor:
    """Return the lengths `(K,)` of the codes: each sum of tokens over the sum of all indices, where its count belongs.

    Args:
        codebook: its running sums of tokens are used.
        index_sum: the running average of the sum of indices, `()`; updated in place while the codebook trains.
        indices: those of a batch, of any shape.
    """
    if codebook.training:
        index_sum.lerp_(indices.sum().float(), 1 - codebook.decay)
    return codebook.embed_avg.norm(dim=1) / index_sum.clamp_min(1)
