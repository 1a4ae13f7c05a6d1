"""Metrics: the form in which tokens and codes are compared."""

from collections.abc import Callable

from torch import Tensor

from vqssl.functional.vectors import unit
from vqssl.kernels import MetricName

__all__ = ["METRICS", "Metric", "MetricName", "euclidean", "search_metric"]

Metric = Callable[[Tensor], Tensor]
"""``(*batch, D) -> (*batch, D)``, idempotent: maps tokens and codes; the code nearest by euclidean distance wins."""


def euclidean(x: Tensor) -> Tensor:
    """Return ``x``: tokens and codes are compared as they are.

    >>> import torch
    >>> euclidean(torch.tensor([3.0, 4.0])).tolist()
    [3.0, 4.0]
    """
    return x


METRICS: dict[MetricName, Metric] = {"euclidean": euclidean, "cosine": unit}
"""The metrics by name. Between vectors of length 1, the smallest distance is the largest cosine."""


def search_metric(metric: MetricName | Metric) -> MetricName:
    """Return the metric of the search for tokens and codes that are in their compared form already.

    >>> search_metric("cosine"), search_metric(euclidean)
    ('cosine', 'euclidean')
    """
    return metric if isinstance(metric, str) else "euclidean"
