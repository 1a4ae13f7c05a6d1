"""Power iteration of spectral norm, for modules that no forward pass in training mode keeps up to date."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm

__all__ = ["is_power_iteration_vector", "iterate_spectral_norms_", "vectors_of_older_spectral_norms"]


class _PowerIteration(NamedTuple):
    """A matrix ``(H, W)``, and the vectors ``(H,)`` and ``(W,)`` that iterate towards its norm, in this order."""

    matrix: Tensor
    first: Tensor
    second: Tensor
    eps: float


def is_power_iteration_vector(name: str) -> bool:
    """Return True for the buffers ``_u`` and ``_v`` of ``torch.nn.utils.parametrizations.spectral_norm``.

    >>> is_power_iteration_vector("0.parametrizations.weight.0._u"), is_power_iteration_vector("0.bias_v")
    (True, False)
    """
    *path, last = name.split(".")
    return last in ("_u", "_v") and "parametrizations" in path


def vectors_of_older_spectral_norms(module: nn.Module) -> frozenset[str]:
    """Return the names of the vectors of ``torch.nn.utils.spectral_norm``, which are known by its hooks alone.

    >>> sorted(vectors_of_older_spectral_norms(nn.Sequential(nn.utils.spectral_norm(nn.Linear(2, 2)))))
    ['0.weight_u', '0.weight_v']
    """
    return frozenset(
        f"{path}.{hook.name}{end}" if path else f"{hook.name}{end}"
        for path, part in module.named_modules()
        for hook in _hooks(part)
        for end in ("_u", "_v")
    )


@torch.no_grad()
def iterate_spectral_norms_(module: nn.Module) -> None:
    """Take one power iteration for each weight with spectral norm, as a forward pass in training mode does.

    >>> layer = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)).eval()
    >>> for _ in range(200):
    ...     iterate_spectral_norms_(layer)
    >>> round(torch.linalg.matrix_norm(layer.weight, 2).item(), 3), layer.training
    (1.0, False)
    """
    for part in module.modules():
        for matrix, first, second, eps in [*_newer(part), *_older(part)]:
            first.copy_(nn.functional.normalize(torch.mv(matrix, second), dim=0, eps=eps))
            second.copy_(nn.functional.normalize(torch.mv(matrix.mH, first), dim=0, eps=eps))


def _newer(part: Any) -> Iterator[_PowerIteration]:
    if not isinstance(part, parametrize.ParametrizationList) or not part.is_tensor:
        return
    weight = _whole(part.original)
    each: Any
    for each in part:
        vectors = dict(each.named_buffers(recurse=False))
        if vectors.keys() == {"_u", "_v"}:
            rows = weight.movedim(each.dim, 0).flatten(1)
            yield _PowerIteration(rows, vectors["_u"], vectors["_v"], each.eps)
        if len(part) > 1:  # those behind it see its result
            weight = each(weight)


def _older(part: nn.Module) -> Iterator[_PowerIteration]:
    for hook in _hooks(part):
        weight = _whole(getattr(part, f"{hook.name}_orig"))
        u, v = getattr(part, f"{hook.name}_u"), getattr(part, f"{hook.name}_v")
        yield _PowerIteration(hook.reshape_weight_to_matrix(weight).mH, v, u, hook.eps)  # v is the first here


def _hooks(part: nn.Module) -> list[SpectralNorm]:
    return [hook for hook in part._forward_pre_hooks.values() if isinstance(hook, SpectralNorm)]


def _whole(weight: Any) -> Tensor:
    """Return a sharded weight whole: its norm is that of all of it. Every rank has to call this."""
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight
