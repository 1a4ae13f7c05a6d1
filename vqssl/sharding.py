"""What FSDP2's ``fully_shard`` makes of a module's parameters, for those who follow them.

By methods, not by classes: importing DTensor takes as long as half of torch, and most never shard.
"""

from torch import Tensor, nn

__all__ = ["in_form_of", "is_sharded", "reshard_", "was_sharded"]


def is_sharded(tensor: Tensor) -> bool:
    """Whether this is a DTensor, of which each rank has its part."""
    return hasattr(tensor, "full_tensor")


def was_sharded(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was called on the module or on a part of it."""
    return any(hasattr(part, "set_reshard_after_backward") for part in module.modules())


def reshard_(*modules: nn.Module) -> None:
    """Give back what was gathered for a forward pass: that is a passing copy, and not what is saved."""
    for module in modules:
        for part in module.modules():
            if hasattr(part, "set_reshard_after_backward"):
                part.reshard()  # type: ignore[operator]


def in_form_of(mine: Tensor, leader: Tensor) -> Tensor:
    """``leader`` in the dtype, on the device and, where only one of the two is sharded, in the form of ``mine``."""
    if is_sharded(leader) and not is_sharded(mine):
        leader = leader.full_tensor()  # type: ignore[attr-defined]
    elif is_sharded(mine) and not is_sharded(leader):
        from torch.distributed.tensor import distribute_tensor

        # Each rank has all of it, and takes its own part.
        leader = distribute_tensor(leader, mine.device_mesh, mine.placements, src_data_rank=None)  # type: ignore[attr-defined]
    return leader.to(device=mine.device, dtype=mine.dtype)
