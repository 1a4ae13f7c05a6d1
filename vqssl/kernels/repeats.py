"""Rows that repeat an earlier row, without a comparison of all pairs."""

import torch
from torch import Tensor

__all__ = ["first_equal_rows", "repeated_rows"]

# Odd constants, as in the finalisers of MurmurHash3.
_MIX_1, _MIX_2 = 0x45D9F3B, 0x27D4EB2F


def repeated_rows(x: Tensor, counted: Tensor | None = None) -> Tensor:
    """Return which rows equal an earlier one.

    Args:
        x: ``(N, D)``, floating.
        counted: ``(N,)`` bool, False for rows that repeat nothing and that nothing repeats.

    Returns:
        ``(N,)`` bool. Zero and minus zero are equal; NaN equals nothing.

    >>> repeated_rows(torch.tensor([[1.0], [2.0], [1.0], [1.0]])).tolist()
    [False, False, True, True]
    """
    return first_equal_rows(x, counted) != torch.arange(len(x), device=x.device)


def first_equal_rows(x: Tensor, counted: Tensor | None = None) -> Tensor:
    """Return for each row the first one that it equals: itself, if no earlier one does.

    Rows are sorted by a hash of their bits, and neighbours compared. Nothing is read from the device. Arguments are
    those of :func:`repeated_rows`.

    Returns:
        ``(N,)`` int64.

    >>> first_equal_rows(torch.tensor([[1.0], [2.0], [1.0], [1.0]])).tolist()
    [0, 1, 0, 0]
    """
    n = len(x)
    places = torch.arange(n, device=x.device)
    if n == 0:
        return places
    x = x.to(torch.promote_types(x.dtype, torch.float32)).contiguous() + 0.0  # minus zero becomes zero
    bits = x.view(torch.int32)
    column = torch.arange(1, bits.shape[1] + 1, device=x.device, dtype=torch.int32)
    mixed = (bits ^ (column * _MIX_1)) * _MIX_2
    mixed = (mixed ^ (mixed >> 15)) * (2 * column + 1)
    key = (mixed ^ (mixed >> 13)).sum(-1, dtype=torch.int32).long()
    if counted is not None:  # beyond all hashes, each apart
        key = torch.where(counted, key, 2**32 + places)
    order = key.argsort(stable=True)
    ordered = x[order]
    same = torch.zeros(n, dtype=torch.bool, device=x.device)
    same[1:] = (ordered[1:] == ordered[:-1]).all(-1) & (key[order][1:] == key[order][:-1])
    start = torch.where(same, 0, places).cummax(0).values  # of each run of equal rows
    return torch.zeros_like(places).scatter(0, order, order[start])
