"""Codes that are set apart before the search, because they would make close calls of clear ones.

- *Copies*: of equal codes the lowest index wins, so the others are left out. Otherwise every row that is nearest to
  such a code would have to be compared again in float64.
- *Far codes*: the error bound grows with the longest code. A single code at a thousand times the usual distance would
  make most rows uncertain. Far codes are left out too, and rows that may be nearest to one are searched again with all
  codes. If a far code is at least F from the centre of the others, and those at most R, then a token x cannot be
  nearest to it where ``F - |x| > |x| + R``: it is at least ``F - |x|`` away, and some other at most ``|x| + R``.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vqssl.kernels.finite import finite_rows
from vqssl.kernels.nearest.rule import exact_codes
from vqssl.kernels.repeats import repeated_rows

__all__ = ["FarCodes", "candidates_for_far_codes", "far_codes", "first_of_equals"]

FAR = 8.0
"""Codes at more than this many times the median distance from their centre are far."""
ROUNDS = 4
"""How often far codes are looked for: a very far one hides those that are less far."""


def first_of_equals(codebook: Tensor, metric: str) -> Tensor:
    """Return which finite codes equal no finite code of a lower index: ``(K, D) -> (K,)`` bool."""
    finite = finite_rows(codebook)
    wide = codebook.to(torch.promote_types(codebook.dtype, torch.float32))
    # Equal codes have equal lengths: sorting those is cheaper than comparing the codes.
    lengths = torch.linalg.vector_norm(wide, dim=1).sort().values
    if metric == "euclidean" and not (lengths[1:] == lengths[:-1]).any():
        return finite
    return finite & ~repeated_rows(exact_codes(codebook, metric) if metric == "cosine" else wide, finite)


class FarCodes(NamedTuple):
    """The far codes of a codebook.

    Attributes:
        members: ``(K,)`` bool.
        centre: ``(D,)`` float64, the mean of the other codes.
        least: scalar, the least distance of a far code from the centre.
        others: scalar, the largest distance of another code.
    """

    members: Tensor
    centre: Tensor
    least: Tensor
    others: Tensor


def far_codes(codebook: Tensor, usable: Tensor) -> FarCodes | None:
    """Return the far codes among the usable ones; None if there are none."""
    codes = torch.where(usable[:, None], codebook, 0.0).double()
    near = usable
    for _ in range(ROUNDS):
        centre = torch.where(near[:, None], codes, 0.0).sum(0) / near.sum().clamp_min(1)
        distance = torch.where(usable, (codes - centre).norm(dim=1), 0.0)
        still = near & (distance <= FAR * distance[near].median()) if near.any() else near
        if torch.equal(still, near):
            break
        near = still
    members = usable & ~near
    if not members.any():
        return None
    centre = torch.where(near[:, None], codes, 0.0).sum(0) / near.sum()
    distance = (codes - centre).norm(dim=1)
    return FarCodes(members, centre, distance[members].amin(), distance[near].amax())


def candidates_for_far_codes(x: Tensor, far: FarCodes) -> Tensor:
    """Return the rows that may be nearest to a far code: ``(N, D) -> (R,)`` int64."""
    lengths = torch.cat([(rows.double() - far.centre).norm(dim=1) for rows in x.split(2**12)])
    # The slack covers the rounding of all distances many times over.
    return (~(2 * lengths < (1 - 1e-6) * far.least - far.others)).nonzero().squeeze(1)
