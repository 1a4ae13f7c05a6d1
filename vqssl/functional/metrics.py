"""Metrics: the form in which tokens and codes are compared."""

from collections.abc import Callable

import torch
from torch import Tensor

from vqssl.checks import check_shape_of_result
from vqssl.functional.vectors import unit
from vqssl.kernels import MetricName

__all__ = ["METRICS", "Metric", "MetricName", "compared_form", "euclidean", "is_comparable", "search_metric"]

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


def compared_form(x: Tensor, metric: MetricName | Metric) -> Tensor:
    """Return tokens or codes ``(*batch, D)`` in the form in which the metric compares them, in the dtype of ``x``.

    Raises:
        ValueError: the metric returns another shape.

    >>> import torch
    >>> compared_form(torch.tensor([3.0, 4.0], dtype=torch.float64), "cosine").tolist()
    [0.6, 0.8]
    """
    if isinstance(metric, str):
        return METRICS[metric](x)
    form = metric(x)
    check_shape_of_result("metric", form, x)
    return form.to(x.dtype)


def is_comparable(x: Tensor, metric: MetricName | Metric) -> Tensor:
    """Return which tokens or codes ``(N, D)`` the metric can compare: by all but the euclidean, not zeros.

    >>> import torch
    >>> is_comparable(torch.eye(3, 2), "cosine").tolist(), is_comparable(torch.eye(3, 2), "euclidean").tolist()
    ([True, True, False], [True, True, True])
    """
    form = compared_form(x, metric)
    return x.new_ones(len(x), dtype=torch.bool) if form is x else (form != 0).any(-1)


def search_metric(metric: MetricName | Metric) -> MetricName:
    """Return the metric of the search for tokens and codes that are in their compared form already.

    >>> search_metric("cosine"), search_metric(euclidean)
    ('cosine', 'euclidean')
    """
    return metric if isinstance(metric, str) else "euclidean"
