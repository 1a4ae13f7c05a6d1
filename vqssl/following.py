"""A student and the module that follows it: what can be followed, how their tensors pair, and one step."""

import operator
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from vqssl.copying import unwrapped
from vqssl.distributed import is_sharded, was_sharded

__all__ = [
    "Pair",
    "check_can_be_copied",
    "check_count",
    "check_total_steps",
    "checked_copy",
    "has_average",
    "lerp_",
    "named_tensors",
    "paired",
    "step_number",
]


class Pair(NamedTuple):
    """A tensor of the teacher and the student's tensor of the same name."""

    name: str
    mine: Tensor
    theirs: Tensor


def check_can_be_copied(student: nn.Module) -> None:
    """Raise if the student has no parameters, lazy ones, or sharded ones."""
    parameters = dict(student.named_parameters())
    if not parameters:
        raise ValueError(
            f"student must have parameters to follow, {type(student).__name__} has none: pass the module you train"
        )
    lazy = [name for name, parameter in parameters.items() if is_lazy(parameter)]
    if lazy:
        raise ValueError(
            f"student has lazy parameters without a shape, {lazy[0]} the first: run one batch through it, then build "
            "the teacher"
        )
    if was_sharded(student):
        raise ValueError(
            "student must be whole, but fully_shard was called on it, and a sharded module cannot be copied: build "
            "MomentumTeacher(student) first, then shard the student, and teacher.module too where it should be"
        )


def step_number(step: Any) -> int:
    """Return ``step`` as an int; raise if it is not an integer or out of range."""
    if not isinstance(step, int):  # first, so that torch.compile does not trace operator.index
        if not hasattr(step, "__index__"):
            raise TypeError(f"step must be an int, got {step!r}: count optimizer steps, or leave it out")
        step = operator.index(step)
    if not 0 <= step < 2**63 - 1:
        raise ValueError(f"step must be at least 0 and fit 64 bits, got {step}: count from 0")
    return step


def paired(kind: str, ours: Iterator[tuple[str, Tensor]], theirs: Iterator[tuple[str, Tensor]]) -> list[Pair]:
    """Pair tensors of teacher and student by name; raise if a name or a shape differs."""
    mine, other = dict(ours), dict(theirs)
    for name in [*mine, *other]:
        found = [tuple(tensors[name].shape) if name in tensors else "none" for tensors in (mine, other)]
        if found[0] != found[1]:
            raise ValueError(
                f"student must be the module that the teacher was copied from, but its {kind} {name!r} is {found[1]} "
                f"and the teacher's is {found[0]}: build a new MomentumTeacher after changing the student"
            )
    return [Pair(name, tensor, other[name]) for name, tensor in mine.items()]


def lerp_(averages: list[Tensor], targets: list[Tensor], weight: float | Tensor) -> None:
    """Move each average the share ``weight`` of the way to its target."""
    for sharded in (False, True):  # the fused operation takes sharded tensors or whole ones, not both
        mine = [tensor for tensor in averages if is_sharded(tensor) == sharded]
        theirs = [target for tensor, target in zip(averages, targets, strict=True) if is_sharded(tensor) == sharded]
        if isinstance(weight, Tensor):
            for tensor, target in zip(mine, theirs, strict=True):
                tensor.lerp_(target, weight.to(tensor))
        elif mine:
            torch._foreach_lerp_(mine, theirs, weight)


def has_average(tensor: Tensor) -> bool:
    """Return True for numbers that have fractions."""
    return tensor.is_floating_point() or tensor.is_complex()


def named_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Return all parameters and buffers with their names."""
    return [*module.named_parameters(), *module.named_buffers()]


def checked_copy(copy: nn.Module, student: nn.Module) -> nn.Module:
    """Return the module inside ``copy``; raise if it is not a copy of the student of its own."""
    if not isinstance(copy, nn.Module):
        raise TypeError(f"copy must be a torch.nn.Module, got {type(copy).__name__}: leave it out for a deep copy")
    copy = unwrapped(copy)
    for kind, tensors in (("parameter", nn.Module.named_parameters), ("buffer", nn.Module.named_buffers)):
        mine, theirs = dict(tensors(copy)), dict(tensors(student))
        for name in [*mine, *theirs]:
            found = [tuple(each[name].shape) if name in each else "none" for each in (mine, theirs)]
            if found[0] != found[1]:
                wrapped = "none" in found and mine.keys() == {f"module.{each}" for each in theirs}
                cure = "write copy=its .module" if wrapped else "leave copy out for a deep copy"
                raise ValueError(
                    f"copy must have the student's tensors, but its {kind} {name!r} is {found[0]} and the student's is "
                    f"{found[1]}: {cure}"
                )
            if mine[name] is theirs[name]:
                raise ValueError(
                    f"copy must have tensors of its own, but its {kind} {name!r} is the student's: leave copy out for "
                    "a deep copy"
                )
    return copy


def check_total_steps(value: Any) -> None:
    """Raise unless the length of a schedule is an int of at least 0."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"total_steps must be an int, got {value!r}")
    if value < 0:
        raise ValueError(f"total_steps must be at least 0, got {value}: give the number of updates, or None")


def check_count(value: Any) -> None:
    """Raise if the number of updates in a state is negative."""
    if isinstance(value, Tensor) and not value.is_meta and value.numel() == 1 and int(value) < 0:
        raise ValueError(f"num_updates of a state must be at least 0, got {int(value)}: the file is damaged")
