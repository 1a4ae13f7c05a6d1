"""The exact search in PyTorch, on any device: one matrix product, an error bound, and exact comparisons where it is close.

1. *Distinct codes.* Equal codes tie, and the first of them wins. So only the first is searched
   (:mod:`vqssl.kernels.nearest.distinct`), and codes that are not finite are left out.
2. *Scores.* The nearest code maximises ``s = x·c - |c|²/2`` (euclidean) or ``s = x·c`` with codes of length 1 (cosine).
   One product scores a tile of tokens against a block of codes in float32 (float64 for float64 input); the ``N x K``
   scores never exist as a whole. Centring and scaling (:mod:`vqssl.kernels.nearest.prepare`) keep their rounding small.
3. *First look.* If the best score leads all others by more than the margin (:mod:`vqssl.kernels.nearest.margin`), its
   code is the nearest. Otherwise every code within the margin is a *candidate*, while the scores are at hand. A few
   candidates are compared in float64, from the values as given (:mod:`vqssl.kernels.nearest.settle`).
4. *Last look.* Tokens with many candidates are searched again by a product in float64, whose margin is 10^9 times
   smaller; what is still open there is compared pair by pair.

Columns of scores come in *groups* of 64. The maximum of each group is computed first (the ``peaks``), because a maximum
over 64 contiguous numbers takes a tenth of the time of ``torch.argmax``.
"""

import math

import torch
from torch import Tensor

from vqssl.kernels.finite import finite_rows
from vqssl.kernels.nearest.distinct import first_equal
from vqssl.kernels.nearest.margin import margin
from vqssl.kernels.nearest.prepare import GROUP, Prepared, prepare, tokens_as_scored
from vqssl.kernels.nearest.product import product
from vqssl.kernels.nearest.rule import exact_codes
from vqssl.kernels.nearest.settle import settle
from vqssl.kernels.nearest.whole import nearest_without_rounding
from vqssl.kernels.workspace import Workspace, workspace

__all__ = ["nearest_codeword_tiled"]

MAX_CODES = 2**13
"""Most codes per product. With more, a tile would have too few rows for a fast product, or too many scores."""
FEW = 8
"""Most candidates of a token that the first look compares: more are cheaper by a product in float64."""


def nearest_codeword_tiled(x: Tensor, codebook: Tensor, metric: str) -> Tensor:
    """Return the index of the code nearest to each token: ``(N, D), (K, D) -> (N,)`` int64.

    Must run without autocast: the error bound assumes the dtype that the scores are computed in.
    """
    kept = _distinct_codes(codebook, metric)
    if 0 in (len(x), len(kept)):
        return kept.new_full((len(x),), -1)
    codes = codebook if len(kept) == len(codebook) else codebook[kept]
    work = torch.promote_types(torch.promote_types(x.dtype, codebook.dtype), torch.float32)
    with workspace() as memory:
        found = _look(x, codes, metric, work, FEW, memory)
        rows = (found < 0).nonzero().squeeze(1)
        rows = rows[finite_rows(x[rows])]
        if len(rows):
            found[rows] = _last_look(x[rows], codes, metric, memory)
    return torch.where(found < 0, -1, kept[found])


def _distinct_codes(codebook: Tensor, metric: str) -> Tensor:
    """Return the ascending indices of the finite codes that equal no code before them: ``(K, D) -> (K',)`` int64."""
    compared = exact_codes(codebook, metric) if metric == "cosine" else codebook
    index = torch.arange(len(codebook), device=codebook.device)
    return (finite_rows(codebook) & (first_equal(compared) == index)).nonzero().squeeze(1)


def _last_look(x: Tensor, codes: Tensor, metric: str, memory: Workspace) -> Tensor:
    """Return the index of the nearest code of each finite token, by float64: ``(R, D) -> (R,)`` int64."""
    first = first_equal(x)
    rows = (first == torch.arange(len(x), device=x.device)).nonzero().squeeze(1)
    found = torch.empty_like(first)
    found[rows] = nearest_without_rounding(x[rows], codes, metric, memory)
    rows = rows[found[rows] < 0]
    if len(rows):
        found[rows] = _look(x[rows], codes, metric, torch.float64, None, memory)
    return found[first]


def _look(x: Tensor, codes: Tensor, metric: str, work: torch.dtype, few: int | None, memory: Workspace) -> Tensor:
    """Return the index of the nearest code: ``(N, D) -> (N,)`` int64, -1 where none was found.

    Args:
        x: tokens ``(N, D)``; those that are not finite get -1.
        codes: finite, distinct codes ``(K, D)``.
        metric: as in :mod:`vqssl.kernels.nearest.rule`.
        work: dtype of the product.
        few: most candidates of a token; with more it gets -1. None: no limit.
        memory: scratch memory.
    """
    prepared = prepare(codes, metric, work, memory)
    found = torch.empty(len(x), dtype=torch.int64, device=x.device)
    step = _rows_of_a_tile(x, prepared, few)
    for part, answer in zip(x.split(step), found.split(step), strict=True):
        tokens = tokens_as_scored(part, prepared, memory)
        length = tokens.norm(dim=1)
        best, alone, index, scores = _best_of_each_row(tokens, length, prepared, memory)
        answer.copy_(torch.where(alone, index, -1))
        rows = (~alone).nonzero().squeeze(1)
        if not len(rows):
            continue
        threshold = best[rows] - margin(length[rows], best[rows], prepared.bound)
        if len(prepared.weight) > MAX_CODES:
            scores = product(tokens[rows], prepared.weight, prepared.constant, memory)
        else:
            scores = scores[rows]
        row, code = _candidates(scores, threshold, len(codes), few)
        decided, winner = settle(part, codes, metric, rows[row], code)
        answer[decided] = winner
    return found


def _rows_of_a_tile(x: Tensor, prepared: Prepared, few: int | None) -> int:
    """Return how many tokens are scored at once.

    On a CPU each thread gets 2^20 scores, 4 MB of float32: more do not fit its share of the cache, and with fewer the
    threads spend their time on starting. So tiles grow with the threads, up to what the allocator keeps between tiles,
    but not beyond half the size of the tokens: memory stays a fraction of what the caller already holds. A GPU gets
    fewer, larger launches.
    """
    rows, width = x.shape
    count = len(prepared.weight)
    scores = 2**26
    if x.device.type == "cpu":
        scores = max(2**21, min(torch.get_num_threads() * 2**20, 2**22, rows * width // 2))
    if few is None:  # every code of every row may be a candidate, listed as two int64
        return max(1, scores // 8 // count)
    # Equal tiles: a short last tile would cost as many calls as a full one.
    return math.ceil(rows / max(1, round(rows * min(count, MAX_CODES) / scores)))


def _best_of_each_row(
    tokens: Tensor, length: Tensor, prepared: Prepared, memory: Workspace
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return best score, whether it leads by more than the margin, its place if so, and the last block's scores."""
    blocks = zip(prepared.weight.split(MAX_CODES), prepared.constant.split(MAX_CODES), strict=True)
    for number, (weight, constant) in enumerate(blocks):
        scores = product(tokens, weight, constant, memory)
        peaks = scores.view(len(scores), -1, GROUP).amax(-1)
        block_best = peaks.amax(-1)
        block_alone, place = _only_one(scores, peaks, block_best - margin(length, block_best, prepared.bound))
        if number == 0:
            best, alone, index = block_best, block_alone, place
            continue
        better, gap = block_best > best, (block_best - best).abs_()
        best = torch.maximum(best, block_best)
        alone = torch.where(better, block_alone, alone) & (gap > margin(length, best, prepared.bound))
        index = torch.where(better, place + number * MAX_CODES, index)
    return best, alone, index, scores


def _only_one(scores: Tensor, peaks: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """Return whether one score of each row reaches its threshold alone, and if so its place.

    Reads only the peaks, and the one group that decides. The peaks that reach the threshold are counted and located by
    one small product with the rows 1, 1, 1... and 0, 1, 2...: if the count is 1, the sum of the places is the place.
    The same finds the column in that group. (torch.argmax takes ten times as long, torch.topk twenty times.)

    Args:
        scores: ``(R, K')``, K' a multiple of the group.
        peaks: ``(R, K' / 64)``, overwritten.
        threshold: ``(R,)``; with NaN or an infinity no score is alone.

    Returns:
        ``(R,)`` bool and ``(R,)`` int64.
    """
    rows, groups = peaks.shape
    place = torch.arange(max(GROUP, groups), device=scores.device)
    count_and_place = torch.stack([torch.ones_like(place), place]).to(scores.dtype)
    threshold = threshold[:, None]
    close_groups, group = count_and_place[:, :groups] @ peaks.ge_(threshold).T
    group = group.clamp_(max=groups - 1).long()
    chosen = torch.arange(0, rows * groups, groups, device=scores.device).add_(group)
    members = scores.view(-1, GROUP).index_select(0, chosen)
    close_members, column = count_and_place[:, :GROUP] @ members.ge_(threshold).T
    alone = (close_groups * close_members == 1).logical_and_(torch.isfinite(threshold[:, 0]))
    return alone, group.mul_(GROUP).add_(column.long())


def _candidates(scores: Tensor, threshold: Tensor, count: int, few: int | None) -> tuple[Tensor, Tensor]:
    """Return P pairs of a row and a code that may be its nearest, without rows of more than a few.

    Args:
        scores: ``(R, K')``.
        threshold: ``(R,)``; what is not finite excludes no code.
        count: K, the number of codes.
        few: most candidates of a row, or None.

    Returns:
        Rows ``(P,)``, ascending, and codes ``(P,)``, int64.
    """
    threshold = torch.where(torch.isfinite(threshold), threshold, torch.nan)
    grouped = scores.view(len(scores), -1, GROUP)
    groups = grouped.shape[1]
    close_groups = ~(grouped.amax(-1) < threshold[:, None])
    if few is not None:
        close_groups &= (torch.isfinite(threshold) & (close_groups.sum(1) <= few))[:, None]
    row, group = close_groups.nonzero().unbind(1)
    members = grouped.view(-1, GROUP)[row * groups + group]
    close, column = (~(members < threshold[row, None])).nonzero().unbind(1)
    row, code = row[close], group[close] * GROUP + column
    kept = code < count
    if few is not None:
        kept &= (torch.bincount(row, minlength=len(scores)) <= few)[row]
    return row[kept], code[kept]
