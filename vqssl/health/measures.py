"""What there is to measure of a codebook: functions of codes and counts, all in float64, none of which holds K x K."""

import math

import torch
from torch import Tensor

from vqssl.checks import check_alike, check_floating, check_range
from vqssl.functional.search import nearest_codeword

__all__ = [
    "code_spread",
    "distinct_places",
    "drift",
    "dying_codes",
    "effective_dimension",
    "even_use",
    "nearest_distances",
    "spectrum",
    "turnover",
]

EULER = 0.5772156649015329

CHUNK_ENTRIES = 2**22
"""Distances held at once: 32 MiB of float64, whatever K is."""


def code_spread(codes: Tensor) -> Tensor:
    r"""Root mean square distance of the codes from their mean: the length that other distances are divided by.

    .. math:: S = \sqrt{\tfrac{1}{K} \textstyle\sum_k \lVert e_k - \bar e \rVert^2}

    Args:
        codes: ``(K, D)``, finite.

    Returns:
        Scalar float64; 0 where all codes are equal.

    Raises:
        TypeError: ``codes`` is no floating tensor.
        ValueError: it is not ``(K, D)`` with K, D >= 1.

    >>> import torch
    >>> code_spread(torch.tensor([[3.0, 0.0], [-3.0, 0.0]])).item()
    3.0
    """
    codes = _wide(codes)
    if bool((codes == codes[:1]).all()):
        return codes.new_zeros(())  # where the mean would bring rounding
    return (codes - codes.mean(0)).square().sum(1).mean().sqrt()


def dying_codes(counts: Tensor, dead_below: float = 0.1) -> Tensor:
    r"""How many codes live, but will be dead after another 1 / (1 - decay) updates if no token chooses them.

    Without tokens a running count shrinks by the decay a step, in 1 / (1 - decay) steps to 1/e of itself, so these are

    .. math:: \tau \le \frac{N_k}{\sum N / K} < \min(e \cdot \tau, 1)

    where tau is ``dead_below``. While a revival is on, no code stays dead for longer than a step; codes that nobody
    uses show here instead, on their way from the fair share that they got when revived down to tau.

    Args:
        counts: ``(K,)``, running counts, not negative.
        dead_below: tau, the fraction of the fair share below which a code is dead.

    Returns:
        Scalar int64.

    Raises:
        TypeError: ``counts`` is no floating tensor.
        ValueError: it is not ``(K,)`` with K >= 1, or ``dead_below`` is outside [0, 1].

    >>> import torch
    >>> dying_codes(torch.tensor([2.6, 1.2, 0.15, 0.05])).item()
    1
    """
    check_range("dead_below", dead_below, 0, 1, rule="it is a fraction of the fair share")
    counts = _wide(counts, ndim=1)
    share = counts / counts.mean()
    return ((counts >= dead_below * counts.mean()) & (share < min(math.e * dead_below, 1.0))).sum()


def spectrum(codes: Tensor, weights: Tensor | None = None) -> Tensor:
    r"""Eigenvalues of the covariance of the codes, largest first.

    .. math:: C = \sum_k p_k (e_k - \mu)(e_k - \mu)^\top, \qquad \mu = \sum_k p_k e_k, \qquad
        p_k = w_k \big/ \textstyle\sum w

    With the running counts as weights this is the covariance of what the codebook gives out, over the tokens of the
    last 1 / (1 - decay) steps or so; without any, that of the codes.

    Args:
        codes: ``(K, D)``, finite.
        weights: ``(K,)``, not negative; None weighs all codes alike.

    Returns:
        ``(D,)`` float64, not negative.

    Raises:
        TypeError: ``codes`` or ``weights`` is no floating tensor.
        ValueError: the shapes are not ``(K, D)`` and ``(K,)``.

    >>> import torch
    >>> spectrum(torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 9.0]]), torch.tensor([1.0, 1.0, 0.0])).tolist()
    [9.0, 0.0]
    """
    codes = _wide(codes)
    weights = codes.new_ones(len(codes)) if weights is None else _wide(weights, ndim=1)
    if len(weights) != len(codes):
        raise ValueError(
            f"weights must hold one number for each of the {len(codes)} codes, got {len(weights)}: give cluster_size"
        )
    total = weights.sum()
    p = (weights / torch.where(total > 0, total, 1.0))[:, None]
    centred = codes - (p * codes).sum(0)
    return torch.linalg.eigvalsh(centred.T @ (p * centred)).clamp_min(0).flip(0)


def effective_dimension(eigenvalues: Tensor) -> Tensor:
    r"""In how many directions the codes spread, in effect: the participation ratio of their covariance.

    .. math:: \frac{(\sum_d \lambda_d)^2}{\sum_d \lambda_d^2}

    1 where all codes lie on a line, D where no direction is preferred; at most K - 1.

    Args:
        eigenvalues: ``(D,)``, not negative, as from :func:`spectrum`.

    Returns:
        Scalar; 0 where all eigenvalues are.

    Raises:
        TypeError: ``eigenvalues`` is no floating tensor.
        ValueError: it is not ``(D,)`` with D >= 1.

    >>> import torch
    >>> effective_dimension(torch.tensor([2.0, 2.0, 0.0, 0.0])).item()
    2.0
    """
    eigenvalues = _wide(eigenvalues, ndim=1)
    largest = eigenvalues.max()
    eigenvalues = eigenvalues / torch.where(largest > 0, largest, 1.0)  # squares of squares leave float64 early
    squares = eigenvalues.square().sum()
    return torch.where(squares > 0, eigenvalues.sum().square() / torch.where(squares > 0, squares, 1.0), 0.0)


def nearest_distances(codes: Tensor) -> Tensor:
    r"""Distance of each code to the nearest other one.

    .. math:: d_k = \min_{j \ne k} \lVert e_k - e_j \rVert

    The neighbours are found by matrix products of K x chunk distances, at most 32 MiB of them at once, and their
    distances computed anew from the differences: equal codes are at distance 0, not at one of rounding.

    Args:
        codes: ``(K, D)``, finite.

    Returns:
        ``(K,)`` float64; for a single code ``(0,)``.

    Raises:
        TypeError: ``codes`` is no floating tensor.
        ValueError: it is not ``(K, D)`` with K, D >= 1.

    >>> import torch
    >>> nearest_distances(torch.tensor([[0.0, 0.0], [3.0, 4.0], [3.0, 4.0]])).tolist()
    [5.0, 0.0, 0.0]
    """
    codes = _wide(codes)
    size = len(codes)
    if size < 2:
        return codes.new_empty(0)
    codes = codes - codes.mean(0)  # short vectors lose less
    squares = codes.square().sum(1)
    nearest = []
    step = max(CHUNK_ENTRIES // size, 1)
    for start in range(0, size, step):
        scores = torch.addmm(squares, codes[start : start + step], codes.T, alpha=-2)
        scores.diagonal(start).fill_(torch.inf)
        nearest.append(scores.argmin(1))
    return (codes - codes[torch.cat(nearest)]).norm(dim=1)


def distinct_places(codes: Tensor, radius: float) -> Tensor:
    r"""In how many places codes lie, in effect, where what is nearer than a radius is one place.

    .. math:: K^2 \Big/ \#\{(i, j) : \lVert e_i - e_j \rVert < r\}

    K where all codes are apart, m where they sit in m clumps of equal size: the inverse of the chance that two codes,
    drawn with replacement, lie in one place.

    Args:
        codes: ``(K, D)``, finite.
        radius: r, above 0.

    Returns:
        Scalar float64, 1 to K.

    Raises:
        TypeError: ``codes`` is no floating tensor.
        ValueError: it is not ``(K, D)`` with K, D >= 1.

    >>> import torch
    >>> distinct_places(torch.tensor([[0.0], [0.1], [9.0], [9.1]]), 0.5).item()
    2.0
    """
    codes = _wide(codes)
    size = len(codes)
    codes = codes - codes.mean(0)
    squares = codes.square().sum(1)
    pairs = codes.new_zeros((), dtype=torch.int64)
    step = max(CHUNK_ENTRIES // size, 1)
    for start in range(0, size, step):
        some = slice(start, start + step)
        distances = torch.addmm(squares, codes[some], codes.T, alpha=-2) + squares[some, None]
        distances.diagonal(start).fill_(0.0)  # a code lies in its own place, whatever rounding says
        pairs += (distances < radius**2).sum()
    return size**2 / pairs.double()


def drift(codes: Tensor, old: Tensor) -> Tensor:
    r"""How far the codes have moved, next to how far they lie from each other.

    .. math:: \frac{1}{S} \sqrt{\tfrac{1}{K} \textstyle\sum_k \lVert e_k - e^{\mathrm{old}}_k \rVert^2}

    where S is :func:`code_spread` of the old codes. Codes drawn anew from the same cloud have drift sqrt(2).

    Args:
        codes: ``(K, D)``, finite.
        old: ``(K, D)``, finite: the same codebook earlier.

    Returns:
        Scalar; infinite where the old codes were all equal and have moved, 0 where they have not.

    Raises:
        TypeError: one is no floating tensor.
        ValueError: the shapes differ, or are not ``(K, D)``.

    >>> import torch
    >>> drift(torch.tensor([[6.0], [0.0]]), torch.tensor([[3.0], [-3.0]])).item()
    1.0
    """
    check_alike("codes", codes, "old", old, "compare a codebook with an earlier state of itself")
    moved = (_wide(codes) - _wide(old)).square().sum(1).mean().sqrt()
    return torch.where(moved > 0, moved / code_spread(old), 0.0)


def turnover(codes: Tensor, old: Tensor) -> Tensor:
    r"""Share of codes that lie nearer to another code's old place than to their own: replaced, or gone elsewhere.

    .. math:: \tfrac{1}{K} \#\big\{k : \min_j \lVert e_k - e^{\mathrm{old}}_j \rVert
        < \lVert e_k - e^{\mathrm{old}}_k \rVert\big\}

    Few codes that a revival replaced give much drift; this tells them from many that moved. An index means the same
    before and after for the rest.

    Args and errors are those of :func:`drift`.

    Returns:
        Scalar float64, 0 to 1.

    >>> import torch
    >>> turnover(torch.tensor([[0.1], [1.2], [2.1], [0.4]]), torch.tensor([[0.0], [1.0], [2.0], [3.0]])).item()
    0.25
    """
    check_alike("codes", codes, "old", old, "compare a codebook with an earlier state of itself")
    new, old = _wide(codes), _wide(old)
    nearest = nearest_codeword(new, old)
    return ((new - old[nearest]).square().sum(1) < (new - old).square().sum(1)).double().mean()


def even_use(tokens_per_code: float, dead_below: float = 0.1) -> tuple[float, float]:
    r"""What running counts say of codes that are all used alike, when there are few tokens a code.

    An average that keeps a share gamma a step remembers m = (1 + gamma) / (1 - gamma) * tokens a step / K tokens a code
    (the inverse of the sum of its squared weights). Where they come independently, counts scatter around the fair
    share nearly as a gamma variable of shape m does, whose entropy gives the perplexity; below the weight of one
    new token they follow the generalised Dickman distribution (of sums of exponentially fading arrivals) with
    a = m / 2:

    .. math:: \frac{\mathrm{perplexity}}{K} \approx \exp\big(\ln m - \psi(m + 1)\big), \qquad
        P(N_k < \tau \bar N) \approx \begin{cases}
            e^{-\gamma_E a} (\tau a)^a / \Gamma(a + 1) & \tau a \le 1 \\ P(m, \tau m) & \text{else}
        \end{cases}

    with the digamma function, Euler's constant and the regularised lower incomplete gamma function. From m = 1 on the
    first is within a tenth of its value, the second within 0.02, for decays of 0.9 and more.

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
    return perplexity, math.exp(a * (math.log(dead_below * a) - EULER) - math.lgamma(a + 1))


def _wide(x: Tensor, ndim: int = 2) -> Tensor:
    """In float64, on the CPU where the device has none."""
    name = "codes" if ndim == 2 else "counts, weights and eigenvalues"
    if isinstance(x, Tensor) and not x.is_floating_point():
        raise TypeError(f"{name} must have a floating dtype, got {x.dtype}: write .double() behind it")
    check_floating(name, x)
    if x.ndim != ndim or 0 in x.shape:
        shape = "(K, D) with K, D >= 1" if ndim == 2 else "(K,) with K >= 1"
        raise ValueError(f"{name} must be {shape}, got shape {tuple(x.shape)}")
    x = x.detach()
    return (x.cpu() if x.device.type == "mps" else x).double()
