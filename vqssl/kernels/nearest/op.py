"""The operator ``vqssl::nearest_codeword`` and its backends on each device.

CUDA tensors go to the Triton kernels, unless Triton cannot run or a tensor is float64. Everything else goes to the
tiled search in PyTorch. Both give the exact answer (see :mod:`vqssl.kernels.nearest`).

A precision other than ``"exact"`` allows a backend to round the input of the product to that format and to skip the
check that makes the answer exact. Only the Triton backend uses this: on a CPU the exact answer costs no more.
"""

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from vqssl.kernels.backends import run_triton
from vqssl.kernels.nearest.tiled import nearest_codeword_tiled
from vqssl.kernels.vmap import unbatched

__all__ = ["METRICS", "PRECISIONS", "MetricName", "nearest_codeword"]

MetricName = Literal["euclidean", "cosine"]
METRICS: tuple[MetricName, ...] = get_args(MetricName)
PRECISIONS = ("exact", "tf32", "fp16", "bf16")


# Annotated as str: the schema of an operator knows no Literal.
@torch.library.custom_op("vqssl::nearest_codeword", mutates_args=())
def nearest_codeword(x: Tensor, codebook: Tensor, metric: str, precision: str = "exact") -> Tensor:
    """Return the index of the code nearest to each token: ``(N, D), (K, D) -> (N,)`` int64.

    Does not validate its input; :func:`vqssl.functional.nearest_codeword` does.
    """
    # Under a caller's autocast the product would run in bfloat16, and the error bound would not hold.
    with torch.autocast(x.device.type, enabled=False):
        return nearest_codeword_tiled(x, codebook, metric)


@nearest_codeword.register_kernel("cuda")
def _(x: Tensor, codebook: Tensor, metric: str, precision: str = "exact") -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        if torch.float64 not in (x.dtype, codebook.dtype):
            arguments = (x, codebook, metric, precision)
            found = run_triton("vqssl.kernels.nearest.search_triton", "nearest_codeword_triton", *arguments)
            if found is not None:
                return found
        return nearest_codeword_tiled(x, codebook, metric)


@nearest_codeword.register_fake
def _(x: Tensor, codebook: Tensor, metric: str, precision: str = "exact") -> Tensor:
    return x.new_empty(x.shape[0], dtype=torch.int64)


@nearest_codeword.register_vmap
def _(info: Any, in_dims: Any, *arguments: Any) -> tuple[Tensor, int]:
    if in_dims[1] is None:  # one codebook for all members: a single search over all their tokens
        tokens = arguments[0].movedim(in_dims[0], 0)
        found = nearest_codeword(tokens.reshape(-1, tokens.shape[-1]), *arguments[1:])
        return found.view(tokens.shape[:-1]), 0
    members = unbatched(info.batch_size, in_dims, arguments)
    return torch.stack([nearest_codeword(*member) for member in members]), 0
