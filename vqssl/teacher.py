"""MomentumTeacher: a frozen copy of any module that follows it by momentum."""

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.parameter import is_lazy

from vqssl.checks import check_positive_int, check_range, check_state_fits
from vqssl.copying import detached_copy, unwrapped
from vqssl.distributed import (
    Grouped,
    all_reduce_mean_,
    in_form_of,
    is_sharded,
    rank_and_world_size,
    reshard_,
    was_sharded,
)
from vqssl.functional.schedules import cosine_momentum

__all__ = ["MomentumTeacher"]

BUFFER_POLICIES = ("ema", "copy", "own")


class MomentumTeacher(Grouped, nn.Module):
    r"""A copy of the student that never gets a gradient and follows the student's weights slowly.

    .. math:: \xi \leftarrow m_t\, \xi + (1 - m_t)\, \theta, \qquad
        m_t = m_T - (m_T - m_0) \cdot \tfrac{1}{2} \big( \cos(\pi t / T) + 1 \big)

    (BYOL, arXiv 2006.07733; DiSSECT, arXiv 2509.18765.) It starts as an exact copy, keeps no reference to the student,
    and is called like the student. Call :meth:`update_` once after each optimizer step.

    Integer and boolean buffers are copied from the student. What becomes of floating buffers, such as BatchNorm's
    running statistics, is ``buffers``:

    - ``"ema"`` (default): they follow the student's by the same momentum. In eval mode the teacher's statistics then
      belong to its weights, however old those are; in training mode the teacher's own forward passes update them as
      well, and dominate. Under ``torch.distributed`` they are then averaged over the ranks, each of which saw other
      images: one all-reduce, so that all ranks have one teacher.
    - ``"copy"``: they become the student's at each update, averaged likewise.
    - ``"own"``: ``update_`` leaves all buffers alone; only the teacher's own forward passes in training mode move them.
      This is what lightly and solo-learn do. A teacher kept in eval mode would then keep its first statistics for
      ever.

    Args:
        student: any module with parameters, also wrapped in DistributedDataParallel or ``torch.compile``.
        momentum: m_0, or m throughout where ``total_steps`` is None.
        final_momentum: m_T.
        total_steps: T, the number of updates over which the momentum goes from m_0 to m_T; None keeps m_0.
        buffers: see above.
        process_group: the ranks over which buffers are averaged; None is the default group, asked for at call time.

    Shape:
        That of the student.

    Sharded students (FSDP2's ``fully_shard``): build the teacher first, then shard the student, and either shard the
    teacher's ``module`` alike, so that each rank updates its own part, or leave it whole: ``update_`` then gathers the
    student's weights, and every rank has to call it.

    The number of updates so far is part of the state dict (as "extra state", a plain int), so a resumed run continues
    the schedule where it was.

    Raises:
        TypeError: ``student`` is no module.
        ValueError: the student has no parameters, lazy ones that have no shape yet, or was sharded by ``fully_shard``;
            it keeps a list of tensors with a graph as an attribute; an argument is out of range.

    Warns:
        UserWarning: the student keeps a view of a parameter as an attribute, which in the copy does not follow it.
            A view that was detached cannot be told from any other tensor.

    >>> import torch
    >>> student = torch.nn.Linear(3, 2)
    >>> teacher = MomentumTeacher(student, momentum=0.9)
    >>> bool((teacher(torch.ones(1, 3)) == student(torch.ones(1, 3))).all()), teacher(torch.ones(1, 3)).requires_grad
    (True, False)
    >>> _ = student.weight.data.add_(1.0)
    >>> teacher.update_(student)
    >>> round((student.weight - teacher.module.weight).mean().item(), 4)
    0.9
    """

    def __init__(
        self,
        student: nn.Module,
        *,
        momentum: float = 0.996,
        final_momentum: float = 1.0,
        total_steps: int | None = None,
        buffers: str = "ema",
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(student, nn.Module):
            raise TypeError(f"student must be a torch.nn.Module, got {type(student).__name__}")
        check_range("momentum", momentum, 0, 1, rule="it weighs the teacher's old weights")
        check_range("final_momentum", final_momentum, 0, 1, rule="it weighs the teacher's old weights")
        if total_steps is not None:
            check_positive_int("total_steps", total_steps)
        if buffers not in BUFFER_POLICIES:
            raise ValueError(f"buffers must be one of {', '.join(map(repr, BUFFER_POLICIES))}, got {buffers!r}")
        student = unwrapped(student)
        parameters = dict(student.named_parameters())
        if not parameters:
            raise ValueError(
                f"student must have parameters to follow, {type(student).__name__} has none: pass the module you train"
            )
        lazy = [name for name, parameter in parameters.items() if is_lazy(parameter)]
        if lazy:
            raise ValueError(
                f"student has lazy parameters without a shape, {lazy[0]} the first: run one batch through it, then "
                "build the teacher"
            )
        if was_sharded(student):
            raise ValueError(
                "student must be whole, but fully_shard was called on it, and a sharded module cannot be copied: build "
                "MomentumTeacher(student) first, then shard the student, and teacher.module too where it should be"
            )
        # Plain numbers, whatever came: a checkpoint with numpy's scalars is refused by torch.load.
        self.momentum = float(momentum)
        self.final_momentum = float(final_momentum)
        self.total_steps = total_steps
        self.buffer_policy = buffers
        self.process_group = process_group
        # A tensor that stays on the CPU: an int would make torch.compile specialise on it, a buffer would be moved.
        self._updates = torch.zeros((), dtype=torch.int64, device="cpu")
        self.module = detached_copy(student).requires_grad_(False)
        self.register_load_state_dict_pre_hook(check_state_fits)  # type: ignore[no-untyped-call]

    @property
    def step(self) -> int:
        """t: how many updates there were, or where the last one's ``step`` left off."""
        return int(self._updates)

    @step.setter
    def step(self, value: int) -> None:
        self._updates.fill_(value)

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the student would return with the teacher's weights, without a graph."""
        return self.module(*args, **kwargs)

    def momentum_at(self, step: int) -> float:
        """m_t, a plain float.

        >>> teacher = MomentumTeacher(torch.nn.Linear(1, 1), momentum=0.99, total_steps=100)
        >>> teacher.momentum_at(0), teacher.momentum_at(100)
        (0.99, 1.0)
        """
        if self.total_steps is None:
            return self.momentum
        return cosine_momentum(step, self.total_steps, self.momentum, self.final_momentum)

    @torch.no_grad()
    def update_(self, student: nn.Module, step: int | None = None) -> None:
        """Follow the student by one step.

        With gradient accumulation, call it after each optimizer step only.

        Args:
            student: the module that this is a copy of, wrapped or not.
            step: t for the schedule; None counts the calls.

        Raises:
            TypeError: ``student`` is no module, or ``step`` no integer.
            ValueError: the student's parameters or buffers have other names or shapes than the teacher's, ``step`` is
                negative, or this process is not in ``process_group``. Nothing has changed then.

        >>> student = torch.nn.Linear(3, 2)
        >>> teacher = MomentumTeacher(student)
        >>> teacher.update_(student)
        >>> teacher.step
        1
        """
        if not isinstance(student, nn.Module):
            raise TypeError(f"student must be a torch.nn.Module, got {type(student).__name__}: pass the module itself")
        student = unwrapped(student)
        reshard_(self.module, student)
        pairs = _paired("parameter", self.module.named_parameters(), student.named_parameters())
        buffers = _paired("buffer", self.module.named_buffers(), student.named_buffers())
        if self.buffer_policy != "own":
            rank_and_world_size(self.process_group)  # a group without this process is refused
        t = self._updates if step is None else torch.full_like(self._updates, _checked(step))
        weight = 1.0 - self._momentum(t)

        pairs = [(mine, in_form_of(mine, leader.detach())) for mine, leader in pairs]
        for sharded in (False, True):
            _follow([pair for pair in pairs if is_sharded(pair[0]) == sharded], weight)
        if self.buffer_policy != "own":
            for mine, leader in buffers:
                if self.buffer_policy == "ema" and mine.is_floating_point():
                    theirs = leader.to(mine)
                    between = torch.lerp(mine, theirs, weight.to(mine) if isinstance(weight, Tensor) else weight)
                    # Between two infinities, such as a causal mask's, lies no number.
                    mine.copy_(torch.where(torch.isfinite(between), between, theirs))
                else:
                    mine.copy_(leader)
            all_reduce_mean_([mine for mine, _ in buffers if mine.is_floating_point()], self.process_group)
        self._updates.copy_(t + 1)

    def _momentum(self, t: Tensor) -> float | Tensor:
        """At step t; a tensor in a graph, which would be compiled anew for every float."""
        if self.total_steps is None:
            return self.momentum
        if torch.compiler.is_compiling():
            return cosine_momentum(t, self.total_steps, self.momentum, self.final_momentum)
        return self.momentum_at(int(t))

    def backbone_state_dict(self, name: str = "") -> dict[str, Tensor]:
        """The weights and buffers of a part of the teacher under the part's own names, ready for ``load_state_dict``.

        Args:
            name: of a submodule of the student, such as ``"encoder"`` or ``"encoder.layer4"``; "" is the whole student.

        Returns:
            Detached copies.

        Raises:
            ValueError: there is no submodule of that name.

        >>> student = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU())
        >>> list(MomentumTeacher(student).backbone_state_dict("0"))
        ['weight', 'bias']
        """
        try:
            part = unwrapped(self.module.get_submodule(name))
        except AttributeError:
            children = ", ".join(repr(child) for child, _ in self.module.named_children()) or "none: leave name out"
            raise ValueError(f"name must be a submodule of the student, got {name!r}: it has {children}") from None
        return {key: value.detach().clone() for key, value in part.state_dict().items() if isinstance(value, Tensor)}

    def get_extra_state(self) -> dict[str, int]:
        return {"step": self.step}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.step = int(state["step"])

    def extra_repr(self) -> str:
        if self.total_steps is None:
            momentum = f"momentum={self.momentum:g}"
        else:
            momentum = f"momentum={self.momentum:g}..{self.final_momentum:g} over {self.total_steps} steps"
        return f"{momentum}, buffers={self.buffer_policy!r}"


def _checked(step: Any) -> int:
    if not isinstance(step, int):  # first, for torch.compile
        if not hasattr(step, "__index__"):
            raise TypeError(f"step must be an int, got {step!r}: count optimizer steps, or leave it out")
        step = operator.index(step)
    if not 0 <= step < 2**63 - 1:
        raise ValueError(f"step must not be negative, and fit 64 bits, got {step}: count from 0")
    return step


def _follow(pairs: list[tuple[Tensor, Tensor]], weight: float | Tensor) -> None:
    """Followers move the share ``weight`` of the way to their leaders; all sharded or none."""
    if isinstance(weight, Tensor):
        for mine, leader in pairs:
            mine.lerp_(leader, weight.to(mine))
    elif pairs:
        torch._foreach_lerp_([mine for mine, _ in pairs], [leader for _, leader in pairs], weight)


def _paired(
    kind: str, ours: Iterator[tuple[str, Tensor]], theirs: Iterator[tuple[str, Tensor]]
) -> list[tuple[Tensor, Tensor]]:
    """Tensors of teacher and student, after making sure that they belong together."""
    mine, other = dict(ours), dict(theirs)
    for name in [*mine, *other]:
        found = [tuple(tensors[name].shape) if name in tensors else "none" for tensors in (mine, other)]
        if found[0] != found[1]:
            raise ValueError(
                f"student must be the module that the teacher was copied from, but its {kind} {name!r} is {found[1]} "
                f"and the teacher's is {found[0]}: build a new MomentumTeacher after changing the student"
            )
    return [(tensor, other[name]) for name, tensor in mine.items()]
