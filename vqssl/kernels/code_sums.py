"""The operator ``vqssl::code_sums``: counts and sums of tokens per code, without a one-hot matrix.

These are the statistics of an EMA codebook. CUDA tensors go to Triton kernels (``code_sums_triton.py``), unless Triton
cannot run or the tokens are float64.
"""

import torch
from torch import Tensor

from vqssl.kernels.backends import run_triton

__all__ = ["code_sums"]

PIECE = 2**12
"""Most tokens that are added in float32."""


@torch.library.custom_op("vqssl::code_sums", mutates_args=())
def code_sums(x: Tensor, indices: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """Count the tokens of each code and sum them: ``(N, D), (N,) int64 -> (K,), (K, D)``.

    Both results are float32, or float64 for float64 tokens. Tokens of index -1 are ignored, whatever they hold. Equal
    input gives equal bits on a CPU, which adds tokens in their order, and elsewhere under
    ``torch.use_deterministic_algorithms(True)``.

    In PyTorch at most 4096 tokens are added in float32, and such sums in float64: a sum is off by at most 2^-12 of the
    sum of the magnitudes, however many tokens there are. Added one by one in float32, 10^6 equal tokens are 1% off, and
    16 million 15%.
    """
    return _code_sums_torch(x, indices, num_codes)


def _code_sums_torch(x: Tensor, indices: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """Compute :func:`code_sums` by ``index_add_``."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    # Ignored tokens go to an extra row, which is dropped: so their NaN is never multiplied by anything.
    row = torch.where(indices < 0, num_codes, indices)
    sums = x.new_zeros((num_codes + 1, x.shape[1]), dtype=dtype)
    if len(x) <= PIECE or dtype == torch.float64:
        sums.index_add_(0, row, x.to(dtype))
    else:
        total = torch.zeros_like(sums, dtype=torch.float64)
        for tokens, rows in zip(x.split(PIECE), row.split(PIECE), strict=True):
            total.add_(sums.zero_().index_add_(0, rows, tokens.to(dtype)))
        sums.copy_(total)
    # Counted in integers: in float32, adding 1 to 2^24 changes nothing.
    counts = row.new_zeros(num_codes + 1).index_add_(0, row, torch.ones_like(row))
    return counts[:num_codes].to(dtype), sums[:num_codes]


@code_sums.register_kernel("cuda")
def _(x: Tensor, indices: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    found = None
    if x.dtype != torch.float64:
        found = run_triton("vqssl.kernels.code_sums_triton", "code_sums_triton", x, indices, num_codes)
    return _code_sums_torch(x, indices, num_codes) if found is None else found


@code_sums.register_fake
def _(x: Tensor, indices: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(num_codes, dtype=dtype), x.new_empty((num_codes, x.shape[1]), dtype=dtype)
