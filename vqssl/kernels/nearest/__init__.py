"""Nearest-codeword search: for each token, the index of the code that is nearest to it.

All backends follow one rule, and :func:`nearest_reference` states it in its slowest form:

- The answer is the code nearest in **float64** to the values as given, whatever the dtype of the input.
- The lowest index wins ties, also between equal codes.
- A token with NaN or an infinity has no nearest code: its index is -1. It is reported, not raised: raising would
  synchronise with the device at every step and break CUDA graphs.
- A code with NaN or an infinity is never chosen. If no finite code is left, every index is -1.

The metric is ``"euclidean"`` (smallest distance) or ``"cosine"`` (largest inner product with codes of length 1; a zero
code has similarity 0 with every token).

====================  =============================================================================================
``op``                the operator ``vqssl::nearest_codeword``, which chooses the backend
``reference``         the rule, for tests: float64, every pair at once
``tiled``             PyTorch on any device: one matrix product, an error bound, and a second look at close calls
``search_triton``     CUDA, by Triton kernels: ``prepare_triton`` rounds the codes, ``looks_triton`` compares
``tuning``            block sizes of the Triton kernels
``plain``             the search in standard operators, for export to ONNX: float32, not exact
====================  =============================================================================================
"""

from vqssl.kernels.nearest.op import METRICS, PRECISIONS, MetricName, nearest_codeword
from vqssl.kernels.nearest.plain import nearest_codeword_plain
from vqssl.kernels.nearest.reference import nearest_reference

__all__ = [
    "METRICS",
    "PRECISIONS",
    "MetricName",
    "nearest_codeword",
    "nearest_codeword_plain",
    "nearest_reference",
]
