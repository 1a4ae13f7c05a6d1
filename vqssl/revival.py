"""Revivals: small objects that replace dead codes after each update of an EMACodebook."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from vqssl.checks import check_range
from vqssl.functional.ema_rules import CodebookState

__all__ = ["BatchRevival", "NoRevival", "Revival"]


@runtime_checkable
class Revival(Protocol):
    """A revival, as EMACodebook calls it.

    >>> issubclass(BatchRevival, Revival)
    True
    """

    def dead(self, state: CodebookState) -> Tensor | None:
        """Return which codes to replace after this update, ``(K,)`` bool; None if none ever is.

        It must depend on the state alone, which is equal on all ranks.
        """
        ...

    def replace(self, state: CodebookState, dead: Tensor, tokens: Tensor) -> CodebookState:
        """Return the state with ``tokens`` in place of the dead codes.

        Args:
            state: after the EMA step.
            dead: ``(K,)`` bool.
            tokens: ``(K, D)``, drawn from the batch over all ranks.
        """
        ...


@dataclass(frozen=True)
class NoRevival:
    """A revival that leaves dead codes dead.

    >>> import vqssl
    >>> codebook = vqssl.EMACodebook(codebook_size=8, dim=4, revival=vqssl.NoRevival())
    """

    def dead(self, state: CodebookState) -> None:
        """Return None: no code is ever replaced."""

    def replace(self, state: CodebookState, dead: Tensor, tokens: Tensor) -> CodebookState:
        """Return the state as it is."""
        return state


@dataclass(frozen=True)
class BatchRevival:
    r"""A revival that replaces each dead code by a token of the current batch, drawn over all ranks.

    Code k is dead where its running count is a small fraction of the fair share, so that the threshold means the same
    for every batch size and codebook size:

    .. math:: N_k < \tau \cdot \textstyle\sum N / K

    A revived code gets the fair share as its count, which leaves it some 1 / (1 - decay) steps to find tokens. Its sum
    is set to match. All counts and sums are then scaled so that their total does not change.

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
        """Return the codes below the threshold, ``(K,)`` bool; of stacked states ``(..., K)``."""
        share = state.cluster_size.mean(-1, keepdim=True)
        return state.cluster_size < self.threshold * share

    def replace(self, state: CodebookState, dead: Tensor, tokens: Tensor) -> CodebookState:
        """Return the state with ``tokens`` ``(K, D)`` in place of the dead codes."""
        total = state.cluster_size.sum()
        share = total / len(state.cluster_size)
        cluster_size = torch.where(dead, share, state.cluster_size)
        embed = torch.where(dead[:, None], tokens, state.embed)
        embed_avg = torch.where(dead[:, None], tokens * share, state.embed_avg)
        # Not scaled where nothing died: scaling would add rounding to every step.
        scale = torch.where(dead.any(), total / cluster_size.sum(), 1.0)
        return CodebookState(embed, cluster_size * scale, embed_avg * scale)
