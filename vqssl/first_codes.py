"""The first codes of a codebook: drawn from the valid tokens of all ranks."""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from vqssl import kernels
from vqssl.codebook_state import check_codes
from vqssl.distributed import gather_pool
from vqssl.functional.metrics import Metric, MetricName, is_comparable
from vqssl.initialization import Initialization

__all__ = ["draw_first_codes"]


def draw_first_codes(
    tokens: Tensor,
    mask: Tensor | None,
    embed: Tensor,
    *,
    initialization: Initialization,
    metric: MetricName | Metric,
    rng: Tensor,
    group: ProcessGroup | None = None,
) -> Tensor | None:
    """Return the first codes ``(K, D)``, equal on all ranks, or None if no rank has a valid token.

    Args:
        tokens: ``(*batch, D)``, in the form in which the metric compares them.
        mask: ``(*batch,)`` bool, or None.
        embed: the codes of construction ``(K, D)``. A new code that the metric cannot compare keeps its place there.
        initialization: how codes are drawn.
        metric: the codebook's.
        rng: a state for :mod:`vqssl.functional.random`; it is not advanced.
        group: the ranks that share the codes.

    Raises:
        TypeError: the initialisation does not return a floating tensor.
        ValueError: it returns another shape, or refuses the batch.

    >>> from vqssl.initialization import SampleInit
    >>> x, options = torch.eye(2), {"initialization": SampleInit(), "metric": "euclidean", "rng": torch.tensor([0, 0])}
    >>> draw_first_codes(x, None, torch.zeros(2, 2), **options).sum().item()
    2.0
    >>> draw_first_codes(x, torch.tensor([False, False]), torch.zeros(2, 2), **options)
    """
    codebook_size, dim = embed.shape
    tokens = tokens.detach().reshape(-1, dim).to(embed.dtype)
    valid = kernels.finite_rows(tokens) & is_comparable(tokens, metric)
    if mask is not None:
        valid &= mask.reshape(-1)
    pool = gather_pool(tokens, valid, group)
    if pool.total == 0:
        return None
    codes = initialization(pool, codebook_size, rng, metric)
    if codes is None:
        return embed
    check_codes(codes, embed)
    # A mean of tokens that cancel out has no direction: that code keeps its place.
    return torch.where(is_comparable(codes, metric)[:, None], codes.to(embed.dtype), embed)
