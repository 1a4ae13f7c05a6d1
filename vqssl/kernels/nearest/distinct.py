"""Which rows of a matrix are equal, at the price of one product with a vector and one sort."""

import torch
from torch import Tensor

__all__ = ["first_equal"]


def first_equal(rows: Tensor) -> Tensor:
    """Return for each row the lowest index of a row that equals it: ``(N, D) -> (N,)`` int64.

    Rows are equal if all their entries are, so that -0.0 equals 0.0, and a row with NaN nothing but itself.

    Equal rows have equal products with a vector, and other rows hardly ever, so that only neighbours in the order of
    these products are compared. Where rounding or a coincidence separates equal rows, the later one counts as new:
    callers may use the result to save work, not to decide whether rows are equal.
    """
    count, width = rows.shape
    index = torch.arange(count, device=rows.device)
    work = torch.promote_types(rows.dtype, torch.float32)
    # Squares of integers modulo 2 pi: no simple sums of them coincide, as those of evenly spaced numbers would.
    direction = torch.arange(1, width + 1, device=rows.device, dtype=torch.float64).square_().sin_().to(work)
    keys, order = torch.mv(rows.to(work), direction).sort(stable=True)
    alike = (keys[1:] == keys[:-1]).nonzero().squeeze(1)
    if not len(alike):
        return index
    equal = (rows[order[alike]] == rows[order[alike + 1]]).all(1)
    continues = torch.zeros_like(index, dtype=torch.bool).index_fill_(0, alike[equal] + 1, True)
    # The sort is stable: each run of equal rows starts with its lowest index.
    starts = order[~continues]
    run = (~continues).cumsum(0) - 1
    return index.index_copy_(0, order, starts[run])
