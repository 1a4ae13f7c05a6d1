"""MoCo's queue of keys (arXiv 1911.05722): the negatives of the next batches."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.pretrain import ranks


class KeyQueue(nn.Module):
    """The latest keys, of length 1, in a ring `(Q, D)`; random directions until there are as many.

    All ranks put in the keys of all ranks, so that their queues stay equal.

    >>> queue = KeyQueue(3, 2)
    >>> queue.put(torch.tensor([[2.0, 0.0], [0.0, 2.0]]))
    >>> queue.keys[:2].tolist(), queue.position.item()
    ([[1.0, 0.0], [0.0, 1.0]], 2)
    """

    keys: Tensor
    position: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("keys", F.normalize(torch.randn(size, dim), dim=1))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def put(self, keys: Tensor) -> None:
        """Replace the oldest keys by `(B, D)` new ones; of more than Q, the last Q."""
        new = F.normalize(ranks.concatenated(keys), dim=1)[-len(self.keys) :].to(self.keys.dtype)  # from autocast
        self.keys[(self.position + torch.arange(len(new), device=new.device)) % len(self.keys)] = new
        self.position.add_(len(new)).remainder_(len(self.keys))
