"""The steps of an update: statistics, EMA, replacement of dead codes, write-back.

They are public under :mod:`vqssl.update`, which puts them together.
"""

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from vqssl import kernels
from vqssl.checks import can_read_without_sync
from vqssl.distributed import TokenPool, slots
from vqssl.functional.ema_rules import CodebookState, EMARule
from vqssl.functional.random import distinct_positions
from vqssl.kernels.repeats import repeated_rows
from vqssl.revival import Revival

__all__ = [
    "Statistics",
    "Updatable",
    "Writable",
    "batch_statistics",
    "ema_of",
    "ema_step",
    "finite_statistics",
    "replaced_codes",
    "replacement_positions",
    "without_overflow",
    "write_back_",
]


class Writable(Protocol):
    """Attributes that :func:`write_back_` reads and writes."""

    embed: Tensor
    cluster_size: Tensor
    embed_avg: Tensor
    rng: Tensor
    num_updates: Tensor
    births: Tensor

    def as_compared(self, x: Tensor) -> Tensor:
        """Return tokens or codes in the form in which the metric compares them."""
        ...


class Updatable(Writable, Protocol):
    """Attributes that :func:`update_codebooks` reads and writes; :class:`vqssl.EMACodebook` has them."""

    decay: float
    eps: float
    ema: EMARule
    revival: Revival
    frozen: bool

    @property
    def process_group(self) -> ProcessGroup | None:
        """The ranks that share the codes."""
        ...


class Statistics(NamedTuple):
    """Sums over a batch, each of which may be summed over ranks.

    >>> import torch
    >>> Statistics(torch.zeros(4), torch.zeros(4, 2), torch.zeros(1, 2)).sums.shape
    torch.Size([4, 2])
    """

    counts: Tensor
    """``(K,)``: tokens by code."""
    sums: Tensor
    """``(K, D)``: the sum of these tokens."""
    slots: Tensor
    """``(world_size, 2)``: how many valid tokens each rank has, see :func:`vqssl.distributed.slots`."""


def batch_statistics(
    tokens: Tensor, indices: Tensor, codebook_size: int, group: ProcessGroup | None = None
) -> Statistics:
    """Return this rank's counts and sums by code.

    Args:
        tokens: ``(N, D)``.
        indices: ``(N,)`` int64, -1 where a token does not count.
        codebook_size: K.
        group: the ranks over which the result is going to be summed.

    >>> import torch
    >>> batch_statistics(torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([1, 1, -1]), 3).sums.tolist()
    [[0.0], [3.0], [0.0]]
    """
    counts, sums = kernels.code_sums(tokens, indices, codebook_size)
    return Statistics(counts, sums, slots((indices >= 0).sum(), sums.dtype, group))


def without_overflow(statistics: Statistics) -> Statistics:
    """Return the statistics without the codes whose sum is not finite: in a running average it would stay for ever.

    >>> import torch
    >>> sums = torch.tensor([[3e38], [float("inf")]])
    >>> without_overflow(Statistics(torch.tensor([1.0, 2.0]), sums, torch.zeros(1, 2))).counts.tolist()
    [1.0, 0.0]
    """
    counts, sums = finite_statistics(statistics.counts, statistics.sums)
    return statistics._replace(counts=counts, sums=sums)


def finite_statistics(counts: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """Return counts ``(..., K)`` and sums ``(..., K, D)`` with zeros for the codes whose sum is not finite.

    >>> finite_statistics(torch.tensor([1.0, 2.0]), torch.tensor([[3e38], [float("inf")]]))[1].tolist()
    [[3.0000000054977558e+38], [0.0]]
    """
    if can_read_without_sync(sums) and math.isfinite(sums.sum().item()):
        return counts, sums
    finite = kernels.finite_rows(sums)
    return torch.where(finite, counts, 0.0), sums.masked_fill(~finite[..., None], 0.0)


def ema_step(codebook: Updatable, statistics: Statistics) -> CodebookState:
    """Return the codebook's state after one step of its EMA rule, without writing it.

    Raises:
        TypeError: the rule does not return a :class:`vqssl.functional.CodebookState` of the same shapes.

    >>> import torch, vqssl
    >>> codebook = vqssl.EMACodebook(codebook_size=2, dim=1, decay=0.5)
    >>> ema_step(codebook, Statistics(torch.tensor([3.0, 1.0]), torch.zeros(2, 1), torch.zeros(1, 2))).cluster_size
    tensor([2., 1.])
    """
    state = CodebookState(codebook.embed, codebook.cluster_size, codebook.embed_avg)
    return ema_of(codebook, state, statistics.counts, statistics.sums)


def ema_of(codebook: Updatable, state: CodebookState, counts: Tensor, sums: Tensor) -> CodebookState:
    """Return a state after one step of the codebook's EMA rule: its own state, or that of several stacked ones.

    Args:
        codebook: whose rule, decay and eps count.
        state: as the rule takes it; the rules of this library also take leading axes.
        counts: ``(..., K)``.
        sums: ``(..., K, D)``.

    Raises:
        TypeError: as :func:`ema_step`.

    >>> import torch, vqssl
    >>> codebook = vqssl.EMACodebook(codebook_size=2, dim=1, decay=0.5)
    >>> ema_of(codebook, codebook.state(), torch.tensor([3.0, 1.0]), torch.zeros(2, 1)).cluster_size
    tensor([2., 1.])
    """
    new = codebook.ema(state, counts, sums, codebook.decay, codebook.eps)
    shapes = [tuple(tensor.shape) for tensor in state]
    if not isinstance(new, CodebookState) or [tuple(tensor.shape) for tensor in new] != shapes:
        found = [tuple(tensor.shape) for tensor in new] if isinstance(new, CodebookState) else type(new).__name__
        raise TypeError(
            f"ema must return a CodebookState of shapes {shapes}, got {found}: write return state._replace(embed=...)"
        )
    return new


def replacement_positions(codebook: Updatable, pool: TokenPool, dead: Tensor | None) -> Tensor | None:
    """Return which token of the pool each dead code may become, ``(K,)`` int64, or None if none is needed.

    No token is given twice: equal codes would stay equal, since the lowest index wins all their tokens. With fewer
    tokens than dead codes the others wait, with -1. The positions are drawn by the codebook's own generator and are
    equal on all ranks. Over several ranks the shape must not depend on what died, and reading ``dead`` would
    synchronise a GPU: then there are always K.

    Args:
        codebook: whose generator draws.
        pool: the valid tokens of all ranks.
        dead: ``(K,)`` bool, or None where no code is ever replaced.

    >>> import torch, vqssl
    >>> codebook, x = vqssl.EMACodebook(codebook_size=4, dim=2), torch.randn(3, 2)
    >>> pool = vqssl.distributed.gather_pool(x, torch.ones(3, dtype=torch.bool))
    >>> replacement_positions(codebook, pool, torch.ones(4, dtype=torch.bool)).sort().values
    tensor([-1,  0,  1,  2])
    """
    if dead is None or (pool.is_local and can_read_without_sync(dead) and not dead.any()):
        return None
    return distinct_positions(codebook.rng, dead, pool.total)


def replaced_codes(state: CodebookState, dead: Tensor, positions: Tensor, tokens: Tensor) -> Tensor:
    """Return which dead codes become the token drawn for them, ``(K,)`` bool.

    All that have one, unless it equals a living code or an earlier one of these tokens.

    Args:
        state: after the EMA step.
        dead: ``(K,)`` bool.
        positions: ``(K,)``, from :func:`replacement_positions`.
        tokens: ``(K, D)``, the tokens at these positions.

    >>> import torch
    >>> state = CodebookState(torch.tensor([[1.0], [2.0], [3.0]]), torch.ones(3), torch.ones(3, 1))
    >>> dead, tokens = torch.tensor([False, True, True]), torch.tensor([[0.0], [1.0], [5.0]])
    >>> replaced_codes(state, dead, torch.tensor([-1, 0, 1]), tokens).tolist()
    [False, False, True]
    """
    drawn = positions >= 0
    repeats = repeated_rows(torch.cat([state.embed, tokens]), torch.cat([~dead, drawn]))
    return drawn & ~repeats[len(dead) :]


@torch.no_grad()
def write_back_(codebook: Writable, state: CodebookState, where: Tensor | bool, replaced: Tensor | None = None) -> None:
    """Write a new state into the codebook's buffers and count update and births, if the scalar ``where`` is True.

    Codes are brought into the form in which the metric compares them. A code that has none there (tokens that cancel
    out have no direction), or that is not finite, keeps its place.

    Args:
        codebook: whose buffers are written.
        state: as :func:`ema_step` or a revival returned it.
        where: scalar bool, or a Python bool where it is known; a GPU is not synchronised for it.
        replaced: ``(K,)`` bool, from :func:`replaced_codes`: whose births are counted, unless they keep their place.
            None: no revival.

    >>> import torch, vqssl
    >>> codebook = vqssl.EMACodebook(codebook_size=2, dim=1)
    >>> write_back_(codebook, codebook.state()._replace(embed=torch.zeros(2, 1)), torch.tensor(True))
    >>> codebook.embed.tolist(), codebook.num_updates.item()
    ([[0.0], [0.0]], 1)
    """
    can_read = isinstance(where, bool) or can_read_without_sync(where)
    if can_read and not where:
        return
    embed = codebook.as_compared(state.embed)
    if embed is not state.embed:  # the euclidean metric returns its argument: there a code may be zero
        formed = (embed != 0).any(-1)
        embed = torch.where(formed[:, None], embed, codebook.embed)
        replaced = None if replaced is None else replaced & formed
    state = state._replace(embed=embed)
    if can_read:
        total = (embed.sum() + state.embed_avg.sum()).item()
        rows = None if math.isfinite(total) else _finite_rows(state)
    else:
        rows = _finite_rows(state) & where
    if rows is not None:
        state = _rows_where(rows, state, codebook)
        replaced = None if replaced is None else replaced & rows
    codebook.embed.copy_(state.embed)
    codebook.cluster_size.copy_(state.cluster_size)
    codebook.embed_avg.copy_(state.embed_avg)
    codebook.rng[1:].add_(where)
    if replaced is not None:
        codebook.births.add_(replaced)
    # add_, not +=: an assignment to a buffer would be a side effect of a compiled graph.
    known = codebook.num_updates >= 0
    codebook.num_updates.add_(known if where is True else known & where)


def _finite_rows(state: CodebookState) -> Tensor:
    # Near the largest float32, count times code overflows.
    return kernels.finite_rows(state.embed) & kernels.finite_rows(state.embed_avg)


def _rows_where(rows: Tensor, state: CodebookState, codebook: Writable) -> CodebookState:
    """Return the new rows where ``rows`` ``(K,)`` is True, the codebook's own elsewhere."""
    return CodebookState(
        torch.where(rows[:, None], state.embed, codebook.embed),
        torch.where(rows, state.cluster_size, codebook.cluster_size),
        torch.where(rows[:, None], state.embed_avg, codebook.embed_avg),
    )
