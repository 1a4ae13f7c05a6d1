"""Refusal of damaged states: what `load_state_dict` of our modules checks before anything is loaded."""

from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from vqssl.checks import check_state_fits
from vqssl.distributed import is_sharded

__all__ = [
    "COUNTS",
    "FINITE",
    "FLAG",
    "MOST",
    "ChecksState",
    "Rule",
    "check_before_loading",
    "check_entry",
    "check_finite_state",
    "check_parts",
    "count_of",
    "reader_of_foreign_state",
]

MOST = 2**62
"""More updates, draws or tokens a step than any run has."""


class Rule(NamedTuple):
    """What the entries of one tensor in a state must be."""

    words: str
    """As in "finite"."""
    holds: Callable[[Tensor], Tensor]
    """From the tensor to a boolean tensor."""
    floating: bool = True
    """False for counters, which have to be integers."""


FINITE = Rule("finite", torch.isfinite)
COUNTS = Rule("finite and not negative", lambda x: (x >= 0) & (x <= MOST))
FLAG = Rule("True or False", lambda x: (x == 0) | (x == 1), floating=False)

# By their last name, whatever holds them; other entries are parameters.
BATCH_NORM = {
    "running_var": COUNTS,
    "num_batches_tracked": Rule("a count of batches", lambda x: (x >= 0) & (x <= MOST), floating=False),
}


@runtime_checkable
class ChecksState(Protocol):
    """A module that looks at a state before it is loaded.

    >>> import vqssl
    >>> isinstance(vqssl.EMACodebook(codebook_size=8, dim=4), ChecksState)
    True
    """

    def check_state(self, state_dict: Mapping[str, Any], prefix: str = "", *, assign: bool = False) -> None:
        """Raise if an entry under ``prefix`` has a value that no training gives; entries may be missing."""
        ...


def check_before_loading(module: nn.Module) -> None:
    """Let ``load_state_dict`` refuse a state of other shapes or with damaged parts before anything is loaded.

    >>> linear = nn.Linear(2, 3)
    >>> check_before_loading(linear)
    >>> linear.load_state_dict({"weight": torch.zeros(2, 2), "bias": torch.zeros(3)})
    Traceback (most recent call last):
    ValueError: state_dict must have the shapes of this Linear: weight (3, 2), got (2, 2): build the module with the
    sizes that the checkpoint was written with
    """
    for check in (check_state_fits, check_parts):
        module.register_load_state_dict_pre_hook(check)


def check_parts(
    module: nn.Module, state_dict: Mapping[str, Any], prefix: str, local_metadata: Mapping[str, Any], *_: Any
) -> None:
    """Raise if the state of a part is damaged, before any part loads its own: a pre-hook of ``load_state_dict``."""
    assign = local_metadata.get("assign_to_params_buffers", False)
    for path, part in module.named_modules():
        if isinstance(part, ChecksState):
            part.check_state(state_dict, f"{prefix}{path}." if path else prefix, assign=assign)


def check_finite_state(module: nn.Module, state_dict: Mapping[str, Any], prefix: str, assign: bool) -> None:
    """Raise if a parameter or buffer of a module, or of its parts, would not be finite; for modules of ours."""
    for name, ours in chain(module.named_parameters(), module.named_buffers()):
        rule = BATCH_NORM.get(name.rpartition(".")[2], FINITE)
        if ours.is_floating_point() == rule.floating:
            check_entry(state_dict, prefix + name, ours, rule, assign)


def check_entry(state_dict: Mapping[str, Any], key: str, ours: Tensor, rule: Rule, assign: bool) -> None:
    """Raise unless ``state_dict[key]``, if there is such an entry, follows the rule once it is loaded.

    Reads the values, which synchronises with their device. A sharded tensor is judged over all ranks.

    Args:
        state_dict: what is loaded.
        key: the whole name of the entry.
        ours: the tensor that takes it.
        rule: what its values must be.
        assign: True if the entry itself becomes the state, False if its values are copied into ``ours``.

    Raises:
        TypeError: the entry is not a tensor, or not of numbers of the right kind.
        ValueError: values break the rule.

    >>> check_entry({"size": torch.tensor([1.0, -1.0])}, "size", torch.zeros(2), COUNTS, False)
    Traceback (most recent call last):
    ValueError: size must be finite and not negative, got 1 of 2 entries that are not, such as -1.0: this state is
    damaged, load an earlier one
    """
    if key not in state_dict:
        return
    value = state_dict[key]
    if not isinstance(value, Tensor):
        raise TypeError(f"{key} must be a tensor, got {type(value).__name__}: write torch.as_tensor for that entry")
    _check_kind(key, value, rule)
    if rule.floating and not assign:
        value = value.to(ours.dtype)  # what is finite in float64 may not be finite here
    elif rule.floating and value.itemsize == 1:
        value = value.float()  # the 8-bit formats have few operators
    elif not value.is_floating_point():
        value = value.long()  # the narrower integers cannot be compared with the largest
    broken = ~rule.holds(value)
    count = count_of(broken)
    if count:
        such_as = "" if is_sharded(value) else f", such as {value.reshape(-1)[broken.reshape(-1)][0].item()}"
        raise ValueError(
            f"{key} must be {rule.words}, got {count} of {value.numel()} entries that are not{such_as}: this state is "
            "damaged, load an earlier one"
        )


def _check_kind(key: str, value: Tensor, rule: Rule) -> None:
    if rule.floating and not value.is_floating_point():
        raise TypeError(f"{key} must have a floating dtype, got {value.dtype}: this state is damaged, load another")
    if not rule.floating and (value.is_complex() or (value.is_floating_point() and rule is not FLAG)):
        raise TypeError(
            f"{key} must have an integer dtype, got {value.dtype}, which cannot hold it: cast only floating entries "
            "when you save, as Module.half() does"
        )


FLAGS = {"initted": "codebook_from_vector_quantize_pytorch", "inited": "codebook_from_encodec"}
"""Functions of vqssl.interop, by the flag that codebooks of their library have."""


def reader_of_foreign_state(state_dict: Mapping[str, Any], prefix: str = "") -> str | None:
    """Return the call that reads a state dict of another library's codebook; None if it is none for certain.

    >>> reader_of_foreign_state({"_codebook.embed": 0, "_codebook.cluster_size": 0, "_codebook.initted": 0})
    "vqssl.interop.codebook_from_vector_quantize_pytorch(state_dict, prefix='_codebook.')"
    """
    for inside in (prefix, f"{prefix}_codebook."):
        for flag, function in FLAGS.items():
            if all(inside + name in state_dict for name in ("embed", "cluster_size", flag)):
                return f"vqssl.interop.{function}(state_dict, prefix={inside!r})"
    return None


def count_of(flags: Tensor) -> int:
    """Return how many entries are True, over all shards; 0 for a meta or fake tensor, which has no values.

    >>> count_of(torch.tensor([True, False, True]))
    2
    """
    if flags.is_meta:
        return 0
    count = flags.sum()
    if is_sharded(count):
        count = count.full_tensor()  # type: ignore[attr-defined]
    try:
        return int(count)
    except RuntimeError:  # a fake tensor, or under torch.func.vmap
        return 0
