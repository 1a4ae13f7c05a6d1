"""Counts and sums of tokens per code on CUDA, by Triton kernels: by atomic additions, or in order, by sorted runs."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqssl.kernels.code_sums import PIECE

__all__ = ["add_tokens", "code_sums_triton", "sum_runs"]


def code_sums_triton(x: Tensor, indices: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """Count the tokens of each code and sum them: ``(N, D), (N,) int64 in [-1, K) -> (K,), (K, D)`` float32.

    Equals :func:`vqssl.kernels.code_sums`, and its bound holds: beyond 4096 tokens sums are added up in float64. The
    order of atomic additions varies, so that sums differ in the last bit from run to run. Under
    ``torch.use_deterministic_algorithms(True)`` the tokens are sorted by code instead, and the run of each code is
    summed in the tokens' order.
    """
    rows, width = x.shape
    # Twice the traffic of the atomic additions, so only where float32 could lose the bound.
    dtype = torch.float32 if rows <= PIECE else torch.float64
    counts = torch.zeros(num_codes, dtype=torch.int64, device=x.device)
    if torch.are_deterministic_algorithms_enabled():
        ordered, order = indices.sort(stable=True)
        first = torch.searchsorted(ordered, torch.arange(num_codes + 1, device=x.device))
        sums = torch.empty((num_codes, width), dtype=torch.float32, device=x.device)
        sum_runs[(num_codes, triton.cdiv(width, 128))](
            x, order, first, sums, width, *x.stride(), BLOCK_N=16, BLOCK_D=128
        )
        return first.diff().to(torch.float32), sums
    sums = torch.zeros((num_codes, width), dtype=dtype, device=x.device)
    if rows > 0:
        add_tokens[(triton.cdiv(rows, 16), triton.cdiv(width, 128))](
            x, indices, counts, sums, rows, width, indices.stride(0), *x.stride(), BLOCK_N=16, BLOCK_D=128
        )
    return counts.to(torch.float32), sums.to(torch.float32)


@triton.jit
def add_tokens(
    x, indices, counts, sums, N, D, index_stride, stride_n, stride_d, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Add a tile of tokens to the sums and counts of their codes."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    code = tl.load(indices + row * index_stride, mask=row < N, other=-1)
    counted = code >= 0
    inside = counted[:, None] & (d < D)[None, :]
    token = tl.load(x + row[:, None] * stride_n + d.to(tl.int64)[None, :] * stride_d, mask=inside, other=0.0)
    tl.atomic_add(sums + code[:, None] * D + d[None, :], token.to(sums.dtype.element_ty), mask=inside, sem="relaxed")
    if tl.program_id(1) == 0:
        tl.atomic_add(counts + code, tl.full((BLOCK_N,), 1, tl.int64), mask=counted, sem="relaxed")


@triton.jit
def sum_runs(
    x, order, first, sums, D, stride_n, stride_d, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Sum the rows of one code's run in a fixed order; one program for each code and piece of its width."""
    code = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    begin, end = tl.load(first + code), tl.load(first + code + 1)
    total = tl.zeros((BLOCK_D,), tl.float64)  # one addition for BLOCK_N tokens: the loads take longer
    for start in range(begin, end, BLOCK_N):
        place = start + tl.arange(0, BLOCK_N)
        row = tl.load(order + place, mask=place < end, other=0)
        inside = (place < end)[:, None] & (d < D)[None, :]
        token = tl.load(x + row[:, None] * stride_n + d.to(tl.int64)[None, :] * stride_d, mask=inside, other=0.0)
        total += tl.sum(token.to(tl.float32), 0).to(tl.float64)
    tl.store(sums + code * D + d, total.to(tl.float32), mask=d < D)
