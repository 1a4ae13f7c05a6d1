r"""How far float32 may misjudge a score, so that a lead by more than that is a proof.

Notation: x and c are a token and a code after centring and scaling, in real numbers; n = D + 8; u is the unit roundoff
of the products' dtype, and r the further rounding of a product's input that the user's settings allow.

*One score.* ``s = x·c - |c|²/2``, without the second term for cosine. It is computed from entries that centring
rounded once each, as a sum of D products and one constant, added in any order. The constant was rounded from float64.
With the standard bound of such a sum (Higham, Accuracy and Stability of Numerical Algorithms, 3.1), the computed score
is off by at most

.. math:: e(c) = \rho \left( |x|\,|c| + |c|^2 / 2 \right) + \text{underflow}, \qquad
    \rho = \frac{n u}{1 - 4 n u} + 3 r .

Here 2u are centring, (D + 1) u the sum, 3u the constant; the rest of n and the denominator cover the terms of higher
order and the rounding of the lengths themselves.

*Two scores.* Let w be the nearest code and b the one with the best computed score B. Then the computed score of w is at
least ``B - e(b) - e(w)``: w is among the codes whose score is at least ``B - margin`` for any margin of at least
``e(b) + e(w)``. If b is alone among them, b is the nearest.

*Which lengths matter.* A bound for all codes would take the longest, and one far code would make every margin large.
But neither b nor w can be far. Let ``S = |x| + √max(|x|² - 2B, 0)``, the length of the token and about its distance
to b. As ``s = |x|²/2 - |x - c|²/2`` and ``|x - c| ≥ |c| - |x|``, a code satisfies
``|x||c| - |c|²/2 ≥ s``. For b, ``B ≤ s + e(b)`` gives ``(1 - ρ)|b|²/2 - (1 + ρ)|x||b| + B ≤ 0``, and solving that

.. math:: (1 - \rho)\,|b| \le (1 + \rho)\,|x| + \sqrt{(|x|^2 - 2 B)^+ + (3 \rho + \rho^2)\,|x|^2}
    \quad\Rightarrow\quad |b| \le (1 + 2 \sqrt{\rho})\, S \quad \text{if } \rho \le 1/100 .

For w, ``s(w) ≥ s(b) ≥ B - e(b)`` gives ``|w| ≤ |x| + √((|x|² - 2B)⁺ + 2 e(b))``, and ``2 e(b) ≤ 3.9 ρ S²`` by the
line above, so that ``|w| ≤ (1 + 2√ρ) S`` too. Rounding changes ``|x|² - 2B`` by at most ``1.5 ρ S²``, that is S by
``1.3 √ρ S``. So :func:`margin` computes ``2 e`` for a code of length ``(1 + 4√ρ) S``, or of the longest code's length
where that is less; what e may lose to underflow is added under the root.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Bound", "margin"]


class Bound(NamedTuple):
    """What the margins of a search depend on, besides the token and its best score."""

    relative: float
    """ρ of the module's text."""
    underflow: float
    """What each of D terms may lose below the smallest normal number, for entries up to 1."""
    longest: Tensor
    """Scalar: the length of the longest code."""
    constant: bool
    """True if scores have the constant -|c|²/2."""

    @classmethod
    def of(cls, width: int, work: torch.dtype, longest: Tensor, constant: bool) -> "Bound":
        """Return the bound for products of ``width`` terms in dtype ``work``."""
        info = torch.finfo(work)
        terms = width + 8
        rounding = terms * info.eps / 2
        relative = rounding / (1 - 4 * rounding) if 4 * rounding < 1 else math.inf
        return cls(relative + 3 * _input_roundoff(work), 4 * terms * info.tiny, longest, constant)


def margin(length: Tensor, best: Tensor, bound: Bound) -> Tensor:
    """Return twice the error bound of the scores that decide each row; infinite or NaN where a score overflowed.

    Args:
        length: ``(R,)``, |x| of each token.
        best: ``(R,)``, the best computed score of each token.
        bound: of the search.
    """
    relative = bound.relative
    reach = bound.longest.expand_as(length)
    if bound.constant and relative <= 0.01:
        distance = torch.rsub(best, 16.0 * bound.underflow, alpha=2.0).addcmul_(length, length).clamp_(min=0.0).sqrt_()
        reach = torch.minimum(reach, distance.add_(length).mul_(1.0 + 4.0 * math.sqrt(relative)))
    size = length * reach
    if bound.constant:
        size = size.addcmul_(reach, reach, value=0.5)
    return size.mul_(2.0 * relative).add_((length + reach).add_(1.0), alpha=2.0 * bound.underflow)


def _input_roundoff(work: torch.dtype) -> float:
    """Return how far a product may round its input, beyond its dtype, by ``torch.set_float32_matmul_precision``."""
    if work != torch.float32:
        return 0.0
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # torch raises if its old and its new switches were both used: assume the worst
        precision = "medium"
    return {"highest": 0.0, "high": 2.0**-11}.get(precision, 2.0**-8)
