"""Rows that repeat an earlier row, without a comparison of all pairs."""

import torch
from torch import Tensor

__all__ = ["repeated_rows"]

# Odd constants, as in the finalisers of MurmurHash3.
_MIX_1, _MIX_2 = 0x45D9F3B, 0x27D4EB2F


def repeated_rows(x: Tensor, counted: Tensor | None = None) -> Tensor:
    """Return which rows equal an earlier one.

    Rows are sorted by a hash of their bits, and neighbours compared. Nothing is read from the device.

    Args:
        x: ``(N, D)`` float32 or float64.
        counted: ``(N,)`` bool, False for rows that repeat nothing and that nothing repeats.

    Returns:
        ``(N,)`` bool. Zero and minus zero are equal; NaN equals nothing.

    >>> repeated_rows(torch.tensor([[1.0], [2.0], [1.0], [1.0]])).tolist()
    [False, False, True, True]
    """
    n = len(x)
    if n == 0:
        return torch.zeros(0, dtype=torch.bool, device=x.device)
    x = x.clone(memory_format=torch.contiguous_format).add_(0.0)  # minus zero becomes zero
    bits = x.view(torch.int32)
    place = torch.arange(1, bits.shape[1] + 1, device=x.device, dtype=torch.int32)
    mixed = (bits ^ (place * _MIX_1)) * _MIX_2
    mixed = (mixed ^ (mixed >> 15)) * (2 * place + 1)
    key = (mixed ^ (mixed >> 13)).sum(-1, dtype=torch.int32).long()
    if counted is not None:  # beyond all hashes, each apart
        key = torch.where(counted, key, 2**32 + torch.arange(n, device=x.device))
    order = key.argsort(stable=True)
    ordered = x[order]
    same = torch.zeros(n, dtype=torch.bool, device=x.device)
    same[1:] = (ordered[1:] == ordered[:-1]).all(-1) & (key[order][1:] == key[order][:-1])
    return torch.zeros_like(same).scatter(0, order, same)
