"""The nearest-codeword search for users: checked, for tokens of any leading shape."""

from typing import Literal

import torch
from torch import Tensor

from vqssl import kernels
from vqssl.checks import by_name, check_floating
from vqssl.functional.metrics import METRICS, Metric, MetricName

__all__ = ["PrecisionName", "check_precision", "nearest_codeword", "resolve_precision", "search"]

PrecisionName = Literal["exact", "tf32", "fp16", "bf16", "torch"]


def nearest_codeword(
    x: Tensor, codebook: Tensor, metric: MetricName | Metric = "euclidean", *, precision: PrecisionName = "exact"
) -> Tensor:
    r"""Return the index of the code nearest to each token, equation 4 of DiSSECT (arXiv 2509.18765).

    .. math:: k_i = \arg\min_j \lVert z_i - e_j \rVert^2 \quad\text{or}\quad
        k_i = \arg\max_j \frac{\langle z_i, e_j \rangle}{\lVert z_i \rVert \lVert e_j \rVert}

    By default the answer is exact: the code that is nearest in float64 to the values as given. It depends neither on
    their dtype nor on the precision that torch's matrix products are set to. The lowest index wins ties, also between
    equal codes. The ``N x K`` matrix of distances is never held, and no gradient passes.

    A model exported to ONNX searches by ONNX's own operators: in float32, not exact, and it holds the matrix.

    Args:
        x: tokens ``(*batch, D)``, float16, bfloat16, float32 or float64, of any strides; ``*batch`` may be empty.
        codebook: codes ``(K, D)``, floating, K >= 1 and D >= 1.
        metric: ``"euclidean"``, ``"cosine"``, or a function ``(*batch, D) -> (*batch, D)`` that maps tokens and codes
            to the form in which euclidean distance compares them.
        precision: ``"exact"``; or ``"tf32"``, ``"fp16"`` or ``"bf16"``, which allow a GPU to compare scores of tokens
            and codes rounded to that format: faster, and wrong for some tokens; or ``"torch"``, which follows
            :func:`torch.get_float32_matmul_precision`: highest is exact, high is tf32, medium is bf16. On a CPU all
            of them are exact.

    Returns:
        ``(*batch,)`` int64. A token with NaN or an infinity has no nearest code and gets -1: unlike an exception, this
        does not synchronise with the device. (Do not index with -1: ``codebook[-1]`` is the last code.) A code with NaN
        or an infinity is never chosen.

    Raises:
        TypeError: ``x`` or ``codebook`` is not a floating tensor.
        ValueError: the widths differ, ``codebook`` is not ``(K, D)`` with K >= 1 and D >= 1, the devices differ,
            or the metric or the precision is unknown.

    >>> import torch
    >>> codes = torch.tensor([[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]])
    >>> nearest_codeword(torch.tensor([[0.9, 0.8], [0.1, -3.0], [float("nan"), 0.0]]), codes)
    tensor([ 1,  0, -1])
    """
    as_compared = by_name("metric", metric, METRICS)
    check_precision(precision)
    check_floating("codebook", codebook)
    if codebook.ndim != 2 or 0 in codebook.shape:
        raise ValueError(
            f"codebook must be (K, D) with at least one code of at least one entry, got shape {tuple(codebook.shape)}"
        )
    check_floating("x", x)
    if x.ndim < 1 or x.shape[-1] != codebook.shape[1]:
        raise ValueError(
            f"x and codebook must have one width D in their last axis, got shapes {tuple(x.shape)} and "
            f"{tuple(codebook.shape)}"
        )
    if x.device != codebook.device:
        raise ValueError(
            f"x and codebook must be on one device, got {x.device} and {codebook.device}: write codebook.to(x.device)"
        )
    if not isinstance(metric, str):
        return search(as_compared(x), as_compared(codebook), "euclidean", precision)
    return search(x, codebook, metric, precision)


def search(x: Tensor, codebook: Tensor, metric: MetricName, precision: PrecisionName) -> Tensor:
    """Compute :func:`nearest_codeword` without the checks, by standard operators during an export to ONNX."""
    flat = x.detach() if x.ndim == 2 else x.detach().reshape(-1, x.shape[-1])
    codes = codebook.detach() if codebook.requires_grad else codebook
    if torch.onnx.is_in_onnx_export():
        found = kernels.nearest_codeword_plain(flat, codes, metric)
    else:
        found = kernels.nearest_codeword(flat, codes, metric, resolve_precision(precision))
    return found if x.ndim == 2 else found.reshape(x.shape[:-1])


def check_precision(precision: str) -> None:
    """Raise ValueError if ``precision`` is not a name that :func:`nearest_codeword` takes."""
    names = (*kernels.PRECISIONS, "torch")
    if precision not in names:
        raise ValueError(f"precision must be one of {', '.join(map(repr, names))}, got {precision!r}")


def resolve_precision(precision: str) -> str:
    """Return the current precision for ``"torch"``; return other names as they are."""
    if precision != "torch":
        return precision
    return {"highest": "exact", "high": "tf32", "medium": "bf16"}[torch.get_float32_matmul_precision()]
