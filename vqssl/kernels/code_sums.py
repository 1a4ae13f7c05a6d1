"""Counts and sums per code: the statistics of an EMA codebook, without a one-hot matrix."""

import torch
from torch import Tensor

from vqssl.kernels.backends import by_triton


@torch.library.custom_op("vqssl::code_sums", mutates_args=())
def code_sums(x: Tensor, indices: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """``(N, D), (N,) int64 -> (K,), (K, D)``: how many tokens chose each code, and their sum.

    Tokens of index -1 count nowhere, whatever they hold. Sums are float32, or float64 for float64 tokens. Equal input
    gives equal bits on a CPU, where tokens are added in their order, and elsewhere under
    ``torch.use_deterministic_algorithms(True)``.
    """
    return _by_index(x, indices, num_codes)


def _by_index(x: Tensor, indices: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    # Ignored tokens go to a row of their own, which is dropped: a NaN there is never multiplied by anything.
    slot = torch.where(indices < 0, num_codes, indices)
    sums = x.new_zeros((num_codes + 1, x.shape[1]), dtype=dtype).index_add_(0, slot, x.to(dtype))
    # Counted in integers: float32 stops counting at 2^24.
    counts = slot.new_zeros(num_codes + 1).index_add_(0, slot, torch.ones_like(slot))
    return counts[:num_codes].to(dtype), sums[:num_codes]


@code_sums.register_kernel("cuda")
def _(x: Tensor, indices: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    found = None
    if x.dtype != torch.float64:
        found = by_triton("code_sums_triton", "code_sums_triton", x, indices, num_codes)
    return _by_index(x, indices, num_codes) if found is None else found


@code_sums.register_fake
def _(x: Tensor, indices: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(num_codes, dtype=dtype), x.new_empty((num_codes, x.shape[1]), dtype=dtype)
