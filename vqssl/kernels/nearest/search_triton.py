"""The exact search on CUDA by Triton kernels: a first look at all rows, and two more at what it leaves open.

1. *First look*, all rows. A tile of tokens stays on the chip while the codes are loaded block after block. Tensor
   cores compute the scores ``x·c - |c|²/2`` from tokens and codes rounded to fp16; only the best few of each row are
   kept. A row is *certified* if best and second differ by more than rounding can have changed them, which is at most

       ``margin = 2 (|x - x'| max|c| + |x'| max|c - c'| + slack)``,

   where x' and c' are the rounded values. ``|x - x'|`` is measured for each row when its tile is loaded. If up to
   three others are closer to the best, and it is known which, the row is a *close call*. All else stays *open*.
2. *Close calls*, a few percent. Those codes are compared in float64, by differences, from the values as given.
3. *Last look*, the rows still open: one in a thousand, and ties of many codes. Every code is compared in float32, by
   differences. Those that may be the nearest by the error bound of that sum, mostly one or two, are compared in
   float64.

The first look writes the rows that it leaves to two lists in device memory, and the next kernels read the lengths of
the lists there. So nothing synchronises with the device, and a CUDA graph can hold the search. The order of a list
varies from run to run; the answer for a row does not depend on it.

Tokens and codes are centred on a mean of the codes and scaled by a power of two. (Cosine: tokens by their own largest
entry, codes to length 1.) This changes no winner. A row whose values leave the range of fp16 is left open, and so stays
right. A code that leaves it, or is so far away that it would widen every margin, gets no score. Then a row is certified
only if its best code is nearer than any such code can be.

``slack`` bounds the error of a sum of D products in tensor cores. They align the products of a block to the largest
and cut off what falls below the last bit of float32 (Fasi, Higham, Mikaitis, Pranesh 2021, doi 10.7717/peerj-cs.330).
So each of D terms may lose 2^-23 of the largest: at most ``(D + 16) 2^-23 |x'| max|c|``, which is taken times 1.25,
with 2^-14 added to both lengths, because numbers that are subnormal in fp16 are aligned as 2^-14.
``|c|²/2`` has half as many roundings.
"""

import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from vqssl.kernels.nearest.looks_triton import RIVALS, close_calls, first_look, last_look
from vqssl.kernels.nearest.prepare_triton import prepare
from vqssl.kernels.nearest.tuning import Config, choose

__all__ = ["Found", "nearest_codeword_triton", "place_bits", "search_triton"]

_DOT_DTYPES = {"exact": torch.float16, "fp16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32}


class Found(NamedTuple):
    """The result of a search, and how many rows each look left to the next."""

    indices: Tensor
    """``(N,)`` int64."""
    left_open: Tensor
    """``(2,)`` int64, on the device: rows that the first look left as close calls, and open."""


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
) -> Found:
    """Search as :func:`nearest_codeword_triton` does, and also return how many rows were left open.

    Args:
        x: ``(N, D)``.
        codebook: ``(K, D)``.
        metric: ``"euclidean"`` or ``"cosine"``.
        precision: ``"exact"``, ``"fp16"``, ``"bf16"`` or ``"tf32"``.
        first: the block sizes of the first look; by default those of :func:`vqssl.kernels.nearest.tuning.choose`.
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

    close_rows, open_rows = torch.empty((2, rows), dtype=torch.int64, device=x.device).unbind()
    rivals = torch.empty((rows, RIVALS.value), dtype=torch.int32, device=x.device)
    close_count, open_count = left_open[:1], left_open[1:]
    first_look[(triton.cdiv(rows, first.block_n),)](
        x, *codes.tensors, indices, rivals, close_rows, close_count, open_rows, open_count,
        rows, *codebook.shape, *x.stride(),
        COSINE=cosine, CHUNKS=codes.chunks, BITS=place_bits(codebook.shape[0], first) if exact else 0,
        ASSEMBLY=not _interpreted(), **first.blocks(), **first.launch(),
    )  # fmt: skip
    strides = (*x.stride(), *codebook.stride())
    # A fused multiply-add rounds one of two equal squares and not the other: exact ties would be broken.
    if exact:
        close_calls[(2 * programs,)](
            x, codebook, indices, rivals, close_rows, close_count, width, *strides,
            COSINE=cosine, BLOCK_N=16, BLOCK_D=64, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    last_look[(4 * programs,)](
        x, codebook, codes.tensors[-1], indices, open_rows, open_count, *codebook.shape, *strides,
        COSINE=cosine, BLOCK_K=128, BLOCK_D=_last_width(width), EXACT_D=32, num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip
    return Found(indices, left_open)


def place_bits(codes: int, config: Config) -> int:
    """Return the bits of the place of half a block among ``codes`` codes."""
    return max(1, (2 * triton.cdiv(codes, config.block_k) - 1).bit_length())


def _last_width(width: int) -> int:
    """Return how many entries the last look compares at once."""
    return min(64, max(16, triton.next_power_of_2(width)))


def _interpreted() -> bool:
    """Return True in Triton's interpreter, which knows no assembly."""
    return bool(triton.knobs.runtime.interpret)


@functools.cache
def _device(index: int) -> tuple[tuple[int, int], int]:
    """Return compute capability and number of multiprocessors; under the interpreter (-1), those of Hopper and 2."""
    if index < 0:
        return (9, 0), 2
    return torch.cuda.get_device_capability(index), torch.cuda.get_device_properties(index).multi_processor_count
