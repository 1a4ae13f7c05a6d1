"""Tensors in, tensors out: no module, no gradient, no state."""

from vqssl.kernels.code_sums import code_sums
from vqssl.kernels.look_up import look_up, look_up_backward
from vqssl.kernels.nearest import METRICS, PRECISIONS, finite_rows, nearest_codeword, nearest_reference
from vqssl.kernels.plain import look_up_plain, nearest_codeword_plain
from vqssl.kernels.squared_error import squared_error, squared_error_backward, squared_error_plain

__all__ = [
    "METRICS",
    "PRECISIONS",
    "code_sums",
    "finite_rows",
    "look_up",
    "look_up_backward",
    "look_up_plain",
    "nearest_codeword",
    "nearest_codeword_plain",
    "nearest_reference",
    "squared_error",
    "squared_error_backward",
    "squared_error_plain",
]
