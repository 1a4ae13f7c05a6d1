"""Nearest-codeword search: for each token, the index of the code that is nearest to it.

====================  =============================================================================================
``op``                the operator ``vqssl::nearest_codeword``, which chooses the backend
``rule``              what all backends return: float64, the lowest index wins ties; its slowest form, for tests
``tiled``             PyTorch on any device: one matrix product, an error bound, and a closer look at close calls;
                      its steps are ``prepare``, ``product``, ``looks``, ``margin``, ``settle``, ``whole``
``search_triton``     CUDA, by Triton kernels: ``prepare_triton`` rounds the codes, ``looks_triton`` compares
``tuning``            block sizes of the Triton kernels
``plain``             the search in standard operators, for export to ONNX: float32, not exact
====================  =============================================================================================
"""

from vqssl.kernels.nearest.op import METRICS, PRECISIONS, MetricName, nearest_codeword
from vqssl.kernels.nearest.plain import nearest_codeword_plain
from vqssl.kernels.nearest.rule import nearest_reference

__all__ = [
    "METRICS",
    "PRECISIONS",
    "MetricName",
    "nearest_codeword",
    "nearest_codeword_plain",
    "nearest_reference",
]
