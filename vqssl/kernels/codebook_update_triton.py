"""The update of an EMA codebook on CUDA: six launches of Triton kernels in place of some hundred and fifty.

Every program sums the K counts itself, in one order, so that no launch waits for another's sum. Where no code is dead
the kernels of a revival return at once: nothing is read by the host. Ranking and comparing of all pairs take time that
grows with K², which for up to 2^14 codes is less than a sort.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["NextState", "divide_and_draw", "next_state_triton", "write_state_triton"]

_GAMMA = tl.constexpr(0x9E3779B97F4A7C15 - 2**64)
_MIX_1 = tl.constexpr(0xBF58476D1CE4E5B9 - 2**64)
_MIX_2 = tl.constexpr(0x94D049BB133111EB - 2**64)
_LIVING, _WAITING = tl.constexpr(-1), tl.constexpr(-2)


class NextState(NamedTuple):
    """A codebook after its EMA step, and which tokens its dead codes may become."""

    embed: Tensor
    """``(K, D)``."""
    cluster_size: Tensor
    """``(K,)``."""
    embed_avg: Tensor
    """``(K, D)``."""
    counts: Tensor
    """``(K,)``: tokens of the batch by code, 0 where their sum is not finite."""
    positions: Tensor
    """``(K,)`` int64: the token drawn for a dead code, -2 where it has to wait, -1 for a living code."""
    candidates: Tensor
    """``(K, D)``: these tokens, zeros where there is none or another rank has it."""


def next_state_triton(
    embed: Tensor, cluster_size: Tensor, embed_avg: Tensor, counts: Tensor, sums: Tensor, rng: Tensor,
    x: Tensor, indices: Tensor, total: Tensor | None, start: Tensor | None,
    decay: float, eps: float, threshold: float | None,
) -> NextState:  # fmt: skip
    """Take an EMA step and draw replacements, without changing anything.

    Args:
        embed: ``(K, D)`` float32, contiguous, as all tensors of the state.
        cluster_size: ``(K,)``.
        embed_avg: ``(K, D)``.
        counts: ``(K,)``, of the batch over all ranks.
        sums: ``(K, D)``, likewise.
        rng: ``(2,)`` int64.
        x: this rank's tokens ``(N, D)`` float32, of any strides.
        indices: ``(N,)`` int64, -1 where a token does not count.
        total: scalar int64: tokens of all ranks that count; None where there is one rank.
        start: scalar int64: those of the ranks before this one.
        decay: gamma.
        eps: epsilon.
        threshold: tau of the revival; None where there is none. ``positions`` and ``candidates`` are empty then.
    """
    size, width = embed.shape
    new = NextState(
        torch.empty(size, width, device=embed.device),
        torch.empty(size, device=embed.device),
        torch.empty(size, width, device=embed.device),
        torch.empty(size, device=embed.device),
        torch.empty(size if threshold is not None else 0, dtype=torch.int64, device=embed.device),
        torch.empty(size if threshold is not None else 0, width, device=embed.device),
    )
    blocks = _blocks(width)
    grid = (triton.cdiv(size, blocks["BLOCK_K"]),)
    average[grid](
        counts, sums, cluster_size, embed_avg, new.counts, new.cluster_size, new.embed_avg, size, width, 1 - decay,
        **blocks,
    )  # fmt: skip
    running = rng  # read by nothing without a revival
    if threshold is not None:
        running = (indices >= 0).cumsum(0) if len(x) else rng.new_zeros(1)
    divide_and_draw[grid](
        new.cluster_size, new.embed_avg, embed, new.embed, rng, running[-1:] if total is None else total,
        new.positions, size, width, eps, size * eps, threshold or 0.0,
        REVIVE=threshold is not None, BLOCK_M=128, BLOCK_S=1024, **blocks,
    )  # fmt: skip
    if threshold is not None:
        take[grid](
            x, running, rng if start is None else start, new.positions, new.candidates, size, width,
            len(x), max(len(x) - 1, 0), len(x).bit_length(), *x.stride(), HAS_START=start is not None, **blocks,
        )  # fmt: skip
    return new


def write_state_triton(
    embed: Tensor, cluster_size: Tensor, embed_avg: Tensor, rng: Tensor, num_updates: Tensor, births: Tensor,
    formed: Tensor, new_size: Tensor, new_avg: Tensor, counts: Tensor, positions: Tensor, candidates: Tensor,
    zero_keeps_place: bool,
) -> bool:  # fmt: skip
    """Replace dead codes by their candidates and write the state, if any token counted.

    Args:
        embed: ``(K, D)`` float32, contiguous: written, as the five that follow.
        cluster_size: ``(K,)``.
        embed_avg: ``(K, D)``.
        rng: ``(2,)`` int64.
        num_updates: scalar int64.
        births: ``(K,)`` int64.
        formed: ``(K, D)``, the codes after the EMA step, in the form in which the metric compares them.
        new_size: ``(K,)``, the counts after the EMA step.
        new_avg: ``(K, D)``, the sums after it.
        counts: of :class:`NextState`, as the two that follow; these may be empty.
        positions: ``(K,)``.
        candidates: ``(K, D)``, summed over ranks.
        zero_keeps_place: True if a code must not be zero.
    """
    size, width = embed.shape
    blocks = _blocks(width)
    grid = (triton.cdiv(size, blocks["BLOCK_K"]),)
    revive = len(positions) > 0
    replaced = torch.empty(size if revive else 0, dtype=torch.int8, device=embed.device)
    if revive:
        hashes = torch.empty(2 * size, dtype=torch.int64, device=embed.device)
        hash_rows[grid](formed, candidates, positions, hashes, size, width, BLOCK_S=1024, **blocks)
        refuse_repeats[grid](positions, hashes, replaced, size, BLOCK_K=blocks["BLOCK_K"], BLOCK_M=128, BLOCK_S=1024)
    write[grid](
        embed, cluster_size, embed_avg, rng, num_updates, births, formed, new_size, new_avg, counts, replaced,
        candidates, size, width, REVIVE=revive, ZERO_KEEPS_PLACE=zero_keeps_place, BLOCK_S=1024, **blocks,
    )  # fmt: skip
    return True


def _blocks(width: int) -> dict[str, int]:
    return {"BLOCK_K": 16, "BLOCK_D": min(128, triton.next_power_of_2(width))}


@triton.jit
def average(
    counts, sums, cluster_size, embed_avg, new_counts, new_size, new_avg, K, D, weight,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Average counts and sums with those of the batch, without the codes whose sum is not finite."""
    code = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = code < K
    lost = tl.zeros((BLOCK_K,), tl.int32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        total = tl.load(sums + code[:, None] * D + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0)
        lost |= tl.max((~(tl.abs(total) < float("inf"))).to(tl.int32), 1)
    count = tl.where(lost > 0, 0.0, tl.load(counts + code, mask=inside, other=0.0))
    old = tl.load(cluster_size + code, mask=inside, other=0.0)
    tl.store(new_counts + code, count, mask=inside)
    tl.store(new_size + code, _lerp(old, count, weight), mask=inside)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        place, here = code[:, None] * D + d[None, :], inside[:, None] & (d < D)[None, :]
        total = tl.where((lost > 0)[:, None], 0.0, tl.load(sums + place, mask=here, other=0.0))
        tl.store(new_avg + place, _lerp(tl.load(embed_avg + place, mask=here, other=0.0), total, weight), mask=here)


@triton.jit
def divide_and_draw(
    new_size, new_avg, embed, new_embed, rng, tokens, positions, K, D, eps, eps_of_all, threshold,
    REVIVE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Divide the sums by the smoothed counts; draw a position for each dead code as ``distinct_positions`` does."""
    code = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = code < K
    total = _sum_of(new_size, K, BLOCK_S)
    size = tl.load(new_size + code, mask=inside, other=0.0)
    smoothed = tl.div_rn(size + eps, total + eps_of_all) * total
    used = smoothed > 0
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        place, here = code[:, None] * D + d[None, :], inside[:, None] & (d < D)[None, :]
        mean = tl.div_rn(
            tl.load(new_avg + place, mask=here, other=0.0),
            tl.broadcast_to(tl.where(used, smoothed, 1.0)[:, None], (BLOCK_K, BLOCK_D)),
        )
        kept = tl.load(embed + place, mask=here, other=0.0)
        tl.store(new_embed + place, tl.where(used[:, None], mean, kept), mask=here)
    if REVIVE:
        limit = threshold * (total / K)
        dead = (size < limit) & inside
        wanted = _count_below(new_size, limit, K, BLOCK_S)
        if wanted == 0:
            tl.store(positions + code, tl.full((BLOCK_K,), _LIVING, tl.int64), mask=inside)
        else:
            count = tl.load(tokens)
            scarce = count < K
            key = tl.where(scarce & ~dead, 2**62, _random_bits(rng, code + 1))
            rank = tl.zeros((BLOCK_K,), tl.int64)
            for start in range(0, K, BLOCK_M):
                m = start + tl.arange(0, BLOCK_M).to(tl.int64)
                living = tl.load(new_size + m, mask=m < K, other=0.0) >= limit
                other = tl.where(scarce & living, 2**62, _random_bits(rng, m + 1))
                earlier = (other[None, :] == key[:, None]) & (m[None, :] < code[:, None])
                before = ((other[None, :] < key[:, None]) | earlier) & (m < K)[None, :]
                rank += tl.sum(before.to(tl.int32), 1)
            # With enough tokens stratum j is that of the code whose random number has rank j.
            owner = tl.where(scarce, code, rank)
            stratum = tl.where(scarce, rank, code)
            strata = tl.where(scarce, wanted, K).to(tl.int64)
            low, high = stratum * count // strata, (stratum + 1) * count // strata
            is_first = (stratum == 0) | (low > (stratum - 1) * count // strata)
            is_dead = tl.load(new_size + owner, mask=inside, other=0.0) < limit
            position = low + _random_bits(rng, owner + 1 + K) % tl.maximum(high - low, 1)
            drawn = tl.where(is_first & (count > 0), position, _WAITING)
            tl.store(positions + owner, tl.where(is_dead, drawn, _LIVING), mask=inside)


@triton.jit
def take(
    x, running, first, positions, candidates, K, D, N, last, steps, stride_n, stride_d,
    HAS_START: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Copy the tokens at the positions: the n-th that counts is the first row where the running count exceeds n."""
    code = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = code < K
    position = tl.load(positions + code, mask=inside, other=-1)
    local = position
    if HAS_START:
        local = position - tl.load(first)
    ours = inside & (position >= 0) & (local >= 0)
    ours = ours & (local < tl.load(running + last))
    low, high = tl.zeros((BLOCK_K,), tl.int64), tl.zeros((BLOCK_K,), tl.int64) + N
    for _ in range(steps):
        middle = (low + high) // 2
        going = ours & (low < high)
        right = tl.load(running + middle, mask=going, other=0) <= local
        low, high = tl.where(going & right, middle + 1, low), tl.where(going & ~right, middle, high)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D).to(tl.int64)
        token = tl.load(
            x + low[:, None] * stride_n + d[None, :] * stride_d, mask=ours[:, None] & (d < D)[None, :], other=0.0
        )
        tl.store(candidates + code[:, None] * D + d[None, :], token, mask=inside[:, None] & (d < D)[None, :])


@triton.jit
def hash_rows(
    formed, candidates, positions, hashes, K, D, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Hash the bits of codes and candidates to 64 bits each, if any candidate was drawn."""
    code = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    if _any_drawn(positions, K, BLOCK_S):
        of_code, of_token = tl.zeros((BLOCK_K,), tl.int64), tl.zeros((BLOCK_K,), tl.int64)
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D).to(tl.int64)
            place, here = code[:, None] * D + d[None, :], (code < K)[:, None] & (d < D)[None, :]
            factor = (_mix((d + 1) * _GAMMA) | 1)[None, :]
            of_code += tl.sum(_bits(tl.load(formed + place, mask=here, other=0.0)) * factor, 1)
            of_token += tl.sum(_bits(tl.load(candidates + place, mask=here, other=0.0)) * factor, 1)
        tl.store(hashes + code, of_code, mask=code < K)
        tl.store(hashes + K + code, of_token, mask=code < K)


@triton.jit
def refuse_repeats(
    positions, hashes, replaced, K, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr
):  # fmt: skip
    """Mark the codes that become their candidate: where no living code and no earlier candidate equals it."""
    code = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = code < K
    repeated = tl.zeros((BLOCK_K,), tl.int32)
    drawn = tl.load(positions + code, mask=inside, other=-1) >= 0
    if _any_drawn(positions, K, BLOCK_S):
        own = tl.load(hashes + K + code, mask=inside, other=0)
        for start in range(0, K, BLOCK_M):
            m = start + tl.arange(0, BLOCK_M).to(tl.int64)
            position = tl.load(positions + m, mask=m < K, other=-2)
            of_code = tl.load(hashes + m, mask=m < K, other=0)
            of_token = tl.load(hashes + K + m, mask=m < K, other=0)
            lives = (position == _LIVING)[None, :] & (of_code[None, :] == own[:, None])
            earlier = (position >= 0)[None, :] & (m[None, :] < code[:, None])
            same = lives | (earlier & (of_token[None, :] == own[:, None]))
            repeated |= tl.max(same.to(tl.int32), 1)
    tl.store(replaced + code, (drawn & (repeated == 0)).to(tl.int8), mask=inside)


@triton.jit
def write(
    embed, cluster_size, embed_avg, rng, num_updates, births, formed, new_size, new_avg, counts, replaced, candidates,
    K, D, REVIVE: tl.constexpr, ZERO_KEEPS_PLACE: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write the rows that are finite, scaled so that revived codes do not change the total count."""
    code = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = code < K
    tokens = _sum_of(counts, K, BLOCK_S)
    share, scale = 0.0, 1.0
    is_new = tl.zeros((BLOCK_K,), tl.int32) > 0
    if REVIVE:
        is_new = tl.load(replaced + code, mask=inside, other=0) > 0
        total = _sum_of(new_size, K, BLOCK_S)
        share = total / K
        kept, number = tl.zeros((BLOCK_S,), tl.float32), tl.zeros((BLOCK_S,), tl.int32)
        for start in range(0, K, BLOCK_S):
            m = start + tl.arange(0, BLOCK_S)
            gone = tl.load(replaced + m, mask=m < K, other=0) > 0
            number += gone.to(tl.int32)
            kept += tl.where(gone, 0.0, tl.load(new_size + m, mask=m < K, other=0.0))
        born = tl.sum(number, 0)
        scale = tl.where(born > 0, total / (tl.sum(kept, 0) + born * share), 1.0)
    lost, nonzero = tl.zeros((BLOCK_K,), tl.int32), tl.zeros((BLOCK_K,), tl.int32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        place, here = code[:, None] * D + d[None, :], inside[:, None] & (d < D)[None, :]
        value, average_ = _row(formed, new_avg, candidates, place, here, is_new, share, scale, REVIVE)
        finite = (tl.abs(value) < float("inf")) & (tl.abs(average_) < float("inf"))
        lost |= tl.max((~finite).to(tl.int32), 1)
        nonzero |= tl.max((value != 0).to(tl.int32), 1)
    rows = inside & (lost == 0) & (tl.zeros((BLOCK_K,), tl.float32) + tokens > 0)
    has_form = rows
    if ZERO_KEEPS_PLACE:
        has_form = rows & (nonzero > 0)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        place, here = code[:, None] * D + d[None, :], (d < D)[None, :]
        value, average_ = _row(formed, new_avg, candidates, place, inside[:, None] & here, is_new, share, scale, REVIVE)
        tl.store(embed + place, value, mask=has_form[:, None] & here)
        tl.store(embed_avg + place, average_, mask=rows[:, None] & here)
    size = tl.where(is_new, share, tl.load(new_size + code, mask=inside, other=0.0)) * scale
    tl.store(cluster_size + code, size, mask=rows)
    if REVIVE:
        tl.store(births + code, tl.load(births + code, mask=has_form, other=0) + 1, mask=has_form & is_new)
    if (tl.program_id(0) == 0) & (tokens > 0):
        tl.store(rng + 1, tl.load(rng + 1) + 1)
        updates = tl.load(num_updates)
        tl.store(num_updates, tl.where(updates >= 0, updates + 1, updates))


@triton.jit
def _row(formed, new_avg, candidates, place, here, is_new, share, scale, REVIVE: tl.constexpr):
    value, average_ = tl.load(formed + place, mask=here, other=0.0), tl.load(new_avg + place, mask=here, other=0.0)
    if REVIVE:
        token = tl.load(candidates + place, mask=here, other=0.0)
        value = tl.where(is_new[:, None], token, value)
        average_ = tl.where(is_new[:, None], token * share, average_) * scale
    return value, average_


@triton.jit
def _lerp(old, new, weight):
    return tl.where(weight < 0.5, old + weight * (new - old), new - (new - old) * (1 - weight))


@triton.jit
def _sum_of(values, K, BLOCK_S: tl.constexpr):
    total = tl.zeros((BLOCK_S,), tl.float32)
    for start in range(0, K, BLOCK_S):
        m = start + tl.arange(0, BLOCK_S)
        total += tl.load(values + m, mask=m < K, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def _count_below(values, limit, K, BLOCK_S: tl.constexpr):
    total = tl.zeros((BLOCK_S,), tl.int32)
    for start in range(0, K, BLOCK_S):
        m = start + tl.arange(0, BLOCK_S)
        total += ((tl.load(values + m, mask=m < K, other=0.0) < limit) & (m < K)).to(tl.int32)
    return tl.sum(total, 0)


@triton.jit
def _any_drawn(positions, K, BLOCK_S: tl.constexpr):
    last = tl.full((BLOCK_S,), -1, tl.int64)
    for start in range(0, K, BLOCK_S):
        m = start + tl.arange(0, BLOCK_S)
        last = tl.maximum(last, tl.load(positions + m, mask=m < K, other=-1))
    return tl.max(last, 0) >= 0


@triton.jit
def _bits(value):
    value = tl.where(value == 0, 0.0, value)  # minus zero becomes zero
    return value.to(tl.int32, bitcast=True).to(tl.int64)


@triton.jit
def _mix(z):
    z = (z ^ ((z >> 30) & (2**34 - 1))) * _MIX_1
    z = (z ^ ((z >> 27) & (2**37 - 1))) * _MIX_2
    return z ^ ((z >> 31) & (2**33 - 1))


@triton.jit
def _random_bits(rng, lane):
    """Return the numbers of :func:`vqssl.functional.random.random_bits` for lanes from 1."""
    key = _mix(_mix(tl.load(rng) + _GAMMA) + tl.load(rng + 1) * _GAMMA)
    return (_mix(key + lane * _GAMMA) >> 2) & (2**62 - 1)
