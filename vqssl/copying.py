"""Copies of a student: the module inside its wrappers, without autograd graphs."""

import copy
import warnings
from typing import Any

from torch import Tensor, nn

__all__ = ["detached_copy", "unwrapped"]


def detached_copy(student: nn.Module) -> nn.Module:
    """Return a deep copy of a module in which kept tensors have no graph.

    torch refuses to deep-copy a tensor with a graph. Modules keep such tensors as attributes: ``weight_norm`` its
    result, others the features of the last step.

    Args:
        student: any module.

    Raises:
        ValueError: the module keeps a tensor with a graph in a list or a dictionary.

    Warns:
        UserWarning: the module keeps a view of a parameter. In the copy it does not follow that parameter.

    >>> import torch
    >>> student = torch.nn.Linear(2, 2)
    >>> student.doubled = 2 * student.weight
    >>> detached_copy(student).doubled.requires_grad
    False
    """
    parameters = {id(parameter): name for name, parameter in student.named_parameters()}
    detached: dict[int, Any] = {}
    for path, module in student.named_modules():
        for name, value in vars(module).items():
            if not isinstance(value, Tensor) or value.is_leaf:
                continue
            if id(value._base) in parameters:
                warnings.warn(
                    f"student keeps {path + '.' if path else ''}{name}, a view of {parameters[id(value._base)]}. In "
                    "the copy the view does not follow that parameter: this is harmless if forward computes it again, "
                    "otherwise make it a property",
                    stacklevel=4,  # the caller of MomentumTeacher: between lie its __init__ and the check of keywords
                )
            detached[id(value)] = value.detach().clone()
    try:
        return copy.deepcopy(student, detached)
    except RuntimeError as error:
        if "deepcopy protocol" not in str(error):
            raise
        raise ValueError(
            f"student must be a module that copy.deepcopy can copy, got {type(student).__name__} ({error}): keep no "
            "tensors with a graph in lists or dictionaries of its modules, or detach them first"
        ) from error


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module inside ``torch.compile`` and data-parallel wrappers.

    >>> import torch
    >>> student = torch.nn.Linear(2, 2)
    >>> unwrapped(torch.nn.DataParallel(student)) is student
    True
    """
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    while True:
        if isinstance(module, wrappers):
            module = module.module
        elif isinstance(getattr(module, "_orig_mod", None), nn.Module):
            module = module._orig_mod  # type: ignore[assignment]
        else:
            return module
