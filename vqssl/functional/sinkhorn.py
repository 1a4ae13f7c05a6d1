"""Balanced soft assignment of tokens to codes: the Sinkhorn-Knopp algorithm, over ranks."""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from vqssl.checks import check_floating, check_mask, check_positive_int, check_range
from vqssl.distributed import all_reduce_sum, rank_and_world_size

__all__ = ["sinkhorn"]


@torch.no_grad()
def sinkhorn(
    scores: Tensor,
    mask: Tensor | None = None,
    *,
    epsilon: float = 0.05,
    iterations: int = 3,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    r"""Return soft codes of all tokens, of which each code gets an equal share: equation 5 of SwAV, arXiv 2006.09882.

    .. math:: Q = \mathrm{Diag}(u) \exp(S / \epsilon) \, \mathrm{Diag}(v), \qquad
        \sum_j Q_{ij} = 1, \qquad \sum_i Q_{ij} \approx N / K

    Each iteration scales the codes to equal sums, and then the tokens to a sum of 1. So the second condition holds
    exactly and the first nearly. The scores enter as logarithms: no score is too large, and no code ever has a sum of
    0. All tokens are balanced together, whatever their leading axes; balance maps of several scales one by one.

    Under ``torch.distributed`` the tokens of all ranks count as one batch. Every rank has to call it equally often,
    with any number of tokens, also with none; an iteration sends one all-reduce of K numbers for each rank.

    Args:
        scores: S, ``(*batch, K)``: how well each code fits, usually cosines.
        mask: ``(*batch,)`` bool, True where a token counts.
        epsilon: above 0; a smaller one gives sharper codes.
        iterations: how often both are scaled.
        process_group: the ranks that are balanced together; None is the default group.

    Returns:
        ``(*batch, K)`` float32 (float64 for float64 scores), without a gradient. A masked token gets zeros, which
        :func:`code_cross_entropy` leaves out. One with a score that is not finite gets NaN and has no part in the rest.

    Raises:
        TypeError: ``scores`` is not a floating tensor, or the mask is not boolean.
        ValueError: there is no axis of codes, ``epsilon`` is not above 0, ``iterations`` is below 1, or shape or device
            of the mask differ.

    >>> import torch
    >>> scores = torch.tensor([[1.0, 0.9], [0.8, 0.1], [0.7, 0.2], [1.0, 0.3]])  # code 0 fits all tokens best
    >>> [[round(share, 2) for share in row] for row in sinkhorn(scores, epsilon=0.1, iterations=20).tolist()]
    [[0.01, 0.99], [0.81, 0.19], [0.37, 0.63], [0.81, 0.19]]
    """
    check_floating("scores", scores)
    if scores.ndim < 1 or scores.shape[-1] == 0:
        raise ValueError(f"scores must be (*batch, K) with at least one code, got shape {tuple(scores.shape)}")
    check_mask(mask, scores.shape[:-1], scores.device)
    check_range("epsilon", epsilon, 0, float("inf"))
    if epsilon == 0:
        raise ValueError("epsilon must be above 0, got 0: write scores.argmax(-1) for hard codes")
    check_positive_int("iterations", iterations)
    logs = scores.to(torch.promote_types(scores.dtype, torch.float32)).reshape(-1, scores.shape[-1]) / epsilon
    kept = logs.new_ones(len(logs), 1, dtype=torch.bool) if mask is None else mask.reshape(-1, 1)
    counts = kept & logs.isfinite().all(-1, keepdim=True)
    logs = torch.where(counts, logs, -torch.inf)
    of_tokens, of_codes = torch.zeros_like(logs[:, :1]), logs.new_zeros(1, logs.shape[1])
    for _ in range(iterations):
        of_codes = _log_sum_over_ranks(logs + of_tokens, process_group)
        of_codes = torch.where(of_codes > -torch.inf, -of_codes, 0.0)  # no rank has a token
        of_tokens = torch.where(counts, -torch.logsumexp(logs + of_codes, -1, keepdim=True), 0.0)
    # The last scale of the tokens once more, so that they sum to 1 also where large logarithms round.
    shares = torch.softmax(logs + of_codes, -1)
    return torch.where(counts, shares, torch.where(kept, torch.nan, 0.0)).reshape(scores.shape)


def _log_sum_over_ranks(logs: Tensor, group: ProcessGroup | None) -> Tensor:
    """Return the logarithm of the sum over all tokens of all ranks, ``(1, K)``."""
    rank, world_size = rank_and_world_size(group)
    # An empty maximum has no value; a token of no weight changes nothing.
    own = torch.logsumexp(torch.cat([logs, logs.new_full((1, logs.shape[1]), -torch.inf)]), 0)
    if world_size == 1:
        return own[None]
    # Each rank fills a row: a sum of exponentials would overflow without the largest over all ranks.
    finite = own > -torch.inf
    is_own = (torch.arange(world_size, device=logs.device) == rank)[:, None]
    values, found = all_reduce_sum([torch.where(is_own & finite, own, 0.0), (is_own & finite).to(logs.dtype)], group)
    return torch.logsumexp(torch.where(found > 0, values, -torch.inf), 0, keepdim=True)
