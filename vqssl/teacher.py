"""MomentumTeacher: a frozen copy of any module that follows the module by momentum."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from vqssl.checks import by_name, can_read_without_sync, check_range, check_state_fits, policy_name
from vqssl.copying import detached_copy, unwrapped
from vqssl.distributed import (
    Grouped,
    all_reduce_mean_,
    in_form_of,
    rank_and_world_size,
    reshard_,
)
from vqssl.following import (
    Pair,
    check_can_be_copied,
    check_count,
    check_total_steps,
    checked_copy,
    has_average,
    lerp_,
    named_tensors,
    paired,
    step_number,
)
from vqssl.foreign_keywords import FOREIGN_TEACHER_KEYWORDS, names_foreign_keywords
from vqssl.foreign_methods import ForeignMethod
from vqssl.functional.schedules import cosine_momentum
from vqssl.functional.spectral_norms import iterate_spectral_norms_, vectors_of_older_spectral_norms
from vqssl.functional.teacher_buffers import (
    BUFFER_POLICIES,
    BufferPolicy,
    BufferPolicyName,
    EMABuffers,
    copy_buffer,
    ema_buffer,
    is_running_statistic,
    own_buffer,
    statistics_beside_flags,
)
from vqssl.wide_averages import WideAverages, is_narrow, widened

__all__ = ["MomentumTeacher"]


class _NewBuffer(NamedTuple):
    """What an update makes of a buffer."""

    name: str
    mine: Tensor
    new: Tensor
    over_ranks: bool
    """True if the value is averaged over the ranks."""


class MomentumTeacher(Grouped, nn.Module):
    r"""A copy of the student that gets no gradient and follows the student's weights slowly.

    .. math:: \xi \leftarrow m_t\, \xi + (1 - m_t)\, \theta, \qquad
        m_t = m_T - (m_T - m_0) \cdot \tfrac{1}{2} \big( \cos(\pi t / T) + 1 \big)

    Source: BYOL, arXiv 2006.07733; DiSSECT, arXiv 2509.18765. The teacher starts as an exact copy, keeps no reference
    to the student, and is called like the student. Call :meth:`update_` once after each optimizer step.

    ``buffers`` decides what an update does with buffers:

    - ``"ema"`` (default): running statistics, ``running_mean`` and ``running_var`` as BatchNorm has them, follow the
      student's with the same momentum: they belong to weights of the same age. Other buffers are copied, because they
      are no means: the codes and counts of a codebook, tables, masks and counters, complex ones too, and statistics
      beside a boolean buffer, such as ``initialized``. The vectors of torch's spectral norms take one power iteration
      on the teacher's own weights. To average others too, write
      ``buffers=vqssl.functional.ema_buffers("centre", "moving_mean")``. In training mode the teacher's own forward
      passes also update its statistics, and dominate. Under ``torch.distributed`` each rank has seen other images, so
      running statistics, and whatever else is averaged, are averaged over the ranks in one all-reduce: all ranks then
      hold the same teacher.
    - ``"copy"``: all buffers are copied from the student, and running statistics averaged over the ranks likewise.
    - ``"own"``: an update changes no buffer, only the teacher's own forward passes in training mode do. lightly and
      solo-learn do this. A teacher that stays in eval mode would keep its first statistics for ever, and a codebook
      in it the codes that it had at the start: random ones if the student was not trained.

    The average lives in float32 whatever dtype the teacher computes in. Where weights are float16 or bfloat16, which a
    step of 1 - m could not move, the submodule ``averages`` keeps what they are rounded from, as further entries of the
    state dict. Casts (``.half()``, ``model.bfloat16()``) do not round the averages.

    Args:
        student: any module with parameters, also wrapped in DistributedDataParallel or ``torch.compile``.
        momentum: m_0; the momentum of every step if ``total_steps`` is None.
        final_momentum: m_T.
        total_steps: T, the number of updates in which the momentum goes from m_0 to m_T; 0 for a run of one update, at
            m_T. None keeps m_0.
        buffers: one of the names above, or a function of your own like those of
            ``vqssl.functional.BUFFER_POLICIES``: ``(name, teacher, student, weight) -> new value``.
        copy: the module that follows, such as a framework's own copy of the student; it becomes ``teacher.module`` and
            gets no gradient from now on. None (default) makes a deep copy.
        process_group: the ranks over which buffers are averaged. None is the default group at the time of the call.

    Shape:
        That of the student.

    Sharded students (FSDP2's ``fully_shard``): build the teacher first, then shard the student. Either shard the
    teacher's ``module`` alike, so that each rank updates its own part, or leave it whole. ``update_`` then gathers the
    student's weights, and every rank must call it.

    Hooks of the student are copied by reference: one that writes to something outside the module, such as a dictionary
    of features, is called by the teacher too, and writes there. Register it after the teacher is built.

    The state dict holds the number of updates so far, as the buffer ``num_updates``. A resumed run therefore continues
    the schedule, and whatever sends buffers to other ranks sends it too.

    Raises:
        TypeError: ``student`` is not a module, or an argument has the wrong type.
        ValueError: the student has no parameters, has lazy ones without a shape, was sharded by ``fully_shard``, or
            keeps a list of tensors with a graph; ``ema_buffers`` names a buffer that the student has not; or an
            argument is out of range.

    Warns:
        UserWarning: the student keeps a view of a parameter as an attribute. In the copy the view does not follow the
            parameter. A detached view cannot be recognised, and gives no warning. In ``update_``: the schedule is over,
            once, and not in a compiled step.

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

    num_updates: Tensor

    # timm; torch.optim.swa_utils; byol-pytorch
    update = ForeignMethod("update_(student)")
    update_parameters = ForeignMethod("update_(student)")
    update_moving_average = ForeignMethod("update_(student)")

    @names_foreign_keywords(
        FOREIGN_TEACHER_KEYWORDS,
        sizes_by_name="MomentumTeacher(student, momentum=, total_steps=)",
        positional=1,
        what="options",
    )
    def __init__(
        self,
        student: nn.Module,
        *,
        momentum: float = 0.996,
        final_momentum: float = 1.0,
        total_steps: int | None = None,
        buffers: BufferPolicyName | BufferPolicy = "ema",
        copy: nn.Module | None = None,
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(student, nn.Module):
            raise TypeError(f"student must be a torch.nn.Module, got {type(student).__name__}")
        check_range("momentum", momentum, 0, 1, rule="it weighs the teacher's old weights")
        check_range("final_momentum", final_momentum, 0, 1, rule="it weighs the teacher's old weights")
        if total_steps is not None:
            check_total_steps(total_steps)
        self.buffer_policy: BufferPolicy = by_name("buffers", buffers, BUFFER_POLICIES)
        self.buffer_policy_name = policy_name(buffers)
        student = unwrapped(student)
        check_can_be_copied(student)
        if isinstance(self.buffer_policy, EMABuffers):
            self.buffer_policy.check(student)
        # Plain floats, also for NumPy's: torch.load refuses a checkpoint with NumPy scalars.
        self.momentum = float(momentum)
        self.final_momentum = float(final_momentum)
        self.total_steps = total_steps
        self.process_group = process_group
        self.module = (detached_copy(student) if copy is None else checked_copy(copy, student)).requires_grad_(False)
        self.averages = WideAverages()
        self._older_vectors = vectors_of_older_spectral_norms(self.module)
        self._beside_flags = statistics_beside_flags(self.module)
        self._keep_averages({})
        # A tensor: torch.compile would specialise on an int, and only tensors travel between ranks and through files.
        device = next(self.module.parameters()).device
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64, device=device))
        self._last_read: tuple[Tensor, int, int] | None = None
        self._warned_of_the_end = False
        self.register_load_state_dict_pre_hook(check_state_fits)  # type: ignore[no-untyped-call]

    @property
    def step(self) -> int:
        """Number of updates so far, or one more than the ``step`` that was given last."""
        return int(self.num_updates)

    @step.setter
    def step(self, value: int) -> None:
        self.num_updates.fill_(value)

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
    def update_(self, student: nn.Module, step: int | None = None, *, momentum: float | None = None) -> None:
        """Follow the student by one step.

        With gradient accumulation, call it only after each optimizer step.

        Args:
            student: the module that this is a copy of, wrapped or not.
            step: t for the schedule. None counts the calls.
            momentum: of this update, in place of the schedule's. The call is counted.

        Raises:
            TypeError: ``student`` is not a module, ``step`` is not an integer, or ``momentum`` is not a number.
            ValueError: the student's parameters or buffers differ from the teacher's in name or shape, ``step`` is
                negative, ``momentum`` is not from 0 to 1, both are given, or this process is not in ``process_group``.
                The teacher is then unchanged.

        >>> student = torch.nn.Linear(3, 2)
        >>> teacher = MomentumTeacher(student)
        >>> teacher.update_(student)
        >>> teacher.step
        1
        """
        if not isinstance(student, nn.Module):
            raise TypeError(f"student must be a torch.nn.Module, got {type(student).__name__}: pass the module itself")
        if momentum is not None:
            check_range("momentum", momentum, 0, 1, rule="it weighs the teacher's old weights")
            if step is not None:
                raise ValueError(
                    f"give step or momentum, got step={step!r} and momentum={momentum!r}: step is for the schedule, "
                    "which momentum replaces"
                )
        student = unwrapped(student)
        reshard_(self.module, student)
        parameters = paired("parameter", self.module.named_parameters(), student.named_parameters())
        buffers = paired("buffer", self.module.named_buffers(), student.named_buffers())
        t = self._count() if step is None else step_number(step)
        weight = 1.0 - (self._momentum(t) if momentum is None else momentum)
        new_buffers = self._new_buffers(buffers, weight)

        self._move_parameters(parameters, weight)
        self._write_buffers(new_buffers)
        if self.buffer_policy is not own_buffer:
            iterate_spectral_norms_(self.module)
        self.num_updates.fill_(t + 1)
        self._remember(t + 1)

    def _count(self) -> int | Tensor:
        """Return the number of updates so far, without a synchronisation where nothing else has changed it."""
        if torch.compiler.is_compiling():
            return self.num_updates.clone()
        if self._last_read is not None and not can_read_without_sync(self.num_updates):
            tensor, version, count = self._last_read
            if tensor is self.num_updates and version == tensor._version:
                return count
        return int(self.num_updates)

    def _remember(self, count: int | Tensor) -> None:
        # On the CPU the buffer itself is read: there, whatever writes to it is seen.
        if isinstance(count, int) and not can_read_without_sync(self.num_updates):
            self._last_read = (self.num_updates, self.num_updates._version, count)

    def _momentum(self, t: int | Tensor) -> float | Tensor:
        """Return m_t: a float, or a tensor under torch.compile, which would recompile for every new float."""
        if self.total_steps is None:
            return self.momentum
        if torch.compiler.is_compiling():
            t = t if isinstance(t, Tensor) else torch.full_like(self.num_updates, t)
            return cosine_momentum(t, self.total_steps, self.momentum, self.final_momentum)
        assert isinstance(t, int)
        if t > self.total_steps and not self._warned_of_the_end:
            self._warned_of_the_end = True
            warnings.warn(
                f"the teacher's schedule ended after total_steps = {self.total_steps} updates, and this is number "
                f"{t + 1}: the momentum stays at {self.final_momentum:g}. Give the number of optimizer steps of the "
                "whole run",
                stacklevel=4,
            )
        return self.momentum_at(t)

    def _move_parameters(self, parameters: list[Pair], weight: float | Tensor) -> None:
        """Move each parameter the share ``weight`` of the way to the student's; integers are copied."""
        for _, mine, theirs in parameters:
            if not has_average(mine):
                mine.copy_(in_form_of(mine, theirs.detach()))
        parameters = [pair for pair in parameters if has_average(pair.mine)]
        averages = [self.averages.of(name, mine) for name, mine, _ in parameters]
        lerp_(
            averages,
            [in_form_of(each, p.theirs.detach()) for each, p in zip(averages, parameters, strict=True)],
            weight,
        )
        for (name, mine, _), average in zip(parameters, averages, strict=True):
            if average is not mine:
                self.averages.write_(name, mine, average)

    def _new_buffers(self, buffers: list[Pair], weight: float | Tensor) -> list[_NewBuffer]:
        """Return each buffer that the policy changes, with its new value. Nothing is written yet."""
        changed = []
        for name, mine, theirs in buffers:
            average = self.averages.of(name, mine)
            theirs = theirs if average.dtype == mine.dtype else theirs.to(average.dtype)
            new = self._policy_for(name)(name, average, theirs, weight)
            if not isinstance(new, Tensor) or new.shape != mine.shape:
                found = f"shape {tuple(new.shape)}" if isinstance(new, Tensor) else type(new).__name__
                raise ValueError(
                    f"buffers must return a tensor of the buffer's shape, {tuple(mine.shape)} for {name!r}, got "
                    f"{found}: return the teacher's tensor for a buffer that is to stay"
                )
            if new is not average:
                # What is copied is equal on all ranks or is each rank's own; a sum would round it.
                over_ranks = has_average(mine) and (new is not theirs or is_running_statistic(name))
                changed.append(_NewBuffer(name, mine, new, over_ranks))
        if changed:
            rank_and_world_size(self.process_group)  # raises if this process is not in the group
        return changed

    def _policy_for(self, name: str) -> BufferPolicy:
        """Return the policy of a buffer, which may depend on the module around it and not on the name alone."""
        policy = self.buffer_policy
        by_kind = policy is ema_buffer or (isinstance(policy, EMABuffers) and not policy.has(name))
        if by_kind and name in self._older_vectors:
            return own_buffer
        return copy_buffer if by_kind and name in self._beside_flags else policy

    def _write_buffers(self, new_buffers: list[_NewBuffer]) -> None:
        """Average over the ranks what needs it, then write all new values."""
        shared = [each for each in new_buffers if each.over_ranks]
        means = [widened(each.new).clone() for each in shared]
        all_reduce_mean_([torch.view_as_real(m) if m.is_complex() else m for m in means], self.process_group)
        values = {each.name: mean for each, mean in zip(shared, means, strict=True)}
        for name, mine, new, _ in new_buffers:
            if name in values:
                self.averages.write_(name, mine, values[name])
            else:
                mine.copy_(new)  # nothing is rounded

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

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *arguments: Any
    ) -> None:
        # Before 0.2 the number of updates was "extra state", a dictionary.
        old = state_dict.pop(prefix + "_extra_state", None)
        if isinstance(old, dict) and "step" in old:
            state_dict.setdefault(prefix + "num_updates", torch.tensor(old["step"]))
        if isinstance(state_dict.get(prefix + "num_updates"), Tensor):
            check_count(state_dict[prefix + "num_updates"])
            state_dict[prefix + "num_updates"] = state_dict[prefix + "num_updates"].long()
        assign = bool(local_metadata.get("assign_to_params_buffers"))
        averaged = self._averaged()
        for name, tensor in named_tensors(self.module):
            key, key_of_average = f"{prefix}module.{name}", f"{prefix}averages.{self.averages.key_of(name)}"
            saved = state_dict.get(key)  # None where it is missing or not persistent
            # The most precise value that the state has: its average, else the tensor.
            value = state_dict.pop(key_of_average, saved)
            if not isinstance(value, Tensor):
                continue
            if not is_narrow(saved if assign and isinstance(saved, Tensor) else tensor):
                self.averages.forget_(name)
                if saved is not None:
                    state_dict[key] = value
            elif name in averaged:
                self.averages.keep_(name, widened(value).to(tensor.device))
                state_dict[key_of_average] = widened(value)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *arguments)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Detached: a cast replaces what the parameter itself holds.
        before = {name: self.averages.of(name, tensor).detach() for name, tensor in self._averaged().items()}
        was_meta = self.num_updates.is_meta
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if was_meta and not self.num_updates.is_meta:
            self.num_updates.zero_()  # to_empty leaves whatever was in memory
        self._keep_averages(before)
        return self

    def _averaged(self) -> dict[str, Tensor]:
        """Return the tensors that an update may average, by name."""
        policy = self.buffer_policy
        named = policy.has if isinstance(policy, EMABuffers) else lambda name: False
        by_hand = not (policy in BUFFER_POLICIES.values() or isinstance(policy, EMABuffers))
        buffers = {
            name: buffer
            for name, buffer in self.module.named_buffers()
            if is_running_statistic(name) or named(name) or by_hand
        }
        tensors = {**dict(self.module.named_parameters()), **buffers}
        return {name: tensor for name, tensor in tensors.items() if has_average(tensor)}

    @torch.no_grad()
    def _keep_averages(self, before: Mapping[str, Tensor]) -> None:
        """Keep an average of each narrow tensor and of no other, from now on: all ranks then have the same buffers.

        Args:
            before: values from before a cast.
        """
        for name, tensor in self._averaged().items():
            if is_narrow(tensor):
                self.averages.keep_(name, widened(before.get(name, tensor)).to(tensor.device))
            elif self.averages.has(name):
                tensor.copy_(before[name])
                self.averages.forget_(name)

    def extra_repr(self) -> str:
        """Return the options that ``repr`` shows."""
        if self.total_steps is None:
            momentum = f"momentum={self.momentum:g}"
        else:
            momentum = f"momentum={self.momentum:g}..{self.final_momentum:g} over {self.total_steps} steps"
        return f"{momentum}, buffers={self.buffer_policy_name!r}"
