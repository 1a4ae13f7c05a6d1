"""The few torch.distributed calls, sharded tensors included.

Every rank enters every collective, with shapes that do not depend on the data. Ranks are looked up at call time: a
module built before ``init_process_group`` works after it.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

__all__ = [
    "GroupHolder",
    "Grouped",
    "TokenPool",
    "all_reduce_mean_",
    "all_reduce_sum",
    "gather_pool",
    "in_form_of",
    "is_sharded",
    "rank_and_world_size",
    "rank_counts",
    "reshard_",
    "slots",
    "was_sharded",
]

# Two digits of this base hold a token count exactly in float32, up to 2^44.
_BASE = 2**20


class GroupHolder:
    """A holder for a process group, which ``copy`` and ``pickle`` cannot handle.

    A copy shares the group; an unpickled module has the default group.

    >>> import copy
    >>> holder = GroupHolder(None)
    >>> copy.deepcopy(holder) is holder
    True
    """

    def __init__(self, group: ProcessGroup | None = None) -> None:
        self.group = group

    def __deepcopy__(self, memo: dict[int, Any]) -> "GroupHolder":
        return self

    def __reduce__(self) -> tuple[type["GroupHolder"], tuple[()]]:
        return GroupHolder, ()


class Grouped:
    """Mixin with the attribute ``process_group``."""

    _group = GroupHolder()

    @property
    def process_group(self) -> ProcessGroup | None:
        """The ranks that share the state; None is the default group. A copy keeps it, a pickled module loses it."""
        return self._group.group

    @process_group.setter
    def process_group(self, group: Any) -> None:
        # `new_group` gives ranks outside of the group a number, which is refused when they take part.
        outside = dist.is_available() and group == dist.GroupMember.NON_GROUP_MEMBER
        if group is not None and not outside and not isinstance(group, ProcessGroup):
            cure = "mesh.get_group()" if hasattr(group, "get_group") else "torch.distributed.new_group(ranks), or None"
            raise TypeError(f"process_group must be a ProcessGroup or None, got {group!r}: write {cure}")
        self._group = GroupHolder(group)


def rank_and_world_size(group: ProcessGroup | None = None) -> tuple[int, int]:
    """Return this process's rank in ``group`` and the group's size; (0, 1) if torch.distributed is not initialised."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError("this process is not in the process_group of the module: give every rank its own group")
    return rank, dist.get_world_size(group)


def all_reduce_sum(tensors: Sequence[Tensor], group: ProcessGroup | None = None) -> list[Tensor]:
    """Return the sums over all ranks, in one all-reduce; the tensors themselves if there is one rank."""
    _, world_size = rank_and_world_size(group)
    if world_size == 1:
        return list(tensors)
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    flat = torch.cat([tensor.reshape(-1).to(dtype) for tensor in tensors])
    _all_reduce_(flat, group)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.reshape(tensor.shape).to(tensor.dtype) for part, tensor in zip(parts, tensors, strict=True)]


def _all_reduce_(flat: Tensor, group: ProcessGroup | None) -> None:
    if torch.compiler.is_compiling():
        dist.all_reduce(flat, group=group)
        return
    try:
        dist.all_reduce(flat, group=group)
    except RuntimeError as error:
        rank, world_size = rank_and_world_size(group)
        first = str(error).strip().partition("\n")[0]
        raise RuntimeError(
            f"rank {rank} of {world_size} could not sum statistics over its process_group ({first}): every rank has to "
            "call each module of vqssl in training mode, and MomentumTeacher.update_, equally often and in one order; "
            "look for a rank that stopped, is in eval mode or frozen, or made one call more or less"
        ) from error


@torch.no_grad()
def all_reduce_mean_(tensors: Sequence[Tensor], group: ProcessGroup | None = None) -> None:
    """Replace each tensor by its mean over all ranks, in one all-reduce; do nothing if there is one rank."""
    _, world_size = rank_and_world_size(group)
    if world_size == 1 or not tensors:
        return
    # Divided first, and in float32 at least: the sum of large values overflows in half precision.
    shares = [tensor.to(torch.promote_types(tensor.dtype, torch.float32)) / world_size for tensor in tensors]
    for tensor, mean in zip(tensors, all_reduce_sum(shares, group), strict=True):
        tensor.copy_(mean)


def slots(count: Tensor, dtype: torch.dtype, group: ProcessGroup | None = None) -> Tensor:
    """Return ``(world_size, 2)`` zeros with the two digits of ``count`` in this rank's row.

    Summed over ranks they hold every rank's count, exactly, also in an all-reduce of float32 sums.
    """
    rank, world_size = rank_and_world_size(group)
    own = torch.arange(world_size, device=count.device) == rank
    digits = torch.stack([count // _BASE, count % _BASE]).to(dtype)
    return torch.where(own[:, None], digits, 0.0)


def rank_counts(summed: Tensor) -> Tensor:
    """Return every rank's count, ``(world_size,)`` int64, from the sum over ranks of :func:`slots`."""
    digits = summed.round().long()
    return digits[:, 0] * _BASE + digits[:, 1]


class TokenPool:
    """The valid tokens of all ranks as one sequence, in rank order.

    Args:
        x: this rank's tokens, ``(N, D)``.
        valid: ``(N,)`` bool.
        per_rank: ``(world_size,)`` int64, how many valid tokens each rank has; None if there is one rank.
        group: the ranks.
    """

    def __init__(self, x: Tensor, valid: Tensor, per_rank: Tensor | None, group: ProcessGroup | None = None) -> None:
        rank, world_size = rank_and_world_size(group)
        self.x = x
        self.valid = valid
        self.group = group
        self.is_local = world_size == 1
        self.total = valid.sum() if per_rank is None else per_rank.sum()
        self.start = 0 if per_rank is None else per_rank[:rank].sum()

    def take(self, positions: Tensor) -> Tensor:
        """Return the tokens at ``positions`` ``(P,)``, ``(P, D)``, equal on all ranks; zeros where there is none."""
        return all_reduce_sum([self.own(positions)], self.group)[0]

    def own(self, positions: Tensor) -> Tensor:
        """Return this rank's tokens among those at ``positions`` ``(P,)``, ``(P, D)``; zeros for other ranks'."""
        if len(self.x) == 0:
            return self.x.new_zeros(len(positions), self.x.shape[1])
        # The n-th valid token is the first row at which the running count of valid ones exceeds n.
        running = self.valid.cumsum(0)
        local = positions - self.start
        row = torch.searchsorted(running, local, right=True).clamp(max=len(self.x) - 1)
        ours = (local >= 0) & (local < running[-1])
        return torch.where(ours[:, None], self.x[row], 0.0)


def gather_pool(x: Tensor, valid: Tensor, group: ProcessGroup | None = None) -> TokenPool:
    """Return a :class:`TokenPool` of ``(N, D)`` tokens and their ``(N,)`` validity, after one small all-reduce."""
    (summed,) = all_reduce_sum([slots(valid.sum(), torch.float32, group)], group)
    return TokenPool(x, valid, rank_counts(summed), group)


# ---- sharded tensors (FSDP2), recognised by their methods: importing DTensor takes as long as half of torch ----


def is_sharded(tensor: Tensor) -> bool:
    """Return True for a DTensor, of which each rank holds a part."""
    return hasattr(tensor, "full_tensor")


def was_sharded(module: nn.Module) -> bool:
    """Return True if ``fully_shard`` was called on the module or on a part of it."""
    return any(hasattr(part, "set_reshard_after_backward") for part in module.modules())


def reshard_(*modules: nn.Module) -> None:
    """Free the full parameters that a forward pass gathered: they are temporary copies, and not what is saved."""
    for module in modules:
        for part in module.modules():
            if hasattr(part, "set_reshard_after_backward"):
                part.reshard()  # type: ignore[operator]


def in_form_of(mine: Tensor, leader: Tensor) -> Tensor:
    """Return ``leader`` in the dtype, on the device and in the form (sharded or not) of ``mine``."""
    if is_sharded(leader) and not is_sharded(mine):
        leader = leader.full_tensor()  # type: ignore[attr-defined]
    elif is_sharded(mine) and not is_sharded(leader):
        from torch.distributed.tensor import distribute_tensor

        # Each rank has the whole tensor, and keeps its own part.
        leader = distribute_tensor(leader, mine.device_mesh, mine.placements, src_data_rank=None)  # type: ignore[attr-defined]
    return leader.to(device=mine.device, dtype=mine.dtype)
