"""The codes of tokens with their squared error, and what a gradient of both means for the tokens.

In tiles on a CPU: nothing of the tokens' size is held besides what is returned.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from vqssl.kernels.workspace import workspace

__all__ = ["look_up", "look_up_backward", "unbatched"]

# Entries of a tile on a CPU, 1 MB of float32: it is still in the cache when it is read again.
_TILE = 2**18


@torch.library.custom_op("vqssl::look_up", mutates_args=())
def look_up(x: Tensor, indices: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """``(N, D), (N,) int64 in [0, K), (K, D) -> (N, D), ()``: ``codes[indices]`` in the dtype of ``x``, and
    ``((x - codes[indices]) ** 2).sum()`` in that of the codes.
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
    found = [look_up(*each) for each in unbatched(info.batch_size, in_dims, arguments)]
    return (torch.stack([q for q, _ in found]), torch.stack([error for _, error in found])), (0, 0)


@torch.library.custom_op("vqssl::look_up_backward", mutates_args=())
def look_up_backward(grad: Tensor, grad_error: Tensor, x: Tensor, indices: Tensor, codes: Tensor) -> Tensor:
    """``(N, D), (), and the arguments of look_up -> (N, D)``: ``grad + 2 grad_error (x - codes[indices])``."""
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
    return torch.stack([look_up_backward(*each) for each in unbatched(info.batch_size, in_dims, arguments)]), 0


def unbatched(size: int, in_dims: Sequence[int | None], arguments: Sequence[Any]) -> Iterator[list[Any]]:
    """The arguments of each member of a vmap, one after the other: the kernels fill the machine with one."""
    for member in range(size):
        yield [
            value if dim is None else value.select(dim, member) for dim, value in zip(in_dims, arguments, strict=True)
        ]


def _tiles(x: Tensor) -> Iterator[slice]:
    rows, width = x.shape
    step = max(1, _TILE // width) if x.device.type == "cpu" else max(1, rows)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
