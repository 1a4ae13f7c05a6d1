"""Block sizes of the Triton kernels of the search: a file of measured ones, and a rule for everything else.

Normal use times nothing, so that equal input takes equal paths. ``python -m benchmarks.tune`` times the candidates on
the GPU at hand and writes the fastest to a file of the user, which is read from then on.
"""

import functools
import json
import os
from pathlib import Path
from typing import Literal, NamedTuple

__all__ = ["Config", "Product", "candidates", "choose", "key", "shared_memory", "tuning_file"]

Product = Literal["half", "wide"]
"""What the tensor cores multiply.

``"half"``: tokens and codes rounded to 16 bits. ``"wide"``: float32, for the precision ``"tf32"``.
"""

# KiB of shared memory that one block may have (CUDA C++ programming guide, technical specifications).
_SHARED = {(8, 0): 163, (8, 6): 99, (8, 7): 163, (8, 9): 99, (9, 0): 227, (10, 0): 227, (10, 3): 227, (12, 0): 99}


# First of the candidates, by major capability and width that is multiplied at once: the fastest of 26 on an H200, where
# two blocks share a multiprocessor and one computes products while the other compares scores.
_MEASURED = {(9, 128): (64, 128, 4, 2), (9, 256): (128, 128, 8, 1)}


class Config(NamedTuple):
    """The block sizes of a kernel and its launch options.

    >>> Config(128, 64, 128, 8, 3).launch()
    {'num_warps': 8, 'num_stages': 3}
    """

    block_n: int
    """Tokens of a block, which stay on the chip."""
    block_k: int
    """Codes that are loaded at once."""
    block_d: int
    """Entries of tokens and codes that are multiplied at once."""
    warps: int
    stages: int

    def blocks(self) -> dict[str, int]:
        """Return the block sizes as arguments of a kernel."""
        return {"BLOCK_N": self.block_n, "BLOCK_K": self.block_k, "BLOCK_D": self.block_d}

    def launch(self) -> dict[str, int]:
        """Return Triton's launch options."""
        return {"num_warps": self.warps, "num_stages": self.stages}


def shared_memory(capability: tuple[int, int]) -> int:
    """Return the bytes of shared memory that one block may have; for an unknown architecture, the smallest known."""
    return 1024 * _SHARED.get(capability, min(_SHARED.values()))


def choose(capability: tuple[int, int], dim: int, product: Product, rows_each: int | None = None) -> Config:
    """Return the configuration for tokens of width ``dim``: the one in the user's file, or else the rule's.

    Remembered, because the kernels of a search wait for it.

    Args:
        capability: of the device.
        dim: D.
        product: of the look.
        rows_each: tokens for each multiprocessor. With fewer than a tile has, the rule takes smaller tiles: otherwise
            some multiprocessors would get none. None where the number does not matter.
    """
    return _chosen(
        os.environ.get("VQSSL_TUNING"), os.environ.get("XDG_CACHE_HOME"), capability, dim, product, rows_each
    )


@functools.lru_cache(maxsize=512)
def _chosen(
    tuning: str | None,
    cache: str | None,
    capability: tuple[int, int],
    dim: int,
    product: Product,
    rows_each: int | None,
) -> Config:
    """Choose; the variables that name the user's file are arguments, so that another file is another choice."""
    measured = _measured(str(tuning_file())).get(key(capability, dim, product))
    if measured:
        return measured
    found = candidates(capability, dim, product)
    if rows_each is None or rows_each >= found[0].block_n:
        return found[0]
    return next((config for config in found if config.block_n < found[0].block_n), found[0])


def candidates(capability: tuple[int, int], dim: int, product: Product) -> list[Config]:
    """Return all configurations that fit the architecture's shared memory, the rule's choice first."""
    block_d = _block_d(capability, dim, product)
    # Tokens, scores, best and second of 128 x 64 take 128 registers a thread of 8 warps: two blocks a multiprocessor.
    blocks = [
        (128, 64, 8),
        (64, 64, 4),
        (64, 128, 4),
        (64, 64, 8),
        (128, 128, 8),
        (64, 128, 8),
        (64, 32, 4),
        (32, 32, 4),
    ]
    if block_d < dim:  # tokens are loaded and rounded inside the loop, which takes registers too
        blocks = [(64, 64, 4), (64, 32, 8), (128, 32, 8), (32, 32, 4)]
    elif capability[0] == 10:  # beside Blackwell's tensor memory the compiler leaves 128 registers to 8 warps
        blocks = [(64, 64, 4), (128, 128, 8), (128, 64, 4)]
    elif shared_memory(capability) < 128 * 1024:  # three small blocks share a multiprocessor, of large ones only one
        blocks.insert(0, blocks.pop(1))
    size = {"half": 2, "wide": 4}[product]
    found = []
    if product == "half" and block_d >= dim and (capability[0], block_d) in _MEASURED:
        block_n, block_k, warps, stages = _MEASURED[capability[0], block_d]
        found.append(Config(block_n, block_k, block_d, warps, stages))
    for block_n, block_k, warps in blocks:
        for stages in (2, 3, 4, 1) if shared_memory(capability) < 128 * 1024 else (3, 2, 4, 1):
            # The tokens, and the codes of all stages.
            entries = (block_n + block_k * stages) * block_d
            config = Config(block_n, block_k, block_d, warps, stages)
            if entries * size <= shared_memory(capability) and config not in found:
                found.append(config)
    return found


def _block_d(capability: tuple[int, int], dim: int, product: Product) -> int:
    """Return the width to multiply at once: all of it if the chip has room and at most a third is padding.

    Except on Hopper and data-centre Blackwell, tensor cores take the tokens from registers, which hold at most a width
    of 128.
    """
    whole = max(16, 1 << (dim - 1).bit_length())
    most = 256 if capability[0] in (9, 10) else 128
    if whole <= most and 3 * dim >= 2 * whole:
        return whole
    return min(whole, 64)


def tuning_file() -> Path:
    """Return where the user's measurements are: $VQSSL_TUNING, or ``vqssl/tuning.json`` in the cache folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("VQSSL_TUNING") or cache / "vqssl" / "tuning.json")


def key(capability: tuple[int, int], dim: int, product: Product) -> str:
    """Return the name of a configuration in the user's file.

    >>> key((9, 0), 128, "half")
    'sm_90/128/half'
    """
    return f"sm_{capability[0]}{capability[1]}/{dim}/{product}"


@functools.cache
def _measured(path: str) -> dict[str, Config]:
    """Load the configurations in a file; none if it is missing or malformed."""
    try:
        table = json.loads(Path(path).read_text())
        return {key: Config(*map(int, values)) for key, values in table.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
