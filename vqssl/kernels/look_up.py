"""The operators ``vqssl::look_up`` and ``vqssl::look_up_backward``: the codes of tokens and their squared error.

On a CPU both work in tiles: apart from what they return, they hold nothing of the size of the tokens.
:func:`vqssl.functional.look_up.look_up` connects them to autograd.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from vqssl.kernels.vmap import unbatched
from vqssl.kernels.workspace import workspace

__all__ = ["look_up", "look_up_backward", "look_up_plain"]

TILE = 2**18
"""Entries of a tile on a CPU: 1 MB of float32, still in the cache when it is read again."""


@torch.library.custom_op("vqssl::look_up", mutates_args=())
def look_up(x: Tensor, indices: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Return the code of each token and the sum of squared errors: ``(N, D), (N,), (K, D) -> (N, D), ()``.

    The indices are int64 in [0, K). The first result is ``codes[indices]`` in the dtype of ``x``; the second is
    ``((x - codes[indices]) ** 2).sum()`` in the dtype of the codes.
    """
    found = x.new_empty(x.shape)
    errors = [codes.new_zeros(())]
    for rows in _tiles(x):
        residual = workspace("residual", codes.dtype, x.device, *x[rows].shape)
        torch.index_select(codes, 0, indices[rows], out=residual)
        found[rows] = residual
        errors.append(torch.sub(x[rows], residual, out=residual).square_().sum())
    return found, torch.stack(errors).sum()


@look_up.register_fake
def _(x: Tensor, indices: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), codes.new_empty(())


@look_up.register_vmap
def _(info: Any, in_dims: Any, *arguments: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    results = [look_up(*member) for member in unbatched(info.batch_size, in_dims, arguments)]
    return (torch.stack([found for found, _ in results]), torch.stack([error for _, error in results])), (0, 0)


@torch.library.custom_op("vqssl::look_up_backward", mutates_args=())
def look_up_backward(grad: Tensor, grad_error: Tensor, x: Tensor, indices: Tensor, codes: Tensor) -> Tensor:
    r"""Return the gradient of :func:`look_up` with respect to the tokens, straight through the codes.

    .. math:: g + 2\, g_\text{error}\, (x - c_k)

    Args:
        grad: ``(N, D)``, the gradient of the codes that were looked up; it passes to the tokens unchanged.
        grad_error: scalar, the gradient of the squared error.
        x: tokens ``(N, D)``.
        indices: ``(N,)`` int64 in [0, K).
        codes: ``(K, D)``.

    Returns:
        ``(N, D)`` in the dtype of ``x``.
    """
    result = x.new_empty(x.shape)
    for rows in _tiles(x):
        residual = workspace("residual", codes.dtype, x.device, *x[rows].shape)
        torch.index_select(codes, 0, indices[rows], out=residual)
        torch.sub(x[rows], residual, out=residual).mul_(2 * grad_error)
        torch.add(grad[rows], residual, out=result[rows])
    return result


@look_up_backward.register_fake
def _(grad: Tensor, grad_error: Tensor, x: Tensor, indices: Tensor, codes: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@look_up_backward.register_vmap
def _(info: Any, in_dims: Any, *arguments: Tensor) -> tuple[Tensor, int]:
    members = unbatched(info.batch_size, in_dims, arguments)
    return torch.stack([look_up_backward(*member) for member in members]), 0


def look_up_plain(x: Tensor, indices: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Compute :func:`look_up` by PyTorch's standard operators, for export to ONNX."""
    found = torch.nn.functional.embedding(indices, codes)
    return found.to(x.dtype), (x - found).square().sum()


def _tiles(x: Tensor) -> Iterator[slice]:
    """Yield slices of rows, each a tile; on other devices than a CPU, all rows at once."""
    rows, width = x.shape
    step = max(1, TILE // width) if x.device.type == "cpu" else max(1, rows)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
