"""The exact search on CUDA by Triton kernels: three looks, each at the rows that the one before left open.

1. *First look*, all rows. A tile of tokens stays on the chip while the codes are loaded block after block. Tensor
   cores compute the scores ``x·c - |c|²/2`` from tokens and codes rounded to fp16; only the best score of each row, the
   second best and the index are kept. A row is *certified* if best and second differ by more than rounding can have
   changed them, which is at most

       ``margin = 2 (|x - x'| max|c| + |x'| max|c - c'| + slack)``,

   where x' and c' are the rounded values. ``|x - x'|`` is measured for each row when its tile is loaded.
2. *Closer look*, the few percent that are left. The same with split products ``x'c' + x'c" + x"c'``, where x" and c"
   are the rounded remainders of x - x' and c - c': about 22 bits.
3. *Last look*, the rows still open, above all ties. Every code is compared in float64, by differences, from the values
   as given.

Each look writes the rows that it leaves open to a list in device memory, and the next kernel reads the length of the
list there. So nothing synchronises with the device, and a CUDA graph can hold the search. The order of a list varies
from run to run; the answer for a row does not depend on it.

Tokens and codes are centred on a mean of the codes and scaled by a power of two. (Cosine: tokens by their own largest
entry, codes to length 1.) This changes no winner. A row whose values leave the range of fp16 is left open, and so stays
right.

``slack`` bounds the error of a sum of D products in tensor cores. They align the products of a block to the largest
and cut off what falls below the last bit of float32 (Fasi, Higham, Mikaitis, Pranesh 2021, doi 10.7717/peerj-cs.330).
So each of D terms (3 D with split products) may lose 2^-23 of the largest: at most ``(D + 16) 2^-23 |x'| max|c|``,
which is taken times 1.25. ``|c|²/2`` has half as many roundings.
"""

import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from vqssl.kernels.nearest.looks_triton import closer_look, first_look, last_look
from vqssl.kernels.nearest.prepare_triton import prepare
from vqssl.kernels.nearest.tuning import Config, choose

__all__ = ["Found", "block_bits", "nearest_codeword_triton", "search_triton"]

_DOT_DTYPES = {"exact": torch.float16, "fp16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32}


class Found(NamedTuple):
    """The result of a search, and how many rows each look left to the next."""

    indices: Tensor
    """``(N,)`` int64."""
    left_open: Tensor
    """``(2,)`` int64, on the device: rows that the first and the closer look left open."""


def nearest_codeword_triton(x: Tensor, codebook: Tensor, metric: str, precision: str = "exact") -> Tensor:
    """Return the index of the code nearest to each token: ``(N, D), (K, D) -> (N,)`` int64.

    Tokens and codes are float16, bfloat16 or float32, of any strides. A precision other than ``"exact"`` rounds them to
    that format and certifies nothing.
    """
    return search_triton(x, codebook, metric, precision).indices


def search_triton(
    x: Tensor,
    codebook: Tensor,
    metric: str,
    precision: str = "exact",
    *,
    first: Config | None = None,
    closer: Config | None = None,
) -> Found:
    """Search as :func:`nearest_codeword_triton` does, and also return how many rows were left open.

    Args:
        x: ``(N, D)``.
        codebook: ``(K, D)``.
        metric: ``"euclidean"`` or ``"cosine"``.
        precision: ``"exact"``, ``"fp16"``, ``"bf16"`` or ``"tf32"``.
        first: the block sizes of the first look; by default those of :func:`vqssl.kernels.nearest.tuning.choose`.
        closer: the block sizes of the closer look, likewise.
    """
    rows, width = x.shape
    indices = torch.empty(rows, dtype=torch.int64, device=x.device)
    left_open = torch.zeros(2, dtype=torch.int64, device=x.device)
    if rows == 0:
        return Found(indices, left_open)
    exact, cosine = precision == "exact", metric == "cosine"
    capability, programs = _device(x.get_device())
    # In powers of two, so that few choices are remembered.
    rows_each = 1 << (rows // programs).bit_length()
    first = first or choose(capability, width, "wide" if precision == "tf32" else "half", rows_each)
    codes = prepare(codebook, metric, _DOT_DTYPES[precision], first)
    shape = (rows, *codebook.shape, *x.stride())

    open_rows = torch.empty((2, rows), dtype=torch.int64, device=x.device)
    first_look[(triton.cdiv(rows, first.block_n),)](
        x, *codes.tensors, indices, open_rows[0], left_open, *shape,
        EXACT=exact, COSINE=cosine, CHUNKS=codes.chunks, BITS=block_bits(codebook.shape[0], first) if exact else 0,
        **first.blocks(), **first.launch(),
    )  # fmt: skip
    last = 0
    if exact:
        closer = closer or choose(capability, width, "split")
        closer_look[(2 * programs,)](
            x, *codes.tensors, indices, open_rows[0], left_open, open_rows[1], left_open[1:], *shape,
            COSINE=cosine, CHUNKS=codes.chunks * first.block_d // closer.block_d, **closer.blocks(), **closer.launch(),
        )  # fmt: skip
        last = 1
    last_look[(4 * programs,)](
        x, codebook, indices, open_rows[last], left_open[last:], *codebook.shape, *x.stride(), *codebook.stride(),
        COSINE=cosine, BLOCK_K=32, BLOCK_D=64, num_warps=4,
    )  # fmt: skip
    return Found(indices, left_open)


def block_bits(codes: int, config: Config) -> int:
    """Return the bits of a block index among ``codes`` codes; at least 1, because 0 selects the inexact path."""
    return max(1, (triton.cdiv(codes, config.block_k) - 1).bit_length())


@functools.cache
def _device(index: int) -> tuple[tuple[int, int], int]:
    """Return compute capability and number of multiprocessors; under the interpreter (-1), those of Hopper and 2."""
    if index < 0:
        return (9, 0), 2
    return torch.cuda.get_device_capability(index), torch.cuda.get_device_properties(index).multi_processor_count
