"""Buffer policies: what a teacher's buffer becomes when the teacher follows its student.

Each policy is a function ``(name, teacher, student, weight) -> new value``, which :class:`vqssl.MomentumTeacher` calls
for each buffer at each update. Returning ``teacher`` itself leaves the buffer as it is, and ``student`` itself copies
it. Any other tensor becomes the buffer's value; if it is floating, it is averaged over the ranks first, and so are
running statistics that are copied. All ranks must therefore decide alike: by name, shape or dtype, not by values.
:data:`BUFFER_POLICIES` lists the policies by name.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from vqssl.functional.spectral_norms import is_power_iteration_vector

__all__ = [
    "BUFFER_POLICIES",
    "BufferPolicy",
    "BufferPolicyName",
    "EMABuffers",
    "copy_buffer",
    "ema_buffer",
    "ema_buffers",
    "is_running_statistic",
    "own_buffer",
    "statistics_beside_flags",
]

BufferPolicy = Callable[[str, Tensor, Tensor, float | Tensor], Tensor]
BufferPolicyName = Literal["ema", "copy", "own"]


RUNNING_STATISTICS = ("running_mean", "running_var")
"""Names of buffers that are running means: those of BatchNorm, InstanceNorm and their relatives in other libraries."""


def is_running_statistic(name: str) -> bool:
    """Return True if a buffer is a running mean of what its module has seen, by the last part of its name.

    >>> is_running_statistic("encoder.1.running_var"), is_running_statistic("encoder.1.num_batches_tracked")
    (True, False)
    """
    return name.rpartition(".")[2] in RUNNING_STATISTICS


def statistics_beside_flags(module: nn.Module) -> frozenset[str]:
    """Return the names of running statistics whose own module has a boolean buffer, such as ``initialized``.

    A flag is copied. It would say of an average of the first statistics and none that they are the first statistics.

    >>> sorted(statistics_beside_flags(nn.BatchNorm1d(2)))
    []
    """
    names = []
    for path, part in module.named_modules():
        own = dict(part.named_buffers(recurse=False))
        if any(buffer.dtype == torch.bool for buffer in own.values()):
            names += [f"{path}.{name}" if path else name for name in own if is_running_statistic(name)]
    return frozenset(names)


def ema_buffer(name: str, teacher: Tensor, student: Tensor, weight: float | Tensor) -> Tensor:
    r"""Return running statistics averaged like the parameters, and other buffers as the student's.

    .. math:: b \leftarrow (1 - w)\, b + w\, b_\theta, \qquad w = 1 - m_t

    Only a mean may be averaged with another: the average of two codebooks, for example, has the codes of neither. The
    vectors of spectral norm belong to the teacher's own weights and stay; the teacher takes a power iteration instead.

    Args:
        name: name of the buffer in the student, such as ``"encoder.1.running_mean"``.
        teacher: value in the teacher, any shape.
        student: value in the student, of the same shape.
        weight: w, the student's share, 0 to 1. A scalar tensor under ``torch.compile``.

    Returns:
        The new value: the dtype and device of ``teacher`` for running statistics, ``teacher`` itself for the
        vectors of spectral norm, ``student`` itself for others.

    >>> import torch
    >>> ema_buffer("running_mean", torch.tensor([0.0]), torch.tensor([8.0]), 0.25).tolist()
    [2.0]
    >>> ema_buffer("num_batches_tracked", torch.tensor(3), torch.tensor(7), 0.25).item()
    7
    """
    if is_power_iteration_vector(name):
        return teacher
    return _average(teacher, student, weight) if is_running_statistic(name) else student


def ema_buffers(*names: str) -> BufferPolicy:
    """Return the policy :func:`ema_buffer` with more buffers that are means.

    Args:
        names: whole names of buffers, such as ``"head.centre"``, or the last part alone, ``"centre"``.

    Raises:
        TypeError: a name is not a string.

    >>> import torch
    >>> ema_buffers("centre")("head.centre", torch.tensor([0.0]), torch.tensor([8.0]), 0.25).tolist()
    [2.0]
    """
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"names must be strings, got {name!r}: write the names of buffers, one an argument")
    return EMABuffers(names)


@dataclass(frozen=True)
class EMABuffers:
    """What :func:`ema_buffers` returns: a class, because a function within a function cannot be pickled."""

    names: tuple[str, ...]

    def has(self, name: str) -> bool:
        """Return True if the user named this buffer.

        >>> EMABuffers(("centre",)).has("head.centre")
        True
        """
        return name in self.names or name.rpartition(".")[2] in self.names

    def check(self, student: nn.Module) -> None:
        """Raise ValueError if the student has no buffer of one of the names.

        >>> EMABuffers(("center",)).check(nn.BatchNorm1d(2))
        Traceback (most recent call last):
        ValueError: buffers must name buffers of the student, got 'center': it has running_mean, running_var, ...
        """
        own = [name for name, _ in student.named_buffers()]
        for name in self.names:
            if not any(EMABuffers((name,)).has(each) for each in own):
                raise ValueError(
                    f"buffers must name buffers of the student, got {name!r}: it has {', '.join(own[:8]) or 'none'}"
                )

    def __call__(self, name: str, teacher: Tensor, student: Tensor, weight: float | Tensor) -> Tensor:
        """Return the new value of a buffer."""
        if self.has(name):
            return _average(teacher, student, weight)
        return ema_buffer(name, teacher, student, weight)


def _average(teacher: Tensor, student: Tensor, weight: float | Tensor) -> Tensor:
    if not (teacher.is_floating_point() or teacher.is_complex()):
        return student
    student = student.to(teacher)
    average = torch.lerp(teacher, student, weight.to(teacher) if isinstance(weight, Tensor) else weight)
    # The average of two infinities is NaN.
    return torch.where(torch.isfinite(average), average, student)


def copy_buffer(name: str, teacher: Tensor, student: Tensor, weight: float | Tensor) -> Tensor:
    """Return the student's value.

    Args:
        name: name of the buffer in the student; not used.
        teacher: value in the teacher; not used.
        student: value in the student.
        weight: the student's share; not used.

    Returns:
        ``student`` itself.

    >>> import torch
    >>> copy_buffer("running_mean", torch.tensor([0.0]), torch.tensor([8.0]), 0.25).tolist()
    [8.0]
    """
    return student


def own_buffer(name: str, teacher: Tensor, student: Tensor, weight: float | Tensor) -> Tensor:
    """Return the teacher's value: only the teacher's own forward passes change it.

    Args:
        name: name of the buffer in the student; not used.
        teacher: value in the teacher.
        student: value in the student; not used.
        weight: the student's share; not used.

    Returns:
        ``teacher`` itself.

    >>> import torch
    >>> own_buffer("running_mean", torch.tensor([0.0]), torch.tensor([8.0]), 0.25).tolist()
    [0.0]
    """
    return teacher


BUFFER_POLICIES: dict[BufferPolicyName, BufferPolicy] = {
    "ema": ema_buffer,
    "copy": copy_buffer,
    "own": own_buffer,
}
"""The policies by name."""
