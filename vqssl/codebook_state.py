"""The state of a codebook: what each entry may hold, and what older versions lack."""

from typing import Any

import torch
from torch import Tensor

from vqssl.loading import COUNTS, FINITE, FLAG, MOST, Rule

__all__ = ["STATE_RULES", "STATE_VERSION", "add_missing_entries"]

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
