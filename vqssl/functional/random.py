"""A counter-based random generator in integer tensor operations: the same numbers on every device and rank.

The state is an int64 tensor ``[seed, counter]``. It lives in a module's buffers, so it is saved, loaded and moved with
the module. Torch's global generators are neither read nor advanced. The numbers are those of SplitMix64 (Steele, Lea,
Flood 2014), which can jump to any position with one multiplication.
"""

import math

import torch
from torch import Tensor

__all__ = ["distinct_positions", "random_bits", "random_normal", "random_positions"]


def _as_int64(constant: int) -> int:
    return constant - 2**64 if constant >= 2**63 else constant


_GAMMA = _as_int64(0x9E3779B97F4A7C15)
_MIX_1 = _as_int64(0xBF58476D1CE4E5B9)
_MIX_2 = _as_int64(0x94D049BB133111EB)


def _mix(z: Tensor) -> Tensor:
    # torch shifts int64 arithmetically; the mask makes it a logical shift.
    z = (z ^ ((z >> 30) & (2**34 - 1))) * _MIX_1
    z = (z ^ ((z >> 27) & (2**37 - 1))) * _MIX_2
    return z ^ ((z >> 31) & (2**33 - 1))


def random_bits(rng: Tensor, count: int) -> Tensor:
    """Return integers uniform over [0, 2^62).

    The same state gives the same numbers; the caller advances the counter.

    Args:
        rng: ``(2,)`` int64, seed and counter.
        count: how many integers.

    Returns:
        ``(count,)`` int64.

    >>> import torch
    >>> random_bits(torch.tensor([0, 0]), 4).equal(random_bits(torch.tensor([0, 0]), 4))
    True
    >>> random_bits(torch.tensor([0, 0]), 4).equal(random_bits(torch.tensor([0, 1]), 4))
    False
    """
    key = _mix(_mix(rng[0] + _GAMMA) + rng[1] * _GAMMA)
    lane = torch.arange(1, count + 1, device=rng.device)
    return (_mix(key + lane * _GAMMA) >> 2) & (2**62 - 1)


def random_normal(rng: Tensor, count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return standard normal numbers: the Box-Muller transform of :func:`random_bits`.

    Args:
        rng: ``(2,)`` int64, seed and counter.
        count: how many numbers.
        dtype: dtype of the numbers.

    Returns:
        ``(count,)``.

    >>> import torch
    >>> x = random_normal(torch.tensor([0, 0]), 4096)
    >>> bool(x.mean().abs() < 0.05), bool((x.std() - 1).abs() < 0.05)
    (True, True)
    """
    bits = random_bits(rng, 2 * count)
    # 24 bits, which float32 holds exactly. The + 1 keeps zero away from the logarithm.
    u = ((bits >> 38) + 1).to(dtype) * 2.0**-24
    radius = torch.sqrt(-2.0 * torch.log(u[:count]))
    return radius * torch.cos(2 * math.pi * u[count:])


def random_positions(rng: Tensor, count: int, total: Tensor) -> Tensor:
    """Return positions in [0, total): one from each of ``count`` equal strata, in random order.

    Positions are distinct if ``total >= count``. All are 0 if ``total`` is 0.

    Args:
        rng: ``(2,)`` int64, seed and counter.
        count: how many positions.
        total: scalar int64 tensor; an int would have to be read from the device first.

    Returns:
        ``(count,)`` int64.

    >>> import torch
    >>> random_positions(torch.tensor([0, 0]), 4, torch.tensor(4)).sort().values.tolist()
    [0, 1, 2, 3]
    """
    bits = random_bits(rng, 2 * count)
    order = bits[:count].argsort(stable=True)
    low = order * total // count
    width = ((order + 1) * total // count - low).clamp_min(1)
    return low + bits[count:] % width


def distinct_positions(rng: Tensor, wanted: Tensor, total: Tensor) -> Tensor:
    """Return a position in [0, total) for each wanted entry, no position twice.

    With fewer positions than wanted entries, ``total`` of them get one, drawn at random. With at least K positions they
    are those of :func:`random_positions`.

    Args:
        rng: ``(2,)`` int64, seed and counter.
        wanted: ``(K,)`` bool.
        total: scalar int64 tensor; an int would have to be read from the device first.

    Returns:
        ``(K,)`` int64, -1 where an entry is not wanted or gets none.

    >>> import torch
    >>> wanted = torch.tensor([True, False, True, True])
    >>> found = distinct_positions(torch.tensor([0, 0]), wanted, torch.tensor(2))
    >>> found[1].item(), found.sort().values.tolist()
    (-1, [-1, -1, 0, 1])
    """
    count = len(wanted)
    bits = random_bits(rng, 2 * count)
    # With fewer positions than entries, wanted ones get the first strata, and of a position's strata the first counts.
    scarce = total < count
    order = torch.where(scarce & ~wanted, 2**62, bits[:count]).argsort(stable=True)
    rank = torch.empty_like(order).scatter(0, order, torch.arange(count, device=order.device))
    stratum = torch.where(scarce, rank, bits[:count].argsort(stable=True))
    strata = torch.where(scarce, wanted.sum().clamp_min(1), count)
    before, low, high = ((stratum + shift) * total // strata for shift in (-1, 0, 1))
    position = low + bits[count:] % (high - low).clamp_min(1)
    has_one = (stratum == 0) | (low > before)
    return torch.where(wanted & has_one & (total > 0), position, -1)
