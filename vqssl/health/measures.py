"""Measure a codebook: functions of codes and counts, in float64. None of them holds K x K distances."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from vqssl.checks import check_alike, check_floating, check_range
from vqssl.functional import nearest_codeword

__all__ = [
    "CodeMeasures", "CountMeasures", "MovementMeasures", "code_spread", "distinct_places", "drift", "dying_codes",
    "effective_dimension", "even_use", "near_duplicate_distance", "nearest_distances", "spectrum", "tokens_per_code",
    "turnover",
]  # fmt: skip

CHUNK_ENTRIES = 2**22
"""Distances in memory at once: 32 MiB of float64, whatever K is."""


class CountMeasures(NamedTuple):
    """Measures of the running counts. :class:`vqssl.health.CodebookHealth` says what each field is."""

    updates: int | None
    decay: float
    tokens_per_step: float | None
    start_share: float | None
    dead_below: float
    perplexity: float
    usage: float
    dead: int
    dying: int
    not_counts: int
    shares: Tensor


class CodeMeasures(NamedTuple):
    """Measures of where the codes lie. :class:`vqssl.health.CodebookHealth` says what each field is."""

    not_finite: int
    equal: int = 0
    spread: float = 0.0
    used_spread: float = 0.0
    norm: float = 0.0
    norm_spread: float = 0.0
    near_duplicates: int = 0
    effective_dimension: float | None = None
    nearest_min: float | None = None
    nearest_median: float | None = None
    places: float | None = None
    nearest: Tensor = torch.empty(0)
    eigenvalues: Tensor = torch.empty(0)


class MovementMeasures(NamedTuple):
    """Measures of the change since an earlier examination. :class:`vqssl.health.CodebookHealth` describes them."""

    since_initialized: bool | None = None
    updates_since: int | None = None
    drift: float | None = None
    turnover: float | None = None


def code_spread(codes: Tensor) -> Tensor:
    r"""Return the root mean square distance of the codes from their mean: the unit S of other distances.

    .. math:: S = \sqrt{\tfrac{1}{K} \textstyle\sum_k \lVert e_k - \bar e \rVert^2}

    Args:
        codes: ``(K, D)``, finite.

    Returns:
        Scalar float64; 0 if all codes are equal.

    Raises:
        TypeError: ``codes`` is not a floating tensor.
        ValueError: it is not ``(K, D)`` with K, D >= 1.

    >>> import torch
    >>> code_spread(torch.tensor([[3.0, 0.0], [-3.0, 0.0]])).item()
    3.0
    """
    codes = _float64("codes", codes)
    if bool((codes == codes[:1]).all()):
        return codes.new_zeros(())  # exactly: subtracting the mean would leave rounding
    return (codes - codes.mean(0)).square().sum(1).mean().sqrt()


def dying_codes(counts: Tensor, dead_below: float = 0.1) -> Tensor:
    r"""Count the codes that are alive, but dead after another 1 / (1 - decay) updates without tokens.

    Without tokens a running count is multiplied by the decay at each update, so it falls to 1/e of itself in
    1 / (1 - decay) updates. With tau for ``dead_below`` the dying codes are those with

    .. math:: \tau \le \frac{N_k}{\sum N / K} < \min(e \cdot \tau, 1)

    With a revival no code stays dead for more than one update. Unused codes show up here instead, while their count
    falls from the fair share to tau.

    Args:
        counts: ``(K,)``, running counts, not negative.
        dead_below: tau, the fraction of the fair share below which a code is dead.

    Returns:
        Scalar int64.

    Raises:
        TypeError: ``counts`` is not a floating tensor.
        ValueError: it is not ``(K,)`` with K >= 1, or ``dead_below`` is outside [0, 1].

    >>> import torch
    >>> dying_codes(torch.tensor([2.6, 1.2, 0.15, 0.05])).item()
    1
    """
    check_range("dead_below", dead_below, 0, 1, rule="it is a fraction of the fair share")
    counts = _float64("counts", counts, "K")
    share = counts / counts.mean()
    return ((counts >= dead_below * counts.mean()) & (share < min(math.e * dead_below, 1.0))).sum()


def tokens_per_code(tokens_per_step: float, codebook_size: int, decay: float) -> float:
    """Return m of :func:`even_use`: how many tokens per code the running counts remember."""
    return tokens_per_step / codebook_size * (1 + decay) / max(1 - decay, 1e-12)


def even_use(tokens_per_code: float, dead_below: float = 0.1) -> tuple[float, float]:
    r"""Return the perplexity and the share of dead codes that even usage shows when there are few tokens per code.

    An average with decay gamma remembers m = (1 + gamma) / (1 - gamma) * tokens a step / K tokens per code, the inverse
    of the sum of its squared weights. If tokens are independent, counts scatter around the fair share almost like a
    gamma variable of shape m, whose entropy gives the perplexity. Below the weight of one new token they follow the
    generalised Dickman distribution (of sums of exponentially fading arrivals) with a = m / 2:

    .. math:: \frac{\mathrm{perplexity}}{K} \approx \exp\big(\ln m - \psi(m + 1)\big), \qquad
        P(N_k < \tau \bar N) \approx \begin{cases}
            e^{-\gamma_E a} (\tau a)^a / \Gamma(a + 1) & \tau a \le 1 \\ P(m, \tau m) & \text{else}
        \end{cases}

    with the digamma function, Euler's constant and the regularised lower incomplete gamma function. For m >= 1 and
    decays of 0.9 and more, the first is accurate to a tenth of its value, the second to 0.02.

    Args:
        tokens_per_code: m, above 0.
        dead_below: tau, 0 to 1.

    Returns:
        Perplexity as a share of K, and the share of codes counted as dead, each 0 to 1.

    Raises:
        ValueError: ``tokens_per_code`` is not above 0, or ``dead_below`` is outside [0, 1].

    >>> perplexity, dead = even_use(1.0)
    >>> round(perplexity, 2), round(dead, 2)
    (0.66, 0.19)
    >>> even_use(1000.0)[1]
    0.0
    """
    check_range("dead_below", dead_below, 0, 1, rule="it is a fraction of the fair share")
    if not tokens_per_code > 0:
        raise ValueError(
            f"tokens_per_code must be above 0, got {tokens_per_code}: write (1 + decay) / (1 - decay) * tokens / K"
        )
    m = torch.tensor(min(tokens_per_code, 1e9), dtype=torch.float64)
    perplexity = (m.log() - torch.special.digamma(m + 1)).exp().item()
    a = m.item() / 2
    if dead_below == 0:
        return perplexity, 0.0
    if dead_below * a > 1:
        return perplexity, torch.special.gammainc(m, dead_below * m).item()
    euler = 0.5772156649015329
    return perplexity, math.exp(a * (math.log(dead_below * a) - euler) - math.lgamma(a + 1))


def spectrum(codes: Tensor, weights: Tensor | None = None) -> Tensor:
    r"""Return the eigenvalues of the covariance of the codes, largest first.

    .. math:: C = \sum_k p_k (e_k - \mu)(e_k - \mu)^\top, \qquad \mu = \sum_k p_k e_k, \qquad
        p_k = w_k \big/ \textstyle\sum w

    With the running counts as weights this is the covariance of the codebook's outputs over the tokens of about the
    last 1 / (1 - decay) updates. Without weights it is that of the codes.

    Args:
        codes: ``(K, D)``, finite.
        weights: ``(K,)``, not negative; None gives all codes the same weight.

    Returns:
        ``(D,)`` float64, not negative.

    Raises:
        TypeError: ``codes`` or ``weights`` is not a floating tensor.
        ValueError: the shapes are not ``(K, D)`` and ``(K,)``.

    >>> import torch
    >>> spectrum(torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 9.0]]), torch.tensor([1.0, 1.0, 0.0])).tolist()
    [9.0, 0.0]
    """
    codes = _float64("codes", codes)
    weights = codes.new_ones(len(codes)) if weights is None else _float64("weights", weights, "K")
    if len(weights) != len(codes):
        raise ValueError(
            f"weights must hold one number for each of the {len(codes)} codes, got {len(weights)}: give cluster_size"
        )
    total = weights.sum()
    p = (weights / torch.where(total > 0, total, 1.0))[:, None]
    centred = codes - (p * codes).sum(0)
    return torch.linalg.eigvalsh(centred.T @ (p * centred)).clamp_min(0).flip(0)


def effective_dimension(eigenvalues: Tensor) -> Tensor:
    r"""Return the participation ratio of a covariance: the effective number of directions in which codes spread.

    .. math:: \frac{(\sum_d \lambda_d)^2}{\sum_d \lambda_d^2}

    It is 1 if all codes lie on a line and D if no direction is preferred; at most K - 1.

    Args:
        eigenvalues: ``(D,)``, not negative, as from :func:`spectrum`.

    Returns:
        Scalar; 0 if all eigenvalues are 0.

    Raises:
        TypeError: ``eigenvalues`` is not a floating tensor.
        ValueError: it is not ``(D,)`` with D >= 1.

    >>> import torch
    >>> effective_dimension(torch.tensor([2.0, 2.0, 0.0, 0.0])).item()
    2.0
    """
    eigenvalues = _float64("eigenvalues", eigenvalues, "D")
    largest = eigenvalues.max()
    eigenvalues = eigenvalues / torch.where(largest > 0, largest, 1.0)  # squares of squares overflow float64 early
    squares = eigenvalues.square().sum()
    return torch.where(squares > 0, eigenvalues.sum().square() / torch.where(squares > 0, squares, 1.0), 0.0)


def nearest_distances(codes: Tensor) -> Tensor:
    r"""Return the distance of each code to the nearest other one.

    .. math:: d_k = \min_{j \ne k} \lVert e_k - e_j \rVert

    Matrix products find the neighbours, with at most 32 MiB of distances at once. The distances are then computed from
    the differences, so that those of equal codes are exactly 0.

    Args:
        codes: ``(K, D)``, finite.

    Returns:
        ``(K,)`` float64; ``(0,)`` for a single code.

    Raises:
        TypeError: ``codes`` is not a floating tensor.
        ValueError: it is not ``(K, D)`` with K, D >= 1.

    >>> import torch
    >>> nearest_distances(torch.tensor([[0.0, 0.0], [3.0, 4.0], [3.0, 4.0]])).tolist()
    [5.0, 0.0, 0.0]
    """
    codes = _float64("codes", codes)
    if len(codes) < 2:
        return codes.new_empty(0)
    codes = codes - codes.mean(0)  # short vectors lose less to rounding
    nearest = torch.cat([squared.argmin(1) for squared in _squared_distances(codes)])
    return (codes - codes[nearest]).norm(dim=1)


def near_duplicate_distance(codebook_size: int, dimension: float) -> float:
    """Return the distance, in units of S, below which two codes are near-duplicates: ``0.01 * K ** (-1 / max(d, 1))``.

    K codes spread in d dimensions (the effective dimension, not D) lie about ``K ** (-1 / d)`` of their spread apart.
    Two codes at a hundredth of that share a cell.

    >>> near_duplicate_distance(1024, 1)
    9.765625e-06
    """
    return float(0.01 * codebook_size ** (-1 / max(dimension, 1)))


def distinct_places(codes: Tensor, radius: float) -> Tensor:
    r"""Return the effective number of places in which codes lie, if codes closer than a radius share one place.

    .. math:: K^2 \Big/ \#\{(i, j) : \lVert e_i - e_j \rVert < r\}

    It is K if all codes are apart, and m if they lie in m clumps of equal size: the inverse of the probability that two
    codes, drawn with replacement, share a place.

    Args:
        codes: ``(K, D)``, finite.
        radius: r, above 0.

    Returns:
        Scalar float64, 1 to K.

    Raises:
        TypeError: ``codes`` is not a floating tensor.
        ValueError: it is not ``(K, D)`` with K, D >= 1.

    >>> import torch
    >>> distinct_places(torch.tensor([[0.0], [0.1], [9.0], [9.1]]), 0.5).item()
    2.0
    """
    codes = _float64("codes", codes)
    pairs = codes.new_tensor(len(codes), dtype=torch.int64)  # each code with itself
    for squared in _squared_distances(codes - codes.mean(0)):
        pairs += (squared < radius**2).sum()
    return len(codes) ** 2 / pairs.double()


def drift(codes: Tensor, old: Tensor) -> Tensor:
    r"""Return how far the codes have moved, in units of the old spread.

    .. math:: \frac{1}{S} \sqrt{\tfrac{1}{K} \textstyle\sum_k \lVert e_k - e^{\mathrm{old}}_k \rVert^2}

    where S is :func:`code_spread` of the old codes. New codes drawn from the same distribution have drift sqrt(2).

    Args:
        codes: ``(K, D)``, finite.
        old: ``(K, D)``, finite: the same codebook earlier.

    Returns:
        Scalar; infinite if the old codes were all equal and have moved, 0 if they have not.

    Raises:
        TypeError: ``codes`` or ``old`` is not a floating tensor.
        ValueError: the shapes differ, or are not ``(K, D)``.

    >>> import torch
    >>> drift(torch.tensor([[6.0], [0.0]]), torch.tensor([[3.0], [-3.0]])).item()
    1.0
    """
    check_alike("codes", codes, "old", old, "compare a codebook with an earlier state of itself")
    moved = (_float64("codes", codes) - _float64("old", old)).square().sum(1).mean().sqrt()
    return torch.where(moved > 0, moved / code_spread(old), 0.0)


def turnover(codes: Tensor, old: Tensor) -> Tensor:
    r"""Return the share of codes that lie closer to another code's old place than to their own.

    .. math:: \tfrac{1}{K} \#\big\{k : \min_j \lVert e_k - e^{\mathrm{old}}_j \rVert
        < \lVert e_k - e^{\mathrm{old}}_k \rVert\big\}

    It distinguishes a few revived codes, which can cause a large drift, from many codes that moved. For all other codes
    an index means the same before and after.

    Args and errors are those of :func:`drift`.

    Returns:
        Scalar float64, 0 to 1.

    >>> import torch
    >>> turnover(torch.tensor([[0.1], [1.2], [2.1], [0.4]]), torch.tensor([[0.0], [1.0], [2.0], [3.0]])).item()
    0.25
    """
    check_alike("codes", codes, "old", old, "compare a codebook with an earlier state of itself")
    new, old = _float64("codes", codes), _float64("old", old)
    nearest = nearest_codeword(new, old)
    return ((new - old[nearest]).square().sum(1) < (new - old).square().sum(1)).double().mean()


def _squared_distances(codes: Tensor) -> Iterator[Tensor]:
    """Yield squared distances of some codes at a time to all codes, ``(chunk, K)``; infinite from a code to itself."""
    squares = codes.square().sum(1)
    step = max(CHUNK_ENTRIES // len(codes), 1)
    for start in range(0, len(codes), step):
        chunk = slice(start, start + step)
        distances = torch.addmm(squares, codes[chunk], codes.T, alpha=-2).add_(squares[chunk, None])
        distances.diagonal(start).fill_(torch.inf)
        yield distances


def _float64(name: str, x: Tensor, axes: str = "KD") -> Tensor:
    """Return ``x`` in float64, checked; on the CPU if its device has no float64."""
    check_floating(name, x)
    if x.ndim != len(axes) or 0 in x.shape:
        shape = f"({axes},)" if len(axes) == 1 else f"({', '.join(axes)})"
        raise ValueError(
            f"{name} must be {shape} with {', '.join(axes)} >= 1, got shape {tuple(x.shape)}: give those of one "
            "codebook"
        )
    x = x.detach()
    return (x.cpu() if x.device.type == "mps" else x).double()
