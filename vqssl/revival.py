"""What happens to codes that no token chooses any more: small objects that an EMACodebook asks after each update."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from vqssl.checks import check_range
from vqssl.functional.ema import CodebookState

__all__ = ["BatchRevival", "NoRevival", "Revival"]


@runtime_checkable
class Revival(Protocol):
    """What an EMACodebook asks of a revival.

    >>> issubclass(BatchRevival, Revival)
    True
    """

    def dead(self, state: CodebookState) -> Tensor | None:
        """``(K,)`` bool: which codes are to be replaced after this update; None where none ever is.

        Made of the state alone, which is the same on all ranks.
        """
        ...

    def replace(self, state: CodebookState, dead: Tensor, tokens: Tensor) -> CodebookState:
        """The state with ``tokens`` ``(K, D)``, drawn from the batch over all ranks, in place of the dead codes."""
        ...


@dataclass(frozen=True)
class NoRevival:
    """Dead codes stay dead.

    >>> import vqssl
    >>> codebook = vqssl.EMACodebook(codebook_size=8, dim=4, revival=vqssl.NoRevival())
    """

    def dead(self, state: CodebookState) -> None:
        return None

    def replace(self, state: CodebookState, dead: Tensor, tokens: Tensor) -> CodebookState:
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
    >>> codebook = vqssl.EMACodebook(codebook_size=8, dim=4, revival=vqssl.BatchRevival(threshold=0.05))
    """

    threshold: float = 0.1

    def __post_init__(self) -> None:
        check_range("threshold", self.threshold, 0, 1, rule="it is a fraction of the fair share, total count over K")

    def dead(self, state: CodebookState) -> Tensor:
        share = state.cluster_size.sum() / len(state.cluster_size)
        return state.cluster_size < self.threshold * share

    def replace(self, state: CodebookState, dead: Tensor, tokens: Tensor) -> CodebookState:
        total = state.cluster_size.sum()
        share = total / len(state.cluster_size)
        cluster_size = torch.where(dead, share, state.cluster_size)
        embed = torch.where(dead[:, None], tokens, state.embed)
        embed_avg = torch.where(dead[:, None], tokens * share, state.embed_avg)
        # Not scaled at all where nothing died: x / x is 1, but scaling every step would add rounding to every step.
        scale = torch.where(dead.any(), total / cluster_size.sum(), 1.0)
        return CodebookState(embed, cluster_size * scale, embed_avg * scale)
