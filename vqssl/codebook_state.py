"""The state of a codebook: what each entry may hold, what older versions lack, and its dtype after a load."""

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from vqssl.checks import check_device, check_floating, policy_name
from vqssl.functional.metrics import Metric, MetricName, is_comparable
from vqssl.loading import COUNTS, FINITE, FLAG, MOST, Rule, check_entry, count_of

__all__ = [
    "STATE_RULES",
    "STATE_VERSION",
    "add_missing_entries",
    "cast_entries_to_assign",
    "check_codebook_state",
    "check_codes",
    "check_comparable",
    "in_one_dtype",
]

# 2: `initialized` and `rng` belong to the state; 3: `num_updates` does; 4: `births` does.
STATE_VERSION = 4

UNCOUNTED_DRAWS = -(2**62)
"""Draw counter of a state that was saved without one: below zero, so that no draw repeats."""


def _draws_are_possible(rng: Tensor) -> Tensor:
    possible = (rng >= UNCOUNTED_DRAWS) & (rng <= MOST)
    possible[..., 0] = True  # a seed may be anything
    return possible


STATE_RULES = {
    "embed": FINITE,
    "cluster_size": COUNTS,
    "embed_avg": FINITE,
    "initialized": FLAG,
    "num_updates": Rule("a count, or -1 where it is unknown", lambda x: (x >= -1) & (x <= MOST), floating=False),
    "rng": Rule("a seed and a count of draws", _draws_are_possible, floating=False),
    "births": Rule("counts", lambda x: (x >= 0) & (x <= MOST), floating=False),
}
"""What each buffer may hold."""


def add_missing_entries(state_dict: dict[str, Any], prefix: str, version: int, seed: int, rng: Tensor) -> None:
    """Add what a state of an older version lacks; entries that are there stay.

    Args:
        state_dict: of a codebook or of a module around it; changes in place.
        prefix: in front of the codebook's names, dot included.
        version: of the state; 1 also for other libraries' states, and for files that hold no version.
        seed: the codebook's, for a state without a generator.
        rng: the codebook's, whose seed counts if it has one.

    >>> state = {"embed": torch.zeros(3, 2)}
    >>> add_missing_entries(state, "", 1, seed=3, rng=torch.tensor([7, 0]))
    >>> state["rng"][0].item(), state["num_updates"].item(), state["births"].tolist()
    (7, -1, [0, 0, 0])
    """
    if prefix + "embed" not in state_dict:
        return
    if version < 2:  # codes, counts and sums alone, or another library's: a trained codebook
        # On the device of the state, not of the module, which may be meta.
        device = state_dict[prefix + "embed"].device
        state_dict.setdefault(prefix + "initialized", torch.tensor(True, device=device))
        seed = seed if rng.is_meta else int(rng[0])
        state_dict.setdefault(prefix + "rng", torch.tensor([seed, UNCOUNTED_DRAWS], device=device))
    if version < 3 and isinstance(state_dict.get(prefix + "rng"), Tensor):
        draws = state_dict[prefix + "rng"].reshape(-1)[-1]
        # Version 2 counted two draws before the first update.
        state_dict.setdefault(prefix + "num_updates", torch.where(draws < 0, -1, (draws - 2).clamp_min(0)))
    if version < 4 and isinstance(state_dict[prefix + "embed"], Tensor):
        codes = state_dict[prefix + "embed"]
        state_dict.setdefault(prefix + "births", codes.new_zeros(len(codes), dtype=torch.int64))


def cast_entries_to_assign(state_dict: dict[str, Any], prefix: str, buffers: Mapping[str, Tensor]) -> None:
    """Cast entries that become the buffers themselves: halves to float32, counters to the dtype of the counter.

    Args:
        state_dict: of a codebook or of a module around it; changes in place.
        prefix: in front of the codebook's names, dot included.
        buffers: of the codebook, by name.

    >>> state = {"embed": torch.zeros(3, 2).half(), "num_updates": torch.tensor(7, dtype=torch.int16)}
    >>> cast_entries_to_assign(state, "", {"embed": torch.zeros(3, 2), "num_updates": torch.tensor(0)})
    >>> state["embed"].dtype, state["num_updates"].dtype
    (torch.float32, torch.int64)
    """
    for name, ours in buffers.items():
        value = state_dict.get(prefix + name)
        if isinstance(value, Tensor) and not (ours.is_floating_point() and value.itemsize >= 4):
            dtype = torch.float32 if ours.is_floating_point() else ours.dtype
            state_dict[prefix + name] = value.to(dtype)


def in_one_dtype(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return the tensors in the widest dtype among them: assigned ones may differ from those that were left out.

    >>> [tensor.dtype for tensor in in_one_dtype([torch.zeros(1), torch.zeros(1).double()])]
    [torch.float64, torch.float64]
    """
    tensors = list(tensors)
    dtype = functools.reduce(torch.promote_types, [tensor.dtype for tensor in tensors])
    return [tensor.to(dtype) for tensor in tensors]


def check_codebook_state(
    state_dict: Mapping[str, Any],
    prefix: str,
    buffers: Mapping[str, Tensor],
    metric: MetricName | Metric,
    *,
    assign: bool,
) -> None:
    """Raise if the state of a codebook holds values that no training gives.

    Args:
        state_dict: of a codebook or of a module around it; entries may be missing.
        prefix: in front of the codebook's names, dot included.
        buffers: of the codebook, by name.
        metric: the codebook's.
        assign: True if the entries are going to replace the buffers, False if they are copied into them.

    Raises:
        TypeError: an entry is not a tensor, or a counter is not an integer.
        ValueError: a value is NaN or infinite, a count is negative, a counter is out of its range, or the metric cannot
            compare a code.

    >>> check_codebook_state({"births": torch.tensor([-1])}, "", {"births": torch.tensor([0])}, "cosine", assign=False)
    Traceback (most recent call last):
    ValueError: births must be counts, got 1 of 1 entries that are not, such as -1: this state is damaged, load an
    earlier one
    """
    for name, ours in buffers.items():
        check_entry(state_dict, prefix + name, ours, STATE_RULES[name], assign)
    codes, initialized = state_dict.get(prefix + "embed"), state_dict.get(prefix + "initialized")
    # Codes that the first batch is going to replace may be anything.
    if codes is not None and (initialized is None or count_of(initialized)):
        check_comparable(prefix + "embed", codes.to(buffers["embed"].dtype), metric)


def check_codes(codes: Tensor, embed: Tensor) -> None:
    """Raise unless ``codes`` is a floating tensor of the shape of the codes that it replaces, both or none meta."""
    check_floating("codes", codes)
    if codes.shape != embed.shape:
        raise ValueError(f"codes must be (codebook_size, dim) = {tuple(embed.shape)}, got shape {tuple(codes.shape)}")
    if codes.is_meta != embed.is_meta:
        check_device("codes", codes, embed.device)


def check_comparable(name: str, codes: Tensor, metric: MetricName | Metric) -> None:
    """Raise unless the metric can compare all codes ``(K, D)``: by all but the euclidean, none may be zeros."""
    count = count_of(~is_comparable(codes, metric))
    if count:
        raise ValueError(
            f"{name} must have a direction in each row, by which metric {policy_name(metric)!r} compares, "
            f"got {count} of {len(codes)} rows whose form is all zeros: replace those rows"
        )
