"""The operators under the modules: tensors in, tensors out.

``nearest_codeword``, ``code_sums``, ``look_up`` and ``look_up_backward`` are operators registered with PyTorch:
compiled and exported graphs can hold them, and all but ``code_sums`` also run under :func:`torch.vmap`. The others are
plain functions of tensors.

They validate nothing: :mod:`vqssl.functional` does. They record no gradient: ``look_up_backward`` computes the one of
``look_up``, and :mod:`vqssl.functional` connects the two.

They change none of their arguments. Two things outlive a call: scratch memory on a CPU, for each thread
(``workspace.py``), and which Triton kernels failed (``backends.py``).
"""

from vqssl.kernels.code_sums import code_sums
from vqssl.kernels.finite import finite_rows
from vqssl.kernels.look_up import look_up, look_up_backward, look_up_plain
from vqssl.kernels.nearest import (
    METRICS,
    PRECISIONS,
    Metric,
    nearest_codeword,
    nearest_codeword_plain,
    nearest_reference,
)

__all__ = [
    "METRICS",
    "PRECISIONS",
    "Metric",
    "code_sums",
    "finite_rows",
    "look_up",
    "look_up_backward",
    "look_up_plain",
    "nearest_codeword",
    "nearest_codeword_plain",
    "nearest_reference",
]
