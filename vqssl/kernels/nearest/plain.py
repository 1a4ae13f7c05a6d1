"""The search in PyTorch's standard operators, for export to ONNX: ONNX has no operator of ours."""

import torch
from torch import Tensor

__all__ = ["nearest_codeword_plain"]


def nearest_codeword_plain(x: Tensor, codebook: Tensor, metric: str) -> Tensor:
    """Return the index of the code with the best float32 score: ``(N, D), (K, D) -> (N,)`` int64.

    Follows the rule of :mod:`vqssl.kernels.nearest`, except that codes whose scores differ by less than rounding may be
    confused. Holds the ``N x K`` scores.
    """
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
