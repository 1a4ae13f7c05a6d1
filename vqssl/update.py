"""The update of codebooks: statistics, EMA, revival and write-back.

:func:`update_codebooks` puts the steps together; each is public, so that a quantiser of another shape can use them.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from vqssl import kernels
from vqssl.checks import can_read_without_sync, check_code_range, check_device, check_indices, check_tokens
from vqssl.distributed import TokenPool, all_reduce_sum, rank_counts, slots
from vqssl.functional.ema_rules import CodebookState, EMARule
from vqssl.functional.random import distinct_positions
from vqssl.kernels.repeats import repeated_rows
from vqssl.revival import Revival

__all__ = [
    "Statistics",
    "Updatable",
    "batch_statistics",
    "ema_step",
    "replaced_codes",
    "replacement_positions",
    "update_codebooks",
    "without_overflow",
    "write_back_",
]


class Updatable(Protocol):
    """Attributes that :func:`update_codebooks` reads and writes; :class:`vqssl.EMACodebook` has them."""

    embed: Tensor
    cluster_size: Tensor
    embed_avg: Tensor
    rng: Tensor
    num_updates: Tensor
    births: Tensor
    decay: float
    eps: float
    ema: EMARule
    revival: Revival
    frozen: bool

    @property
    def process_group(self) -> ProcessGroup | None:
        """The ranks that share the codes."""
        ...

    def as_compared(self, x: Tensor) -> Tensor:
        """Return tokens or codes in the form in which the metric compares them."""
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


@torch.no_grad()
def update_codebooks(
    codebooks: Sequence[Updatable], tokens: Sequence[Tensor], indices: Sequence[Tensor], *, compared: bool = False
) -> None:
    """Move the codes of several codebooks towards the tokens that chose them, then replace dead codes.

    All codebooks of a process group share two all-reduces: one of their statistics, and one of replacement candidates
    where there is a revival. Every rank has to call it equally often. Nothing changes where a codebook is frozen, or
    where no rank has a valid token.

    Args:
        codebooks: C of them, each once.
        tokens: for each codebook ``(*batch, D)``, as given to its ``quantize``.
        indices: for each codebook ``(*batch,)``, as ``quantize`` returned them: -1 where masked or not finite.
        compared: True if the tokens are what ``codebook.as_compared`` returned, and the indices those of the search.
            Nothing is checked then.

    Raises:
        TypeError: tokens are not floating or indices not integer tensors.
        ValueError: the three sequences differ in length, shapes or devices do not fit, or (on CPU) an index is out of
            range.

    >>> import torch, vqssl
    >>> codebooks = [vqssl.EMACodebook(codebook_size=8, dim=4, seed=seed) for seed in range(2)]
    >>> x = torch.randn(32, 4)
    >>> for codebook in codebooks:
    ...     codebook.initialize_(x)
    >>> update_codebooks(codebooks, [x, x], [codebook.quantize(x).indices for codebook in codebooks])
    >>> [codebook.num_updates.item() for codebook in codebooks]
    [1, 1]
    """
    if not compared:
        _check(codebooks, tokens, indices)
    batches = [
        _batch(codebook, z if compared else codebook.as_compared(z), k)
        for codebook, z, k in zip(codebooks, tokens, indices, strict=True)
        if not codebook.frozen
    ]
    # Usually one group. Which codebooks are frozen and who shares a group is the same on all ranks.
    while batches:
        group = batches[0].codebook.process_group
        _update_group([batch for batch in batches if batch.codebook.process_group is group], group)
        batches = [batch for batch in batches if batch.codebook.process_group is not group]


class _Batch(NamedTuple):
    """Tokens ``(N, D)`` in the dtype of the state, and their codes ``(N,)``."""

    codebook: Updatable
    tokens: Tensor
    indices: Tensor


def _batch(codebook: Updatable, tokens: Tensor, indices: Tensor) -> _Batch:
    tokens, indices = tokens.reshape(-1, tokens.shape[-1]), indices.reshape(-1).long()
    state = codebook.embed.dtype
    if torch.finfo(tokens.dtype).max > torch.finfo(state).max:
        # A token may be finite in float64 only; a revival could copy it into a code.
        indices = torch.where(kernels.finite_rows(tokens.to(state)), indices, -1)
    return _Batch(codebook, tokens.to(state), indices)


def _update_group(batches: Sequence[_Batch], group: ProcessGroup | None) -> None:
    own = [batch_statistics(z, k, len(codebook.embed), group) for codebook, z, k in batches]
    statistics = [without_overflow(Statistics(*summed)) for summed in _sum_over_ranks(own, group)]
    pools = [
        TokenPool(batch.tokens, batch.indices >= 0, rank_counts(each.slots), group)
        for batch, each in zip(batches, statistics, strict=True)
    ]
    states = [ema_step(batch.codebook, each) for batch, each in zip(batches, statistics, strict=True)]
    dead = [batch.codebook.revival.dead(state) for batch, state in zip(batches, states, strict=True)]
    positions = [
        replacement_positions(batch.codebook, pool, is_dead)
        for batch, pool, is_dead in zip(batches, pools, dead, strict=True)
    ]
    own_candidates = [[] if drawn is None else [pool.own(drawn)] for pool, drawn in zip(pools, positions, strict=True)]
    candidates = _sum_over_ranks(own_candidates, group)
    for batch, each, state, is_dead, drawn, tokens in zip(
        batches, statistics, states, dead, positions, candidates, strict=True
    ):
        replaced = None
        if is_dead is not None and drawn is not None:
            replaced = replaced_codes(state, is_dead, drawn, tokens[0])
            state = batch.codebook.revival.replace(state, replaced, tokens[0])
        write_back_(batch.codebook, state, each.counts.sum() > 0, replaced)


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
    finite = kernels.finite_rows(statistics.sums)
    return statistics._replace(
        counts=torch.where(finite, statistics.counts, 0.0),
        sums=statistics.sums.masked_fill(~finite[:, None], 0.0),
    )


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
    new = codebook.ema(state, statistics.counts, statistics.sums, codebook.decay, codebook.eps)
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
def write_back_(codebook: Updatable, state: CodebookState, where: Tensor, replaced: Tensor | None = None) -> None:
    """Write a new state into the codebook's buffers and count update and births, if the scalar ``where`` is True.

    Codes are brought into the form in which the metric compares them. A code that has none there (tokens that cancel
    out have no direction), or that is not finite, keeps its place.

    Args:
        codebook: whose buffers are written.
        state: as :func:`ema_step` or a revival returned it.
        where: scalar bool; a GPU is not synchronised for it.
        replaced: ``(K,)`` bool, from :func:`replaced_codes`: whose births are counted, unless they keep their place.
            None: no revival.

    >>> import torch, vqssl
    >>> codebook = vqssl.EMACodebook(codebook_size=2, dim=1)
    >>> write_back_(codebook, codebook.state()._replace(embed=torch.zeros(2, 1)), torch.tensor(True))
    >>> codebook.embed.tolist(), codebook.num_updates.item()
    ([[0.0], [0.0]], 1)
    """
    embed = codebook.as_compared(state.embed)
    if embed is not state.embed:  # the euclidean metric returns its argument: there a code may be zero
        formed = embed.norm(dim=-1) > 0
        embed = torch.where(formed[:, None], embed, codebook.embed)
        replaced = None if replaced is None else replaced & formed
    state = state._replace(embed=embed)
    if can_read_without_sync(where):
        if not where:
            return
        rows = None if torch.isfinite(embed.sum() + state.embed_avg.sum()) else _finite_rows(state)
    else:
        rows = _finite_rows(state) & where
    if rows is not None:
        state = _rows_where(rows, state, codebook)
        replaced = None if replaced is None else replaced & rows
    codebook.embed.copy_(state.embed)
    codebook.cluster_size.copy_(state.cluster_size)
    codebook.embed_avg.copy_(state.embed_avg)
    codebook.rng[1] += where.long()
    if replaced is not None:
        codebook.births.add_(replaced)
    # add_, not +=: an assignment to a buffer would be a side effect of a compiled graph.
    codebook.num_updates.add_((where & (codebook.num_updates >= 0)).long())


def _finite_rows(state: CodebookState) -> Tensor:
    # Near the largest float32, count times code overflows.
    return kernels.finite_rows(state.embed) & kernels.finite_rows(state.embed_avg)


def _rows_where(rows: Tensor, state: CodebookState, codebook: Updatable) -> CodebookState:
    """Return the new rows where ``rows`` ``(K,)`` is True, the codebook's own elsewhere."""
    return CodebookState(
        torch.where(rows[:, None], state.embed, codebook.embed),
        torch.where(rows, state.cluster_size, codebook.cluster_size),
        torch.where(rows[:, None], state.embed_avg, codebook.embed_avg),
    )


def _sum_over_ranks(parts: Sequence[Sequence[Tensor]], group: ProcessGroup | None) -> list[list[Tensor]]:
    """Return the sums over ranks of each part's tensors, in one all-reduce; in none where there are no tensors."""
    flat = [tensor for part in parts for tensor in part]
    summed = iter(all_reduce_sum(flat, group) if flat else [])
    return [[next(summed) for _ in part] for part in parts]


def _check(codebooks: Sequence[Updatable], tokens: Sequence[Tensor], indices: Sequence[Tensor]) -> None:
    if not len(codebooks) == len(tokens) == len(indices):
        raise ValueError(
            "codebooks, tokens and indices must have one entry for each codebook, got "
            f"{len(codebooks)}, {len(tokens)} and {len(indices)}: for one codebook write [codebook], [x], [indices]"
        )
    for number, (codebook, z, k) in enumerate(zip(codebooks, tokens, indices, strict=True)):
        check_tokens(f"tokens[{number}]", z, codebook.embed.shape[1])
        check_device(f"tokens[{number}]", z, codebook.embed.device)
        check_indices(f"indices[{number}]", k, z.shape[:-1], codebook.embed.device)
        if k.device.type == "cpu":  # elsewhere it would synchronise; the device has an assertion of its own
            check_code_range(f"indices[{number}]", k, len(codebook.embed))
