"""Squared error between tokens and their codes, and its gradient, without holding the code of every token.

On a CPU both run in tiles that stay in the cache, so that nothing of the tokens' size is held besides the gradient.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from vqssl.kernels.vmap import unbatched
from vqssl.kernels.workspace import Workspace, workspace

__all__ = ["squared_error", "squared_error_backward", "squared_error_plain"]

TILE = 2**18
"""Entries of a tile on a CPU: 1 MB of float32, still in the cache when it is read again."""


@torch.library.custom_op("vqssl::squared_error", mutates_args=())
def squared_error(x: Tensor, indices: Tensor, codes: Tensor, masked: bool = False) -> Tensor:
    """Return ``((x - codes[indices]) ** 2).sum()`` in the dtype of the codes.

    Args:
        x: tokens ``(*batch, D)``.
        indices: ``(*batch,)`` int64 from 0 to K - 1; not checked.
        codes: ``(K, D)``.
        masked: True if an index may be -1: such a token does not count, whatever it holds.
    """
    x, indices = x.reshape(-1, x.shape[-1]), indices.reshape(-1)
    with workspace() as memory:
        errors = [_residual(x[rows], indices[rows], codes, masked, memory).square_().sum() for rows in _tiles(x)]
    return errors[0] if len(errors) == 1 else torch.stack([codes.new_zeros(()), *errors]).sum()


@squared_error.register_fake
def _(x: Tensor, indices: Tensor, codes: Tensor, masked: bool = False) -> Tensor:
    return codes.new_empty(())


@squared_error.register_vmap
def _(info: Any, in_dims: Any, *arguments: Any) -> tuple[Tensor, int]:
    return torch.stack([squared_error(*each) for each in unbatched(info.batch_size, in_dims, arguments)]), 0


@torch.library.custom_op("vqssl::squared_error_backward", mutates_args=())
def squared_error_backward(grad: Tensor, x: Tensor, indices: Tensor, codes: Tensor, masked: bool = False) -> Tensor:
    """Return ``2 grad (x - codes[indices])``, ``(*batch, D)`` in the dtype of ``x``, for a scalar ``grad``.

    The result is a tensor of its own, not a view: autograd then adds other gradients of the tokens to it in place.
    """
    result = x.new_empty(x.shape)
    x, indices, flat = x.reshape(-1, x.shape[-1]), indices.reshape(-1), result.view(-1, x.shape[-1])
    with workspace() as memory:
        for rows in _tiles(x):
            torch.mul(_residual(x[rows], indices[rows], codes, masked, memory), 2 * grad, out=flat[rows])
    return result


@squared_error_backward.register_fake
def _(grad: Tensor, x: Tensor, indices: Tensor, codes: Tensor, masked: bool = False) -> Tensor:
    return x.new_empty(x.shape)


@squared_error_backward.register_vmap
def _(info: Any, in_dims: Any, *arguments: Any) -> tuple[Tensor, int]:
    return torch.stack([squared_error_backward(*each) for each in unbatched(info.batch_size, in_dims, arguments)]), 0


def squared_error_plain(x: Tensor, indices: Tensor, codes: Tensor, masked: bool = False) -> Tensor:
    """Return what :func:`squared_error` returns, in operators that can be exported."""
    residual = x - torch.nn.functional.embedding(indices.clamp_min(0), codes)
    return (torch.where((indices >= 0)[..., None], residual, 0.0) if masked else residual).square().sum()


def _residual(x: Tensor, indices: Tensor, codes: Tensor, masked: bool, memory: Workspace) -> Tensor:
    """Return ``x - codes[indices]``, zeros where masked, in memory that the next call overwrites."""
    residual = memory.empty("residual", codes.dtype, x.device, *x.shape)
    torch.index_select(codes, 0, indices.clamp_min(0) if masked else indices, out=residual)
    torch.sub(x, residual, out=residual)
    if not masked:
        return residual
    if x.device.type == "cpu":  # a fifth of the time of masked_fill_; elsewhere nonzero would synchronise
        return residual.index_fill_(0, (indices < 0).nonzero().squeeze(1), 0.0)
    return residual.masked_fill_((indices < 0)[:, None], 0.0)


def _tiles(x: Tensor) -> Iterator[slice]:
    """Yield slices of rows, each a tile; on other devices than a CPU, all rows at once."""
    rows, width = x.shape
    step = max(1, TILE // width) if x.device.type == "cpu" else max(1, rows)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
