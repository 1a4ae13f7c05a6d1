"""The operators in plain torch, for what cannot take an operator of ours: ONNX, whose own operators these become."""

import torch
from torch import Tensor

__all__ = ["look_up_plain", "nearest_codeword_plain"]


def nearest_codeword_plain(x: Tensor, codebook: Tensor, metric: str) -> Tensor:
    """``(N, D), (K, D) -> (N,)`` int64: as :func:`vqssl.kernels.nearest_codeword`, but by float32 scores, of which it
    holds ``N x K``: codes as near as rounding can tell may be taken for each other. Lowest index first, -1 for junk."""
    usable = torch.isfinite(codebook).all(-1)
    work = torch.promote_types(torch.promote_types(x.dtype, codebook.dtype), torch.float32)
    codes, x = torch.where(usable[:, None], codebook, 0.0).to(work), x.to(work)
    if metric == "cosine":
        length = torch.linalg.vector_norm(codes, dim=-1, keepdim=True)
        codes = codes / torch.where(length > 0, length, 1.0)
        constant = torch.zeros_like(length[:, 0])
    else:
        centre = codes.mean(0)
        codes, x = codes - centre, x - centre
        constant = -0.5 * codes.square().sum(-1)
    scores = x @ codes.T + torch.where(usable, constant, -torch.inf)
    found = torch.isfinite(x).all(-1) & usable.any()
    return torch.where(found, scores.argmax(-1), -1)


def look_up_plain(x: Tensor, indices: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """``(N, D), (N,), (K, D) -> (N, D), ()``: as :func:`vqssl.kernels.look_up`."""
    found = torch.nn.functional.embedding(indices, codes)
    return found.to(x.dtype), (x - found).square().sum()
