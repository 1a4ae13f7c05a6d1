"""EMATable: a code table that follows the tokens which chose its codes, together with other ranks and other tables."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from vqssl import kernels
from vqssl.checks import by_name, can_read_without_sync, check_code_range, check_indices, check_object, check_range
from vqssl.code_table import CodeTable
from vqssl.distributed import Grouped, TokenPool, all_reduce_sum, rank_counts, slots
from vqssl.functional.ema import EMA_RULES, EMARule
from vqssl.functional.random import random_positions
from vqssl.revival import NoRevival, Revival

__all__ = ["EMATable", "update_together"]


class EMATable(Grouped, CodeTable):
    """Adds to a :class:`CodeTable` what moves it: rule, revival and ranks.

    Args:
        decay, eps, ema, revival, process_group: as of :class:`vqssl.EMACodebook`.
        **table: what :class:`CodeTable` takes.
    """

    def __init__(
        self,
        codebook_size: int,
        dim: int,
        *,
        decay: float,
        eps: float,
        ema: str | EMARule,
        revival: Revival | None,
        process_group: ProcessGroup | None,
        **table: Any,
    ) -> None:
        super().__init__(codebook_size, dim, **table)
        check_range("decay", decay, 0, 1, rule="the share of the old statistics that a step keeps")
        check_range("eps", eps, 0, float("inf"))
        self.decay = decay
        self.eps = eps
        self.ema = by_name("ema", ema, EMA_RULES)
        self.revival = NoRevival() if revival is None else revival
        check_object("revival", self.revival, Revival, "BatchRevival()")
        self.process_group = process_group
        self.frozen = False

    @torch.no_grad()
    def update_(self, x: Tensor, indices: Tensor) -> None:
        """The other half of forward: move the codes towards the tokens that chose them, then revive dead codes.

        Does nothing where the codebook is frozen, and leaves everything as it was where no rank has a valid token.
        Under ``torch.distributed`` all ranks of ``process_group`` have to call it: it holds one all-reduce of
        ``K (D + 1)`` numbers, and another of ``K D`` where there is a revival.

        Args:
            x: tokens ``(*batch, D)``, as given to :meth:`quantize`.
            indices: ``(*batch,)``, what :meth:`quantize` returned; -1 is left out.

        Raises:
            TypeError: ``x`` is no floating or ``indices`` no integer tensor.
            ValueError: the width of ``x`` is not D, the shapes do not fit, or (on CPU) an index is out of range.

        >>> import vqssl
        >>> codebook, x = vqssl.EMACodebook(8, 4), torch.randn(32, 4)
        >>> codebook.initialize_(x)
        >>> codebook.update_(x, codebook.quantize(x).indices)
        >>> round(codebook.cluster_size.sum().item(), 2)  # 0.99 * 8 + 0.01 * 32
        8.24
        """
        self._check(x)
        check_indices("indices", indices, x.shape[:-1], x.device)
        if indices.device.type == "cpu":  # elsewhere it would wait for the device, which has its own assertion
            check_code_range("indices", indices, self.codebook_size)
        flat = x.reshape(-1, self.dim)
        indices = torch.where(kernels.finite_rows(flat), indices.reshape(-1).long(), -1)
        update_together([self], [self._tokens(flat)], [indices])

    def freeze(self, frozen: bool = True) -> "EMATable":
        """Stop updates, initialisation and revival, whatever the mode; ``freeze(False)`` lets them go on.

        Apart from ``.eval()``, which a Trainer may undo at any time. Gradients still reach the tokens. Not part of the
        state dict, as ``requires_grad`` is not.

        >>> import vqssl
        >>> vqssl.EMACodebook(8, 4).freeze().frozen
        True
        """
        self.frozen = frozen
        return self


@torch.no_grad()
def update_together(tables: Sequence[EMATable], tokens: Sequence[Tensor], indices: Sequence[Tensor]) -> None:
    """:meth:`EMATable.update_` for several tables, with as many all-reduces as one table takes: two.

    Args:
        tables: those that are frozen are passed over.
        tokens: per table ``(..., D)``, as they are compared: of length 1 where the metric is cosine.
        indices: per table ``(...)``, -1 where a token is masked or not finite.
    """
    steps = [
        _Step(table, z.reshape(-1, table.dim), k.reshape(-1))
        for table, z, k in zip(tables, tokens, indices, strict=True)
        if not table.frozen
    ]
    # Tables usually share their group. Frozen or not and whose group: the same on all ranks.
    while steps:
        group = steps[0].table.process_group
        together = [step for step in steps if step.table.process_group is group]
        steps = [step for step in steps if step.table.process_group is not group]
        for step, summed in zip(together, _reduced([s.statistics() for s in together], group), strict=True):
            step.move(*summed)
        for step, summed in zip(together, _reduced([s.candidates() for s in together], group), strict=True):
            step.finish(*summed)


def _reduced(parts: Sequence[Sequence[Tensor]], group: ProcessGroup | None) -> list[list[Tensor]]:
    """The sums over ranks of what each step hands in, in one call for all; none where nobody hands in anything."""
    flat = [tensor for part in parts for tensor in part]
    summed = iter(all_reduce_sum(flat, group) if flat else [])
    return [[next(summed) for _ in part] for part in parts]


class _Step:
    """One update of one table, in the pieces between which ranks add up what they have."""

    def __init__(self, table: EMATable, tokens: Tensor, indices: Tensor) -> None:
        self.table = table
        state = table.embed.dtype
        if torch.finfo(tokens.dtype).max > torch.finfo(state).max:
            # What is finite in float64 alone: revival would make a code of it.
            indices = torch.where(kernels.finite_rows(tokens.to(state)), indices, -1)
        self.tokens = tokens.to(state)
        self.indices = indices

    def statistics(self) -> list[Tensor]:
        """Of this rank: tokens by code, their sums, and how many there are."""
        counts, sums = kernels.code_sums(self.tokens, self.indices, self.table.codebook_size)
        valid = (self.indices >= 0).sum()
        return [counts, sums, slots(valid, sums.dtype, self.table.process_group)]

    def move(self, counts: Tensor, sums: Tensor, summed_slots: Tensor) -> None:
        """Take the statistics of all ranks in."""
        table = self.table
        self.pool = TokenPool(self.tokens, self.indices >= 0, rank_counts(summed_slots), table.process_group)
        # A sum that overflowed would stay for ever: its code sits this step out.
        sound = kernels.finite_rows(sums)
        counts, sums = torch.where(sound, counts, 0.0), sums.masked_fill(~sound[:, None], 0.0)
        self.any = counts.sum() > 0
        self.state = table.ema(table._state(), counts, sums, table.decay, table.eps)
        self.dead = table.revival.dead(self.state)

    def candidates(self) -> list[Tensor]:
        """Of this rank: its part of the tokens that dead codes may become, one for each code, dead or not.

        Over ranks the shape must not depend on what died, and a device is not asked.
        """
        if self.dead is None or (self.pool.is_local and can_read_without_sync(self.dead) and not self.dead.any()):
            self.dead = None
            return []
        positions = random_positions(self.table.rng, self.table.codebook_size, self.pool.total)
        return [self.pool.own(positions)]

    def finish(self, candidates: Tensor | None = None) -> None:
        """Revive, and write the new state unless nobody had a token."""
        if self.dead is not None and candidates is not None:
            dead = self.dead & (self.pool.total > 0)
            self.state = self.table.revival.replace(self.state, dead, candidates)
        self.table._write(self.state, self.any)
