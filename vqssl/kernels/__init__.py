"""Tensors in, tensors out: no module, no gradient, no state."""

from vqssl.kernels.code_sums import code_sums
from vqssl.kernels.nearest import METRICS, nearest_codeword, nearest_reference

__all__ = ["METRICS", "code_sums", "nearest_codeword", "nearest_reference"]
