"""The update of a codebook in two operators, ``vqssl::next_state`` and ``vqssl::write_state_``, for CUDA.

Between the two lies what belongs to others: the sum over ranks, and the metric. The Triton kernels
(``kernels/codebook_update_triton.py``) run where Triton does; elsewhere the same steps run in PyTorch.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vqssl.distributed import TokenPool
from vqssl.functional.ema_rules import CodebookState, count_weighted_ema
from vqssl.functional.random import distinct_positions
from vqssl.kernels.backends import run_triton
from vqssl.revival import BatchRevival, NoRevival
from vqssl.update_steps import Updatable, finite_statistics, replaced_codes, write_back_

__all__ = ["FusedStep", "can_fuse", "next_state", "write_state_"]

_MODULE = "vqssl.kernels.codebook_update_triton"
_MOST_CODES = 2**14
"""Above it a comparison of all pairs takes longer than a sort."""
_LIVING, _WAITING = -1, -2


def can_fuse(codebook: Updatable) -> bool:
    """Return True if the operators know the codebook's rules and its state is float32 on CUDA.

    >>> import vqssl
    >>> can_fuse(vqssl.EMACodebook(codebook_size=8, dim=4))
    False
    """
    state = (codebook.embed, codebook.cluster_size, codebook.embed_avg, codebook.births, codebook.rng)
    return (
        codebook.embed.is_cuda
        and codebook.embed.dtype == torch.float32
        and len(codebook.embed) <= _MOST_CODES
        and codebook.ema is count_weighted_ema
        and type(codebook.revival) in (BatchRevival, NoRevival)
        and all(tensor.is_contiguous() for tensor in state)
    )


class FusedStep(NamedTuple):
    """A codebook's next state, computed and not yet written."""

    codebook: Updatable
    state: CodebookState
    counts: Tensor
    """``(K,)``: tokens of the batch by code."""
    positions: Tensor
    """``(K,)`` int64: the token drawn for a dead code, -2 where it has to wait, -1 for a living code; or empty."""
    candidates: list[Tensor]
    """This rank's tokens at these positions, ``(K, D)``; no tensor without a revival."""

    @classmethod
    def of(
        cls,
        codebook: Updatable,
        tokens: Tensor,
        indices: Tensor,
        counts: Tensor,
        sums: Tensor,
        total: Tensor | None = None,
        start: Tensor | None = None,
    ) -> "FusedStep":
        """Compute a step from statistics over all ranks.

        Args:
            codebook: one for which :func:`can_fuse` is True.
            tokens: this rank's ``(N, D)``.
            indices: ``(N,)`` int64, -1 where a token does not count.
            counts: ``(K,)``.
            sums: ``(K, D)``.
            total: scalar int64, the tokens of all ranks that count; None if there is one rank.
            start: scalar int64, those of the ranks before this one; None if there is one rank.
        """
        revival = codebook.revival
        threshold = revival.threshold if isinstance(revival, BatchRevival) else None
        embed, cluster_size, embed_avg, counts, positions, candidates = next_state(
            codebook.embed, codebook.cluster_size, codebook.embed_avg, counts, sums, codebook.rng, tokens, indices,
            total, start, codebook.decay, codebook.eps, threshold,
        )  # fmt: skip
        state = CodebookState(embed, cluster_size, embed_avg)
        return cls(codebook, state, counts, positions, [] if threshold is None else [candidates])

    def write_(self, candidates: list[Tensor]) -> None:
        """Write the state, given the candidates of all ranks."""
        codebook, state = self.codebook, self.state
        formed = codebook.as_compared(state.embed)
        has_form_of_its_own = formed is not state.embed
        write_state_(
            codebook.embed, codebook.cluster_size, codebook.embed_avg, codebook.rng, codebook.num_updates,
            codebook.births, formed.contiguous(), state.cluster_size, state.embed_avg, self.counts, self.positions,
            candidates[0] if candidates else state.embed[:0], has_form_of_its_own,
        )  # fmt: skip


def _next_state(
    embed: Tensor, cluster_size: Tensor, embed_avg: Tensor, counts: Tensor, sums: Tensor, rng: Tensor,
    x: Tensor, indices: Tensor, total: Tensor | None, start: Tensor | None,
    decay: float, eps: float, threshold: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return codes, counts and sums after an EMA step, the batch's counts, drawn positions, and tokens there."""
    finite, sums = finite_statistics(counts, sums)
    state = count_weighted_ema(CodebookState(embed, cluster_size, embed_avg), finite, sums, decay, eps)
    finite = finite.clone() if finite is counts else finite  # an operator returns none of its arguments
    if threshold is None:
        return *state, finite, rng.new_empty(0), embed.new_empty(0, embed.shape[1])
    dead = BatchRevival(threshold).dead(state)
    valid = indices >= 0
    positions = distinct_positions(rng, dead, valid.sum() if total is None else total)
    local = positions if start is None else torch.where(positions >= 0, positions - start, _LIVING)
    candidates = TokenPool(x, valid, None).own(local)
    return *state, finite, torch.where(dead & (positions < 0), _WAITING, positions), candidates


next_state = torch.library.custom_op("vqssl::next_state", _next_state, mutates_args=())


@next_state.register_kernel("cuda")
def _(*arguments: Any) -> tuple[Tensor, ...]:
    found = run_triton(_MODULE, "next_state_triton", *arguments)
    return _next_state(*arguments) if found is None else tuple(found)


@next_state.register_fake
def _(
    embed: Tensor, cluster_size: Tensor, embed_avg: Tensor, counts: Tensor, sums: Tensor, rng: Tensor,
    x: Tensor, indices: Tensor, total: Tensor | None, start: Tensor | None,
    decay: float, eps: float, threshold: float | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    size, width = embed.shape
    drawn = 0 if threshold is None else size
    return (
        torch.empty_like(embed), torch.empty_like(cluster_size), torch.empty_like(embed_avg), torch.empty_like(counts),
        rng.new_empty(drawn), embed.new_empty(drawn, width),
    )  # fmt: skip


@dataclass
class _Buffers:
    """The tensors of a codebook, as :func:`vqssl.update.write_back_` takes a codebook."""

    embed: Tensor
    cluster_size: Tensor
    embed_avg: Tensor
    rng: Tensor
    num_updates: Tensor
    births: Tensor
    zero_keeps_place: bool

    def as_compared(self, x: Tensor) -> Tensor:
        """Return codes, which have their form already; a tensor of its own says that zeros have none."""
        return x.view_as(x) if self.zero_keeps_place else x


def _write_state_(
    embed: Tensor, cluster_size: Tensor, embed_avg: Tensor, rng: Tensor, num_updates: Tensor, births: Tensor,
    formed: Tensor, new_size: Tensor, new_avg: Tensor, counts: Tensor, positions: Tensor, candidates: Tensor,
    zero_keeps_place: bool,
) -> None:  # fmt: skip
    """Replace dead codes by their candidates, and write the state if any token counted."""
    state, replaced = CodebookState(formed, new_size, new_avg), None
    if len(positions):
        replaced = replaced_codes(state, positions != _LIVING, positions, candidates)
        state = BatchRevival().replace(state, replaced, candidates)
    buffers = _Buffers(embed, cluster_size, embed_avg, rng, num_updates, births, zero_keeps_place)
    write_back_(buffers, state, counts.any(), replaced)


write_state_ = torch.library.custom_op(
    "vqssl::write_state_",
    _write_state_,
    mutates_args=("embed", "cluster_size", "embed_avg", "rng", "num_updates", "births"),
)


@write_state_.register_kernel("cuda")
def _(*arguments: Any) -> None:
    if run_triton(_MODULE, "write_state_triton", *arguments) is None:
        _write_state_(*arguments)


@write_state_.register_fake
def _(*arguments: Any) -> None:
    pass
