"""Power iteration of spectral norm, for modules that no forward pass in training mode keeps up to date."""

import torch
from torch import nn
from torch.nn.utils import parametrize

__all__ = ["is_power_iteration_vector", "iterate_spectral_norms_"]


def is_power_iteration_vector(name: str) -> bool:
    """Return True for the buffers ``_u`` and ``_v`` of ``torch.nn.utils.parametrizations.spectral_norm``.

    >>> is_power_iteration_vector("0.parametrizations.weight.0._u"), is_power_iteration_vector("0.bias_v")
    (True, False)
    """
    *path, last = name.split(".")
    return last in ("_u", "_v") and "parametrizations" in path


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
        if not isinstance(part, parametrize.ParametrizationList):
            continue
        with_vectors = [each for each in part if {"_u", "_v"} <= dict(each.named_buffers(recurse=False)).keys()]
        was_training = [each.training for each in with_vectors]
        for each in with_vectors:
            each.train()
        if with_vectors:
            part()
        for each, training in zip(with_vectors, was_training, strict=True):
            each.train(training)
