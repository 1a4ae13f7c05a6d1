"""The update of codebooks: statistics, EMA, revival and write-back.

:func:`update_codebooks` puts the steps together; each is public, so that a quantiser of another shape can use them.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from vqssl import kernels
from vqssl.checks import can_read_without_sync, check_code_range, check_device, check_indices, check_tokens
from vqssl.distributed import TokenPool, all_reduce_sum, rank_and_world_size, rank_counts
from vqssl.functional.ema_rules import EMA_RULES, CodebookState
from vqssl.fused_update import FusedStep, can_fuse
from vqssl.revival import BatchRevival, NoRevival
from vqssl.update_steps import (
    Statistics,
    Updatable,
    batch_statistics,
    ema_of,
    ema_step,
    finite_statistics,
    replaced_codes,
    replacement_positions,
    without_overflow,
    write_back_,
)

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

SMALL = 2**16
"""Most entries of a codebook that is stacked with others: for larger ones the copies take longer than the calls."""


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
    if tokens.ndim != 2:
        tokens, indices = tokens.reshape(-1, tokens.shape[-1]), indices.reshape(-1)
    indices = indices.long()
    state = codebook.embed.dtype
    if torch.finfo(tokens.dtype).max > torch.finfo(state).max:
        # A token may be finite in float64 only; a revival could copy it into a code.
        indices = torch.where(kernels.finite_rows(tokens.to(state)), indices, -1)
    return _Batch(codebook, tokens.to(state), indices)


class _Step(NamedTuple):
    """A codebook's next state, before dead codes are replaced."""

    state: CodebookState
    dead: Tensor | None
    """``(K,)`` bool, or None where no code is going to be replaced."""
    where: Tensor | bool
    """Scalar: whether any rank has a token."""


def _update_group(batches: Sequence[_Batch], group: ProcessGroup | None) -> None:
    is_local = rank_and_world_size(group)[1] == 1
    summed = _sum_over_ranks([_own_statistics(batch, group, count_tokens=not is_local) for batch in batches], group)
    steps = _steps(batches, [(counts, sums) for counts, sums, *_ in summed], is_local=is_local)
    updates: list[FusedStep | _Replacement] = []
    for batch, step, (counts, sums, *slots) in zip(batches, steps, summed, strict=True):
        per_rank = rank_counts(slots[0]) if slots and (step is None or step.dead is not None) else None
        if step is None:
            updates.append(_fused(batch, counts, sums, per_rank, group))
        else:
            updates.append(_replacement(batch, step, per_rank, group))
    candidates = _sum_over_ranks([update.candidates for update in updates], group)
    for update, tokens in zip(updates, candidates, strict=True):
        update.write_(tokens)


def _fused(
    batch: _Batch, counts: Tensor, sums: Tensor, per_rank: Tensor | None, group: ProcessGroup | None
) -> FusedStep:
    if per_rank is None:
        return FusedStep.of(batch.codebook, batch.tokens, batch.indices, counts, sums)
    rank, _ = rank_and_world_size(group)
    return FusedStep.of(*batch, counts, sums, per_rank.sum(), per_rank[:rank].sum())


class _Replacement(NamedTuple):
    """A codebook's next state, and the tokens that its dead codes may become."""

    codebook: Updatable
    step: _Step
    positions: Tensor | None
    candidates: list[Tensor]
    """This rank's tokens ``(K, D)``; none where no code is going to be replaced."""

    def write_(self, candidates: list[Tensor]) -> None:
        """Write the state, given the candidates of all ranks."""
        state, replaced = self.step.state, None
        if self.step.dead is not None and self.positions is not None:
            replaced = replaced_codes(state, self.step.dead, self.positions, candidates[0])
            state = self.codebook.revival.replace(state, replaced, candidates[0])
        write_back_(self.codebook, state, self.step.where, replaced)


def _replacement(batch: _Batch, step: _Step, per_rank: Tensor | None, group: ProcessGroup | None) -> _Replacement:
    if step.dead is None:
        return _Replacement(batch.codebook, step, None, [])
    pool = TokenPool(batch.tokens, batch.indices >= 0, per_rank, group)
    positions = replacement_positions(batch.codebook, pool, step.dead)
    return _Replacement(batch.codebook, step, positions, [] if positions is None else [pool.own(positions)])


def _own_statistics(batch: _Batch, group: ProcessGroup | None, *, count_tokens: bool) -> Sequence[Tensor]:
    """Return this rank's counts and sums, and if asked its number of tokens as :func:`vqssl.distributed.slots`."""
    if count_tokens:
        return batch_statistics(batch.tokens, batch.indices, len(batch.codebook.embed), group)
    return kernels.code_sums(batch.tokens, batch.indices, len(batch.codebook.embed))


def _steps(batches: Sequence[_Batch], summed: Sequence[tuple[Tensor, Tensor]], *, is_local: bool) -> list[_Step | None]:
    """Return the next step of each codebook, None for those of the fused operators.

    Small codebooks that are alike take it together: there a call takes as long as what it computes.
    """
    found: list[_Step | None] = [None] * len(batches)
    likeness = [_likeness(batch.codebook) for batch in batches]
    left = [number for number, batch in enumerate(batches) if not can_fuse(batch.codebook)]
    while left:
        key = likeness[left[0]]
        alike = left[:1] if key is None else [number for number in left if likeness[number] == key]
        steps = _step([batches[number].codebook for number in alike], [summed[number] for number in alike], is_local)
        for number, step in zip(alike, steps, strict=True):
            found[number] = step
        left = [number for number in left if number not in alike]
    return found


def _likeness(codebook: Updatable) -> tuple[object, ...] | None:
    """Return what small codebooks of one step have in common; None where the codebook takes its step alone."""
    embed, revival = codebook.embed, codebook.revival
    if not can_read_without_sync(embed) or embed.numel() > SMALL:
        return None
    if codebook.ema not in EMA_RULES.values() or type(revival) not in (BatchRevival, NoRevival):
        return None  # a function of the user's own takes one codebook
    return embed.shape, embed.dtype, codebook.ema, codebook.decay, codebook.eps, revival


def _step(codebooks: Sequence[Updatable], summed: Sequence[tuple[Tensor, Tensor]], is_local: bool) -> list[_Step]:
    """Return the next step of codebooks that are alike."""
    codebook = codebooks[0]
    stacked = len(codebooks) > 1

    def together(tensors: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(tensors)) if stacked else tensors[0]

    def apart(values: Any) -> Sequence[Any]:
        return values if stacked else [values]

    counts, sums = finite_statistics(*(together(tensors) for tensors in zip(*summed, strict=True)))
    state = CodebookState(*(together([getattr(each, name) for each in codebooks]) for name in CodebookState._fields))
    state = ema_of(codebook, state, counts, sums)
    states = [CodebookState(*tensors) for tensors in zip(*(apart(tensor) for tensor in state), strict=True)]
    has_tokens = counts.any(-1)
    where = apart(has_tokens.tolist() if can_read_without_sync(counts) else has_tokens)
    dead = codebook.revival.dead(state)
    if dead is None:
        return [_Step(each, None, there) for each, there in zip(states, where, strict=True)]
    # Over several ranks the shape of what is summed must not depend on what died.
    known = is_local and can_read_without_sync(dead)
    wanted = apart(dead.any(-1).tolist()) if known else [True] * len(states)
    return [
        _Step(each, is_dead if any_dead else None, there)
        for each, is_dead, any_dead, there in zip(states, apart(dead), wanted, where, strict=True)
    ]


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
