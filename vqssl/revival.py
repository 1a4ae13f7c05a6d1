"""What happens to codes that no token chooses any more: small objects that an EMACodebook calls after each update."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from vqssl.checks import check_range, may_ask
from vqssl.collectives import TokenPool
from vqssl.functional.ema import CodebookState
from vqssl.functional.random import random_positions

__all__ = ["BatchRevival", "NoRevival", "Revival"]


@runtime_checkable
class Revival(Protocol):
    """What an EMACodebook asks of a revival.

    >>> issubclass(BatchRevival, Revival)
    True
    """

    def __call__(self, state: CodebookState, pool: TokenPool, rng: Tensor) -> CodebookState:
        """The state after dead codes were replaced, alike on all ranks.

        Every rank calls it after every update, whether or not a code is dead, since it may hold collectives.
        """
        ...


@dataclass(frozen=True)
class NoRevival:
    """Dead codes stay dead.

    >>> import vqssl
    >>> codebook = vqssl.EMACodebook(8, 4, revival=vqssl.NoRevival())
    """

    def __call__(self, state: CodebookState, pool: TokenPool, rng: Tensor) -> CodebookState:
        return state


@dataclass(frozen=True)
class BatchRevival:
    r"""A dead code becomes a token of the current batch, drawn over all ranks.

    Code k is dead where its running count is a small fraction of the fair share, so that the threshold means the same
    for every batch size and codebook size:

    .. math:: N_k < \tau \cdot \textstyle\sum N / K

    A revived code gets the fair share as its count (so that it has some 1 / (1 - decay) steps to find tokens of its
    own), its sum is set to match, and all counts and sums are then scaled so that the total is what it was.

    Args:
        threshold: tau, 0 to 1.

    Raises:
        ValueError: ``threshold`` is outside [0, 1].

    >>> import vqssl
    >>> codebook = vqssl.EMACodebook(8, 4, revival=vqssl.BatchRevival(threshold=0.05))
    """

    threshold: float = 0.1

    def __post_init__(self) -> None:
        check_range("threshold", self.threshold, 0, 1, rule="it is a fraction of the fair share, total count over K")

    def __call__(self, state: CodebookState, pool: TokenPool, rng: Tensor) -> CodebookState:
        total = state.cluster_size.sum()
        share = total / len(state.cluster_size)
        dead = (state.cluster_size < self.threshold * share) & (pool.total > 0)
        if pool.is_local and may_ask(dead) and not dead.any():
            return state
        tokens = pool.take(random_positions(rng, len(state.cluster_size), pool.total)).to(state.embed.dtype)
        cluster_size = torch.where(dead, share, state.cluster_size)
        embed = torch.where(dead[:, None], tokens, state.embed)
        embed_avg = torch.where(dead[:, None], tokens * share, state.embed_avg)
        # Not scaled at all where nothing died: x / x is 1, but scaling every step would add rounding to every step.
        scale = torch.where(dead.any(), total / cluster_size.sum(), 1.0)
        return CodebookState(embed, cluster_size * scale, embed_avg * scale)
