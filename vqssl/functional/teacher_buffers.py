"""Buffer policies: what a teacher's buffer becomes when the teacher follows its student.

Each policy is a function ``(name, teacher, student, weight) -> new value``, which :class:`vqssl.MomentumTeacher` calls
for each buffer at each update. Returning ``teacher`` itself leaves the buffer as it is. Any other tensor is copied into
the buffer, and floating buffers are then averaged over the ranks. All ranks must therefore decide alike: by name, shape
or dtype, not by values. :data:`BUFFER_POLICIES` lists the policies by name.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

__all__ = ["BUFFER_POLICIES", "BufferPolicy", "BufferPolicyName", "copy_buffer", "ema_buffer", "own_buffer"]

BufferPolicy = Callable[[str, Tensor, Tensor, float | Tensor], Tensor]
BufferPolicyName = Literal["ema", "copy", "own"]


def ema_buffer(name: str, teacher: Tensor, student: Tensor, weight: float | Tensor) -> Tensor:
    r"""Return a floating buffer averaged like the parameters, and any other buffer as the student's.

    .. math:: b \leftarrow (1 - w)\, b + w\, b_\theta, \qquad w = 1 - m_t

    An entry that would not be finite becomes the student's: between two infinities, as in a causal mask, the average
    is NaN.

    Args:
        name: name of the buffer in the student, such as ``"encoder.1.running_mean"``; not used.
        teacher: value in the teacher, any shape.
        student: value in the student, of the same shape.
        weight: w, the student's share, 0 to 1. A scalar tensor under ``torch.compile``.

    Returns:
        The new value: the dtype and device of ``teacher`` for floating buffers, ``student`` itself for others.

    >>> import torch
    >>> ema_buffer("running_mean", torch.tensor([0.0]), torch.tensor([8.0]), 0.25).tolist()
    [2.0]
    >>> ema_buffer("num_batches_tracked", torch.tensor(3), torch.tensor(7), 0.25).item()
    7
    """
    if not teacher.is_floating_point():
        return student
    student = student.to(teacher)
    average = torch.lerp(teacher, student, weight.to(teacher) if isinstance(weight, Tensor) else weight)
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
