"""The public face of the nearest-codeword search: validated, for tokens of any leading shape."""

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
    r"""Index of the code nearest to each token, Eq. 4 of DiSSECT (arXiv 2509.18765).

    .. math:: k_i = \arg\min_j \lVert z_i - e_j \rVert^2 \quad\text{or}\quad
        k_i = \arg\max_j \frac{\langle z_i, e_j \rangle}{\lVert z_i \rVert \lVert e_j \rVert}

    The answer is exact unless a ``precision`` is named: it is the nearest code in float64 to the values as they were
    given, whatever their dtype and whatever precision torch's matrix products are set to. The lowest index wins ties,
    also between equal codes.
    The ``N x K`` matrix of distances is never held. No gradient passes. In a model exported to ONNX it becomes ONNX's
    own operators: float32 scores, not certified, and the matrix is held.

    Args:
        x: tokens ``(*batch, D)``, float16, bfloat16, float32 or float64, of any strides; ``*batch`` may be empty.
        codebook: codes ``(K, D)``, floating, K >= 1.
        metric: ``"euclidean"``, ``"cosine"``, or a function ``(*batch, D) -> (*batch, D)`` that maps tokens and codes
            to the form in which euclidean distance compares them.
        precision: ``"exact"``; or ``"tf32"``, ``"fp16"``, ``"bf16"``: the search may compare scores of tokens and codes
            rounded to that format, which on a GPU saves the check that makes it exact, and is worse for some tokens; or
            ``"torch"``: what :func:`torch.get_float32_matmul_precision` says, highest (exact), high (tf32), medium
            (bf16). On a CPU all are exact.

    Returns:
        ``(*batch,)`` int64. A token with NaN or an infinity has no nearest code and gets -1: a value that no look-up
        accepts silently, and that, unlike an exception, costs no wait for the device. Codes with NaN or an infinity are
        never chosen.

    Raises:
        TypeError: ``x`` or ``codebook`` is no floating tensor.
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
            f"{tuple(codebook.shape)}: maps with channels first have to be rearranged, 'b c ... -> b ... c'"
        )
    if x.device != codebook.device:
        raise ValueError(
            f"x and codebook must be on one device, got {x.device} and {codebook.device}: write codebook.to(x.device)"
        )
    if not isinstance(metric, str):
        return search(as_compared(x), as_compared(codebook), "euclidean", precision)
    return search(x, codebook, metric, precision)


def search(x: Tensor, codebook: Tensor, metric: MetricName, precision: PrecisionName) -> Tensor:
    """:func:`nearest_codeword` without the checks; in plain torch while a model is being exported to ONNX."""
    flat, codes = x.detach().reshape(-1, x.shape[-1]), codebook.detach()
    if torch.onnx.is_in_onnx_export():
        found = kernels.nearest_codeword_plain(flat, codes, metric)
    else:
        found = kernels.nearest_codeword(flat, codes, metric, resolve_precision(precision))
    return found.reshape(x.shape[:-1])


def check_precision(precision: str) -> None:
    """Raise unless ``precision`` is a known name."""
    names = (*kernels.PRECISIONS, "torch")
    if precision not in names:
        raise ValueError(f"precision must be one of {', '.join(map(repr, names))}, got {precision!r}")


def resolve_precision(precision: str) -> str:
    """Return the precision that ``"torch"`` stands for now; other names stand for themselves."""
    if precision != "torch":
        return precision
    return {"highest": "exact", "high": "tf32", "medium": "bf16"}[torch.get_float32_matmul_precision()]
