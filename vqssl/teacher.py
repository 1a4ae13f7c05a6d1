"""MomentumTeacher: a frozen copy of any module that follows the module by momentum."""

import operator
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.parameter import is_lazy

from vqssl.checks import by_name, check_positive_int, check_range, check_state_fits, policy_name
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
from vqssl.functional.teacher_buffers import BUFFER_POLICIES, BufferPolicy, BufferPolicyName

__all__ = ["MomentumTeacher"]


class _Pair(NamedTuple):
    """A tensor of the teacher and the student's tensor of the same name."""

    name: str
    mine: Tensor
    theirs: Tensor


class MomentumTeacher(Grouped, nn.Module):
    r"""A copy of the student that gets no gradient and follows the student's weights slowly.

    .. math:: \xi \leftarrow m_t\, \xi + (1 - m_t)\, \theta, \qquad
        m_t = m_T - (m_T - m_0) \cdot \tfrac{1}{2} \big( \cos(\pi t / T) + 1 \big)

    Source: BYOL, arXiv 2006.07733; DiSSECT, arXiv 2509.18765. The teacher starts as an exact copy, keeps no reference
    to the student, and is called like the student. Call :meth:`update_` once after each optimizer step.

    ``buffers`` decides what an update does with buffers, such as BatchNorm's running statistics:

    - ``"ema"`` (default): floating buffers follow the student's with the same momentum, others are copied. In eval mode
      the teacher's statistics then belong to its weights, however old those are. In training mode the teacher's own
      forward passes also update them, and dominate. Under ``torch.distributed`` each rank has seen other images, so
      floating buffers are averaged over the ranks in one all-reduce: all ranks then hold the same teacher.
    - ``"copy"``: all buffers are copied from the student, and floating ones averaged likewise.
    - ``"own"``: an update changes no buffer, only the teacher's own forward passes in training mode do. lightly and
      solo-learn do this. A teacher that stays in eval mode would keep its first statistics for ever.

    Args:
        student: any module with parameters, also wrapped in DistributedDataParallel or ``torch.compile``.
        momentum: m_0; the momentum of every step if ``total_steps`` is None.
        final_momentum: m_T.
        total_steps: T, the number of updates in which the momentum goes from m_0 to m_T. None keeps m_0.
        buffers: one of the names above, or a function of your own like those of
            ``vqssl.functional.BUFFER_POLICIES``: ``(name, teacher, student, weight) -> new value``.
        process_group: the ranks over which buffers are averaged. None is the default group at the time of the call.

    Shape:
        That of the student.

    Sharded students (FSDP2's ``fully_shard``): build the teacher first, then shard the student. Either shard the
    teacher's ``module`` alike, so that each rank updates its own part, or leave it whole. ``update_`` then gathers the
    student's weights, and every rank must call it.

    The state dict holds the number of updates so far, as "extra state" and a plain int. A resumed run therefore
    continues the schedule.

    Raises:
        TypeError: ``student`` is not a module, or an argument has the wrong type.
        ValueError: the student has no parameters, has lazy ones without a shape, was sharded by ``fully_shard``, or
            keeps a list of tensors with a graph; or an argument is out of range.

    Warns:
        UserWarning: the student keeps a view of a parameter as an attribute. In the copy the view does not follow the
            parameter. A detached view cannot be recognised, and gives no warning.

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
        buffers: BufferPolicyName | BufferPolicy = "ema",
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(student, nn.Module):
            raise TypeError(f"student must be a torch.nn.Module, got {type(student).__name__}")
        check_range("momentum", momentum, 0, 1, rule="it weighs the teacher's old weights")
        check_range("final_momentum", final_momentum, 0, 1, rule="it weighs the teacher's old weights")
        if total_steps is not None:
            check_positive_int("total_steps", total_steps)
        self.buffer_policy: BufferPolicy = by_name("buffers", buffers, BUFFER_POLICIES)
        self.buffer_policy_name = policy_name(buffers)
        student = unwrapped(student)
        _check_can_be_copied(student)
        # Plain floats, also for NumPy's: torch.load refuses a checkpoint with NumPy scalars.
        self.momentum = float(momentum)
        self.final_momentum = float(final_momentum)
        self.total_steps = total_steps
        self.process_group = process_group
        # A tensor, because torch.compile would specialise on an int. Not a buffer, because it stays on the CPU.
        self._updates = torch.zeros((), dtype=torch.int64, device="cpu")
        self.module = detached_copy(student).requires_grad_(False)
        self.register_load_state_dict_pre_hook(check_state_fits)  # type: ignore[no-untyped-call]

    @property
    def step(self) -> int:
        """Number of updates so far, or one more than the ``step`` that was given last."""
        return int(self._updates)

    @step.setter
    def step(self, value: int) -> None:
        self._updates.fill_(value)

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the copy of the student with the teacher's weights, without a graph."""
        return self.module(*args, **kwargs)

    def momentum_at(self, step: int) -> float:
        """Return m_t, a plain float.

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

        With gradient accumulation, call it only after each optimizer step.

        Args:
            student: the module that this is a copy of, wrapped or not.
            step: t for the schedule. None counts the calls.

        Raises:
            TypeError: ``student`` is not a module, or ``step`` is not an integer.
            ValueError: the student's parameters or buffers differ from the teacher's in name or shape, ``step`` is
                negative, or this process is not in ``process_group``. The teacher is then unchanged.

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
        parameters = _paired("parameter", self.module.named_parameters(), student.named_parameters())
        buffers = _paired("buffer", self.module.named_buffers(), student.named_buffers())
        t = self._updates if step is None else torch.full_like(self._updates, _step_number(step))
        weight = 1.0 - self._momentum(t)
        new_buffers = self._new_buffers(buffers, weight)

        _move_parameters(parameters, weight)
        self._write_buffers(new_buffers)
        self._updates.copy_(t + 1)

    def _momentum(self, t: Tensor) -> float | Tensor:
        """Return m_t: a float, or a tensor under torch.compile, which would recompile for every new float."""
        if self.total_steps is None:
            return self.momentum
        if torch.compiler.is_compiling():
            return cosine_momentum(t, self.total_steps, self.momentum, self.final_momentum)
        return self.momentum_at(int(t))

    def _new_buffers(self, buffers: list[_Pair], weight: float | Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return each buffer that the policy changes, with its new value. Nothing is written yet."""
        changed = []
        for name, mine, theirs in buffers:
            new = self.buffer_policy(name, mine, theirs, weight)
            if not isinstance(new, Tensor) or new.shape != mine.shape:
                found = f"shape {tuple(new.shape)}" if isinstance(new, Tensor) else type(new).__name__
                raise ValueError(
                    f"buffers must return a tensor of the buffer's shape, {tuple(mine.shape)} for {name!r}, got "
                    f"{found}: return the teacher's tensor for a buffer that is to stay"
                )
            if new is not mine:
                changed.append((mine, new))
        if changed:
            rank_and_world_size(self.process_group)  # raises if this process is not in the group
        return changed

    def _write_buffers(self, new_buffers: list[tuple[Tensor, Tensor]]) -> None:
        """Copy the new values, then average floating buffers over the ranks."""
        for mine, new in new_buffers:
            mine.copy_(new)
        if new_buffers:
            all_reduce_mean_([mine for mine, _ in new_buffers if mine.is_floating_point()], self.process_group)

    def backbone_state_dict(self, name: str = "") -> dict[str, Tensor]:
        """Return the weights and buffers of a part of the teacher under the part's own names.

        The result is ready for ``load_state_dict`` of such a part.

        Args:
            name: a submodule of the student, such as ``"encoder"`` or ``"encoder.layer4"``; "" is the whole student.

        Returns:
            Detached copies.

        Raises:
            ValueError: the student has no submodule of that name.

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
        """Return what the state dict holds beside tensors: the number of updates."""
        return {"step": self.step}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Load what :meth:`get_extra_state` returned."""
        self.step = int(state["step"])

    def extra_repr(self) -> str:
        """Return the options that ``repr`` shows."""
        if self.total_steps is None:
            momentum = f"momentum={self.momentum:g}"
        else:
            momentum = f"momentum={self.momentum:g}..{self.final_momentum:g} over {self.total_steps} steps"
        return f"{momentum}, buffers={self.buffer_policy_name!r}"


def _check_can_be_copied(student: nn.Module) -> None:
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


def _step_number(step: Any) -> int:
    """Return ``step`` as an int; raise if it is not an integer or out of range."""
    if not isinstance(step, int):  # first, so that torch.compile does not trace operator.index
        if not hasattr(step, "__index__"):
            raise TypeError(f"step must be an int, got {step!r}: count optimizer steps, or leave it out")
        step = operator.index(step)
    if not 0 <= step < 2**63 - 1:
        raise ValueError(f"step must be at least 0 and fit 64 bits, got {step}: count from 0")
    return step


def _paired(kind: str, ours: Iterator[tuple[str, Tensor]], theirs: Iterator[tuple[str, Tensor]]) -> list[_Pair]:
    """Pair tensors of teacher and student by name; raise if a name or a shape differs."""
    mine, other = dict(ours), dict(theirs)
    for name in [*mine, *other]:
        found = [tuple(tensors[name].shape) if name in tensors else "none" for tensors in (mine, other)]
        if found[0] != found[1]:
            raise ValueError(
                f"student must be the module that the teacher was copied from, but its {kind} {name!r} is {found[1]} "
                f"and the teacher's is {found[0]}: build a new MomentumTeacher after changing the student"
            )
    return [_Pair(name, tensor, other[name]) for name, tensor in mine.items()]


def _move_parameters(parameters: list[_Pair], weight: float | Tensor) -> None:
    """Move each parameter the share ``weight`` of the way to the student's."""
    pairs = [(mine, in_form_of(mine, theirs.detach())) for _, mine, theirs in parameters]
    for sharded in (False, True):  # the fused operation takes sharded tensors or whole ones, not both
        mine = [tensor for tensor, _ in pairs if is_sharded(tensor) == sharded]
        theirs = [target for tensor, target in pairs if is_sharded(tensor) == sharded]
        if isinstance(weight, Tensor):
            for tensor, target in zip(mine, theirs, strict=True):
                tensor.lerp_(target, weight.to(tensor))
        elif mine:
            torch._foreach_lerp_(mine, theirs, weight)
