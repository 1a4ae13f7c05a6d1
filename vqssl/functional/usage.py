"""Usage of codes and spread of targets: detached figures for logs and alarms."""

import torch
from torch import Tensor

from vqssl.checks import check_code_range, check_floating, check_indices, check_positive_int, check_range
from vqssl.functional.vectors import unit
from vqssl.types import CodebookUsage

__all__ = ["code_counts", "codebook_usage", "target_spread"]


def code_counts(indices: Tensor, codebook_size: int) -> Tensor:
    """Count the tokens of each code.

    Args:
        indices: integers of any shape; -1 (masked) is not counted.
        codebook_size: K, the number of codes.

    Returns:
        ``(K,)`` int64.

    Raises:
        TypeError: ``indices`` is not an integer tensor.
        ValueError: an index is K or more, or below -1.

    >>> import torch
    >>> code_counts(torch.tensor([[0, 2], [2, -1]]), 3).tolist()
    [1, 0, 2]
    """
    check_positive_int("codebook_size", codebook_size)
    check_indices("indices", indices)
    flat = indices.detach().reshape(-1).long()
    check_code_range("indices", flat, codebook_size)
    slot = torch.where(flat < 0, codebook_size, flat)
    return slot.new_zeros(codebook_size + 1).index_add_(0, slot, torch.ones_like(slot))[:codebook_size]


def codebook_usage(counts: Tensor, dead_below: float = 0.0) -> CodebookUsage:
    r"""Compute perplexity, fraction of live codes and number of dead codes from the counts of each code.

    .. math:: \mathrm{perplexity} = \exp\Big(-\sum_k p_k \ln p_k\Big), \qquad p_k = n_k \big/ \textstyle\sum n

    Args:
        counts: ``(K,)``, not negative: tokens of each code in a batch (:func:`code_counts`), or running counts.
        dead_below: a code is dead if its count is 0 or below this fraction of the mean count, 0 to 1.

    Returns:
        :class:`~vqssl.types.CodebookUsage`. If all counts are 0, perplexity and fraction are 0 and all codes are dead.

    Raises:
        TypeError: ``counts`` is not a tensor of real numbers.
        ValueError: ``counts`` is not ``(K,)`` with K >= 1, or ``dead_below`` is outside [0, 1].

    >>> import torch
    >>> usage = codebook_usage(torch.tensor([8, 8, 0, 0]))
    >>> usage.perplexity.item(), usage.fraction.item(), usage.dead.item()
    (2.0, 0.5, 2)
    """
    if not isinstance(counts, Tensor) or counts.is_complex() or counts.dtype == torch.bool:
        found = counts.dtype if isinstance(counts, Tensor) else type(counts).__name__
        raise TypeError(
            f"counts must be a tensor of real numbers, got {found}: write code_counts(indices, codebook_size)"
        )
    if counts.ndim != 1 or len(counts) == 0:
        raise ValueError(
            f"counts must be (K,) with K >= 1, got shape {tuple(counts.shape)}: write code_counts(indices, K) for "
            "indices, and call it once for each codebook"
        )
    check_range("dead_below", dead_below, 0, 1, rule="it is a fraction of the mean count")
    counts = counts.detach()
    # float64 where the device has it: counts above 2^24 stay exact, and even usage gives exactly K.
    counts = counts.to(torch.float32 if counts.device.type == "mps" else torch.float64)
    total = counts.sum()
    p = counts / torch.where(total > 0, total, 1.0)
    perplexity = torch.where(total > 0, torch.special.entr(p).sum().exp(), 0.0)
    alive = (counts > 0) & (counts >= dead_below * counts.mean())
    return CodebookUsage(perplexity.float(), alive.float().mean(), (~alive).sum())


def target_spread(targets: Tensor) -> Tensor:
    r"""Measure how far targets are from collapse: 0 if all have one direction, 1 if they are isotropic.

    .. math:: \sqrt{D} \cdot \mathrm{mean}_d\, \mathrm{std}_b \big( t_{bd} / \lVert t_b \rVert \big)

    Source: the collapse measure of SimSiam (arXiv 2011.10566, section 4.1), times the square root of the width. The
    deviation is that of the batch itself: B orthogonal directions give sqrt(1 - 1 / B), 0.95 for 10 and 0.71 for 2.

    Args:
        targets: ``(B, D)``, B >= 2.

    Returns:
        Detached scalar, float32 or float64.

    Raises:
        TypeError: ``targets`` is not a floating tensor.
        ValueError: it is not ``(B, D)`` with B >= 2.

    >>> import torch
    >>> target_spread(torch.ones(8, 4)).item()
    0.0
    >>> round(target_spread(torch.randn(4096, 64)).item(), 2)
    1.0
    """
    check_floating("targets", targets)
    if targets.ndim != 2 or len(targets) < 2:
        raise ValueError(
            f"targets must be (B, D) with B >= 2, got shape {tuple(targets.shape)}: give the embeddings of one batch, "
            "and write targets.flatten(0, -2) for tokens (B, N, D)"
        )
    directions = unit(targets.detach().to(torch.promote_types(targets.dtype, torch.float32)))
    return directions.std(0, correction=0).mean() * targets.shape[1] ** 0.5
