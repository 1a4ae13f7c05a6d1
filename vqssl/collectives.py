"""The few torch.distributed calls. Every rank always enters every one, with shapes that do not depend on the data.

Whether there are ranks is asked at call time: a module built before ``init_process_group`` works after it.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

__all__ = ["TokenPool", "all_reduce_sum", "gather_pool", "one_hot_of_rank", "rank_and_world_size"]


def rank_and_world_size(group: ProcessGroup | None = None) -> tuple[int, int]:
    """This process among those of ``group``; (0, 1) where torch.distributed was not initialised."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError("this process is not in the process_group of the module: give every rank its own group")
    return rank, dist.get_world_size(group)


def all_reduce_sum(tensors: Sequence[Tensor], group: ProcessGroup | None = None) -> list[Tensor]:
    """The sums over all ranks, in one call; the tensors themselves where there is one rank."""
    _, world_size = rank_and_world_size(group)
    if world_size == 1:
        return list(tensors)
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    flat = torch.cat([tensor.reshape(-1).to(dtype) for tensor in tensors])
    dist.all_reduce(flat, group=group)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.reshape(tensor.shape).to(tensor.dtype) for part, tensor in zip(parts, tensors, strict=True)]


def one_hot_of_rank(value: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """``(world_size,)`` zeros, but for ``value`` at this rank: summed over ranks, everybody's values.

    float64, so that token counts stay exact when they travel together with sums.
    """
    rank, world_size = rank_and_world_size(group)
    dtype = torch.float32 if value.device.type == "mps" else torch.float64
    slots = torch.arange(world_size, device=value.device)
    return torch.where(slots == rank, value.to(dtype), 0.0)


class TokenPool:
    """The valid tokens of all ranks as one sequence, in rank order.

    Args:
        x: this rank's tokens, ``(N, D)``.
        valid: ``(N,)`` bool.
        per_rank: ``(world_size,)``, how many valid tokens each rank has.
        group: the ranks.
    """

    def __init__(self, x: Tensor, valid: Tensor, per_rank: Tensor, group: ProcessGroup | None = None) -> None:
        rank, world_size = rank_and_world_size(group)
        per_rank = per_rank.round().long()
        self.x = x
        self.valid = valid
        self.group = group
        self.is_local = world_size == 1  # take() enters no collective
        self.total = per_rank.sum()
        self.start = per_rank[:rank].sum()

    def take(self, positions: Tensor) -> Tensor:
        """``(P,) int64 -> (P, D)``: the tokens at ``positions``, alike on all ranks; zeros where there is none."""
        if len(self.x) == 0:
            taken = self.x.new_zeros(len(positions), self.x.shape[1])
        else:
            # The n-th valid token is the first row at which the running count of valid ones exceeds n.
            running = self.valid.long().cumsum(0)
            local = positions - self.start
            row = torch.searchsorted(running, local, right=True).clamp(max=len(self.x) - 1)
            ours = (local >= 0) & (local < running[-1])
            taken = torch.where(ours[:, None], self.x[row], 0.0)
        return all_reduce_sum([taken], self.group)[0]


def gather_pool(x: Tensor, valid: Tensor, group: ProcessGroup | None = None) -> TokenPool:
    """A :class:`TokenPool` of ``(N, D)`` tokens and their ``(N,)`` validity, at the price of one small all-reduce."""
    (per_rank,) = all_reduce_sum([one_hot_of_rank(valid.sum(), group)], group)
    return TokenPool(x, valid, per_rank, group)
