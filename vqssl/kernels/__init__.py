"""The operators under the modules: tensors in, tensors out.

``nearest_codeword``, ``code_sums``, ``squared_error`` and ``squared_error_backward`` are operators registered with
PyTorch: compiled and exported graphs can hold them, and all but ``code_sums`` also run under :func:`torch.vmap`. The
others are plain functions of tensors.

They validate nothing: :mod:`vqssl.functional` does. They record no gradient: ``squared_error_backward`` computes that
of ``squared_error``, and :mod:`vqssl.functional` connects the two.

They change none of their arguments. Two things outlive a call: scratch memory on a CPU, for each thread
(``workspace.py``), and which Triton kernels failed (``backends.py``).
"""

from vqssl.kernels.code_sums import code_sums
from vqssl.kernels.finite import finite_rows
from vqssl.kernels.nearest import (
    METRICS,
    PRECISIONS,
    MetricName,
    nearest_codeword,
    nearest_codeword_plain,
    nearest_reference,
)
from vqssl.kernels.squared_error import squared_error, squared_error_backward, squared_error_plain

__all__ = [
    "METRICS",
    "PRECISIONS",
    "MetricName",
    "code_sums",
    "finite_rows",
    "nearest_codeword",
    "nearest_codeword_plain",
    "nearest_reference",
    "squared_error",
    "squared_error_backward",
    "squared_error_plain",
]
