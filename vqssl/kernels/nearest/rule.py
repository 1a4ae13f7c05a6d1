"""The rule that all backends of the search follow, in its slowest form.

- The answer is the code nearest in **float64** to the values as given, whatever the dtype of the input.
- The lowest index wins ties, also between equal codes.
- A token with NaN or an infinity has no nearest code: its index is -1. It is reported, not raised: raising would
  synchronise with the device at every step and break CUDA graphs.
- A code with NaN or an infinity is never chosen. If no finite code is left, every index is -1.

The metric is ``"euclidean"`` (smallest distance) or ``"cosine"`` (largest inner product with codes of length 1; a zero
code has similarity 0 with every token).
"""

import torch
from torch import Tensor

__all__ = ["exact_codes", "exact_scores", "nearest_reference"]


def nearest_reference(x: Tensor, codebook: Tensor, metric: str = "euclidean") -> Tensor:
    """Return the index of the nearest code by comparing every pair in float64: ``(N, D), (K, D) -> (N,)`` int64.

    Holds ``N x K x D`` numbers; meant for tests.
    """
    scores = exact_scores(x.double()[:, None, :], exact_codes(codebook, metric)[None, :, :], metric)
    scores = scores.masked_fill(~torch.isfinite(codebook).all(-1), -torch.inf)
    found = torch.isfinite(x).all(-1) & torch.isfinite(codebook).all(-1).any()
    return torch.where(found, scores.argmax(-1), -1)


def exact_codes(codebook: Tensor, metric: str) -> Tensor:
    """Return the codes ``(..., D)`` in float64, of length 1 if the metric is cosine."""
    codes = codebook.double()
    if metric == "cosine":
        # A zero code stays zero: it has similarity 0 with every token.
        codes = codes / codes.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    return codes


def exact_scores(x: Tensor, codes: Tensor, metric: str) -> Tensor:
    """Return scores ``(...)`` of tokens and :func:`exact_codes`, both ``(..., D)`` float64; higher is nearer."""
    if metric == "cosine":
        return (x * codes).sum(-1)
    # The difference is taken before the square: nothing cancels, and equal codes tie exactly.
    return -(x - codes).square().sum(-1)
