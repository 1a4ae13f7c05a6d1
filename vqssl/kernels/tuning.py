"""Block sizes of the Triton kernels: a table of what was measured, and a rule for GPUs that nobody measured.

Nothing is timed in normal use, so that equal input takes equal paths. ``python -m benchmarks.tune`` times the
candidates on the GPU at hand and writes the winners to a file of the user's, which is read from then on.
"""

import functools
import json
import os
from pathlib import Path
from typing import NamedTuple

__all__ = ["Config", "candidates", "choose", "key", "shared_memory", "tuning_file"]

# Bytes of shared memory that one block may have (CUDA C++ programming guide, technical specifications).
_SHARED = {(8, 0): 163, (8, 6): 99, (8, 7): 163, (8, 9): 99, (9, 0): 227, (10, 0): 227, (10, 3): 227, (12, 0): 99}


class Config(NamedTuple):
    """How a kernel is cut up.

    >>> Config(128, 64, 128, 8, 3).launch()
    {'num_warps': 8, 'num_stages': 3}
    """

    block_n: int
    """Tokens that stay on the chip."""
    block_k: int
    """Codes that stream past at once."""
    block_d: int
    """Width of tokens and codes that is multiplied at once."""
    warps: int
    stages: int

    def blocks(self) -> dict[str, int]:
        return {"BLOCK_N": self.block_n, "BLOCK_K": self.block_k, "BLOCK_D": self.block_d}

    def launch(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.stages}


def shared_memory(capability: tuple[int, int]) -> int:
    """Bytes that one block may have on an architecture; of an unknown one, the least that is known."""
    return 1024 * _SHARED.get(capability, min(_SHARED.values()))


def choose(capability: tuple[int, int], dim: int, *, split: bool = False, wide: bool = False) -> Config:
    """The configuration for tokens of width ``dim``: the user's measured one if there is one, or the rule's.

    ``split``: the closer look, whose tokens and codes have remainders; ``wide``: products of float32.
    """
    measured = _measured(str(tuning_file())).get(key(capability, dim, split, wide))
    return measured or candidates(capability, dim, split=split, wide=wide)[0]


def candidates(capability: tuple[int, int], dim: int, *, split: bool = False, wide: bool = False) -> list[Config]:
    """What may be tried, the rule's choice first: everything that fits the architecture's shared memory."""
    block_d = _block_d(capability, dim, split)
    # Tile, scores, best and second of 128 x 64 take 8 warps some 170 registers a thread.
    blocks = [(128, 64, 8), (64, 64, 4), (64, 64, 8), (128, 128, 8), (64, 128, 8), (64, 32, 4), (32, 32, 4)]
    if block_d < dim:  # tokens are loaded and rounded in the loop, which takes registers too
        blocks = [(64, 64, 8), (128, 32, 8), (32, 32, 4)]
    elif capability[0] == 10:  # the compiler leaves 128 registers to 8 warps beside Blackwell's tensor memory
        blocks = [(64, 64, 4), (128, 128, 8), (128, 64, 4)]
    if split:  # a closer look has few rows, and needs twice the room
        blocks = [(64, 32, 8), (32, 32, 4)]
    found = []
    for block_n, block_k, warps in blocks:
        for stages in (3, 2, 4, 1):
            # Tokens, and a stage's worth of codes.
            entries = (block_n + block_k * stages) * block_d
            if entries * (4 if wide else 2) * (2 if split else 1) <= shared_memory(capability):
                found.append(Config(block_n, block_k, block_d, warps, stages))
    return found


def _block_d(capability: tuple[int, int], dim: int, split: bool) -> int:
    """All of the width at once where the chip has the room, unless more than a third would be padding; else in pieces.

    But for Hopper and its big siblings, tensor cores take the tokens from registers, which do not hold more than 128;
    and nowhere do they hold more than 128 twice.
    """
    whole = max(16, 1 << (dim - 1).bit_length())
    most = 256 if capability[0] in (9, 10) and not split else 128
    if whole <= most and 3 * dim >= 2 * whole:
        return whole
    return min(whole, 64)


def tuning_file() -> Path:
    """Where the user's measurements are: $VQSSL_TUNING, or vqssl/tuning.json in the cache folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("VQSSL_TUNING") or cache / "vqssl" / "tuning.json")


def key(capability: tuple[int, int], dim: int, split: bool, wide: bool) -> str:
    """The name of a configuration in the user's file."""
    return f"sm_{capability[0]}{capability[1]}/{dim}/{'split' if split else 'wide' if wide else 'half'}"


@functools.cache
def _measured(path: str) -> dict[str, Config]:
    try:
        table = json.loads(Path(path).read_text())
        return {key: Config(*map(int, values)) for key, values in table.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
