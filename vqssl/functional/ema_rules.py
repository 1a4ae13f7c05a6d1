"""EMA rules: from a batch's statistics to the next state of a codebook."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

__all__ = ["EMA_RULES", "CodebookState", "EMAName", "EMARule", "batch_mean_ema", "count_weighted_ema"]


class CodebookState(NamedTuple):
    """The statistics that an EMA codebook keeps from step to step.

    >>> import torch
    >>> CodebookState(torch.zeros(4, 2), torch.ones(4), torch.zeros(4, 2)).embed.shape
    torch.Size([4, 2])
    """

    embed: Tensor
    """``(K, D)``: the codes e."""
    cluster_size: Tensor
    """``(K,)``: the running counts N, in tokens a step."""
    embed_avg: Tensor
    """``(K, D)``: the running sums M."""


def count_weighted_ema(state: CodebookState, counts: Tensor, sums: Tensor, decay: float, eps: float) -> CodebookState:
    r"""Return the state after one step of the conventional rule (VQ-VAE, arXiv 1711.00937, appendix A.1).

    The counts get Laplace smoothing.

    .. math:: N_k \leftarrow \gamma N_k + (1 - \gamma) n_k, \qquad M_k \leftarrow \gamma M_k + (1 - \gamma)
        \textstyle\sum_{k_i = k} z_i, \qquad e_k = M_k \Big/ \frac{N_k + \epsilon}{\sum N + K \epsilon} \textstyle\sum N

    Args:
        state: codes, counts and sums before the step.
        counts: ``(K,)`` n, tokens of this batch by code.
        sums: ``(K, D)``, their sums.
        decay: gamma, 0 to 1.
        eps: epsilon, in tokens; it prevents a division by zero for a code that is never used.

    Returns:
        The state after the step; the input does not change.

    >>> import torch
    >>> state = CodebookState(torch.tensor([[1.0], [5.0]]), torch.ones(2), torch.tensor([[1.0], [5.0]]))
    >>> count_weighted_ema(state, torch.tensor([3.0, 0.0]), torch.tensor([[6.0], [0.0]]), 0.5, 0.0).embed.tolist()
    [[1.75], [5.0]]
    """
    cluster_size = torch.lerp(state.cluster_size, counts, 1 - decay)
    embed_avg = torch.lerp(state.embed_avg, sums, 1 - decay)
    total = cluster_size.sum(-1, keepdim=True)
    smoothed = ((cluster_size + eps) / (total + cluster_size.shape[-1] * eps) * total)[..., None]
    # With eps = 0 a count can fall to zero; the code then keeps its place.
    embed = torch.where(smoothed > 0, embed_avg / smoothed, state.embed)
    return CodebookState(embed, cluster_size, embed_avg)


def batch_mean_ema(state: CodebookState, counts: Tensor, sums: Tensor, decay: float, eps: float) -> CodebookState:
    r"""Return the state after a step of DiSSECT's equation 1 (arXiv 2509.18765): a used code follows its batch mean.

    .. math:: e_k \leftarrow \gamma e_k + (1 - \gamma) \tfrac{1}{n_k} \textstyle\sum_{k_i = k} z_i
        \quad\text{where } n_k > 0

    A code that one token chose moves as far as a code that a thousand chose. Unused codes stay. The running counts
    follow the conventional rule, and the sums are kept equal to counts times codes.

    Args:
        state: codes, counts and sums before the step.
        counts: ``(K,)`` n, tokens of this batch by code.
        sums: ``(K, D)``, their sums.
        decay: gamma, 0 to 1.
        eps: not used by this rule.

    Returns:
        The state after the step; the input does not change.

    >>> import torch
    >>> state = CodebookState(torch.tensor([[1.0], [5.0]]), torch.ones(2), torch.tensor([[1.0], [5.0]]))
    >>> batch_mean_ema(state, torch.tensor([3.0, 0.0]), torch.tensor([[6.0], [0.0]]), 0.5, 0.0).embed.tolist()
    [[1.5], [5.0]]
    """
    cluster_size = decay * state.cluster_size + (1 - decay) * counts
    moved = decay * state.embed + (1 - decay) * sums / counts.clamp_min(1)[..., None]
    embed = torch.where(counts[..., None] > 0, moved, state.embed)
    return CodebookState(embed, cluster_size, embed * cluster_size[..., None])


EMAName = Literal["count_weighted", "batch_mean"]

EMARule = Callable[[CodebookState, Tensor, Tensor, float, float], CodebookState]
"""``(state, counts, sums, decay, eps) -> state``, as :func:`count_weighted_ema`."""

EMA_RULES: dict[EMAName, EMARule] = {"count_weighted": count_weighted_ema, "batch_mean": batch_mean_ema}
"""The rules by name."""
