"""Copies of a student: of the module inside its wrappers, and without the graphs it keeps."""

import copy
import warnings
from typing import Any

from torch import Tensor, nn

__all__ = ["detached_copy", "unwrapped"]


def detached_copy(student: nn.Module) -> nn.Module:
    """A deep copy, which torch refuses where an attribute has a graph: what weight_norm computed, or features kept."""
    parameters = {id(parameter): name for name, parameter in student.named_parameters()}
    detached: dict[int, Any] = {}
    for path, module in student.named_modules():
        for name, value in vars(module).items():
            if not isinstance(value, Tensor) or value.is_leaf:
                continue
            if id(value._base) in parameters:  # the copy would keep the weights of today
                warnings.warn(
                    f"student keeps {path + '.' if path else ''}{name}, a view of {parameters[id(value._base)]}, which "
                    "in the copy will not follow it: fine where forward makes it anew, otherwise make it a property",
                    stacklevel=3,
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
    """The module inside ``torch.compile`` and data-parallel wrappers."""
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    while True:
        if isinstance(module, wrappers):
            module = module.module
        elif isinstance(getattr(module, "_orig_mod", None), nn.Module):
            module = module._orig_mod  # type: ignore[assignment]
        else:
            return module
