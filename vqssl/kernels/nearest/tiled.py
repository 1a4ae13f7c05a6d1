"""The exact search in PyTorch, on any device: one matrix product, an error bound, and a closer look where it is close.

1. *Distinct codes.* Equal codes tie, and the first of them wins. So only the first is searched
   (:mod:`vqssl.kernels.repeats`), and codes that are not finite are left out.
2. *Scores.* The nearest code maximises ``s = x·c - |c|²/2`` (euclidean) or ``s = x·c`` with codes of length 1 (cosine).
   One product scores a tile of tokens against a block of codes in float32 (float64 for float64 input); the ``N x K``
   scores never exist as a whole. Centring and scaling (:mod:`vqssl.kernels.nearest.prepare`) keep their rounding small.
3. *First look.* If the best score leads all others by more than the margin (:mod:`vqssl.kernels.nearest.margin`), its
   code is the nearest.
4. *Second look.* Otherwise every code within the margin is a *candidate*. A few candidates are compared in float64,
   from the values as given (:mod:`vqssl.kernels.nearest.settle`).
5. *Last look.* Tokens with many candidates are searched again by a product in float64, whose margin is 10^9 times
   smaller; what is still open there is compared pair by pair.
"""

import math

import torch
from torch import Tensor

from vqssl.kernels.finite import finite_rows
from vqssl.kernels.nearest.looks import OPEN, Summary, candidates, lone_winners, summarize
from vqssl.kernels.nearest.margin import margin
from vqssl.kernels.nearest.prepare import GROUP, lengths_as_scored, prepare, tokens_as_scored
from vqssl.kernels.nearest.product import Factor
from vqssl.kernels.nearest.rule import exact_codes
from vqssl.kernels.nearest.settle import settle
from vqssl.kernels.nearest.whole import nearest_without_rounding
from vqssl.kernels.repeats import first_equal_rows
from vqssl.kernels.workspace import Workspace, workspace

__all__ = ["nearest_codeword_tiled"]

MAX_CODES = 2**13
"""Most codes per product. With more, a tile would have too few rows for a fast product, or too many scores."""
MAX_KEPT = 2**20
"""Most scores that are kept of several tiles at once: 4 MB of float32."""
FEW = 8
"""Most candidates of a token that the second look compares: more are cheaper by a product in float64."""
MANY = 1 / 8
"""Share of open rows from which a tile takes its second look at once, while its scores are at hand."""


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
        found = _Search(codes, metric, work, len(x), FEW, memory).run(x)
        rows = (found < 0).nonzero().squeeze(1)
        rows = rows[finite_rows(x[rows])]
        if len(rows):
            found[rows] = _last_look(x[rows], codes, metric, memory)
    return found if codes is codebook else torch.where(found < 0, -1, kept[found])


def _distinct_codes(codebook: Tensor, metric: str) -> Tensor:
    """Return the ascending indices of the finite codes that equal no code before them: ``(K, D) -> (K',)`` int64."""
    compared = exact_codes(codebook, metric) if metric == "cosine" else codebook
    index = torch.arange(len(codebook), device=codebook.device)
    return (finite_rows(codebook) & (first_equal_rows(compared) == index)).nonzero().squeeze(1)


def _last_look(x: Tensor, codes: Tensor, metric: str, memory: Workspace) -> Tensor:
    """Return the index of the nearest code of each finite token, by float64: ``(R, D) -> (R,)`` int64."""
    first = first_equal_rows(x)
    rows = (first == torch.arange(len(x), device=x.device)).nonzero().squeeze(1)
    found = torch.empty_like(first)
    found[rows] = nearest_without_rounding(x[rows], codes, metric)
    rows = rows[found[rows] < 0]
    if len(rows):
        found[rows] = _Search(codes, metric, torch.float64, len(rows), None, memory).run(x[rows])
    return found[first]


class _Search:
    """One search of finite, distinct codes by products in one dtype.

    Args:
        codes: ``(K, D)``.
        metric: as in :mod:`vqssl.kernels.nearest.rule`.
        work: dtype of the products.
        rows: number of tokens.
        few: most candidates of a token that are compared; a token with more gets -1. None: no limit.
        memory: scratch memory.
    """

    def __init__(
        self, codes: Tensor, metric: str, work: torch.dtype, rows: int, few: int | None, memory: Workspace
    ) -> None:
        self.codes, self.metric, self.few, self.memory = codes, metric, few, memory
        self.prepared = prepare(codes, metric, work, memory)
        weight, constant = self.prepared.weight, self.prepared.constant
        most = _most_scores(rows, codes)
        self.tile = _equal_steps(rows, min(most // min(len(weight), MAX_CODES), _most_rows(codes)))
        self.blocks = [
            Factor(*block, self.tile) for block in zip(weight.split(MAX_CODES), constant.split(MAX_CODES), strict=True)
        ]
        # Without a limit every code of every row may be a candidate, listed as two int64.
        self.rows_of_all_codes = max(1, most // len(weight) // (1 if few else 8))

    def run(self, x: Tensor) -> Tensor:
        """Return the index of the nearest code: ``(N, D) -> (N,)`` int64, -1 for tokens that are not finite."""
        found = torch.empty(len(x), dtype=torch.int64, device=x.device)
        several = max(1, MAX_KEPT // max(GROUP, len(self.prepared.weight) // GROUP) // self.tile)
        tiles, start = 1, 0
        while start < len(x):
            part = slice(start, start + tiles * self.tile)
            many_open = self._first_look(x[part], found[part])
            tiles, start = (1 if many_open else several), part.stop
        rows = (found == OPEN).nonzero().squeeze(1)
        for start in range(0, len(rows), self.rows_of_all_codes):
            these = rows[start : start + self.rows_of_all_codes]
            found[these] = self._second_look(x[these])
        return found

    def _first_look(self, x: Tensor, found: Tensor) -> bool:
        """Write the nearest codes, OPEN where the scores do not decide; return True if that is often the case."""
        summary = Summary.empty(len(x), len(self.prepared.weight) // GROUP, self.prepared.weight, self.memory)
        for start in range(0, len(x), self.tile):
            tokens = tokens_as_scored(x[start : start + self.tile], self.prepared, self.memory)
            entries = summary.rows(start, start + self.tile)
            entries.length.copy_(lengths_as_scored(tokens))
            for number, block in enumerate(self.blocks):
                scores = block.scores(tokens)
                summarize(scores, number * MAX_CODES // GROUP, entries)
        threshold = summary.best - margin(summary.length, summary.best, self.prepared.bound)
        found.copy_(lone_winners(summary, threshold))
        rows = (found == OPEN).nonzero().squeeze(1)
        many_open = len(rows) > MANY * len(x)
        if many_open and len(self.blocks) == 1 and len(scores) == len(x):  # all scores are still at hand
            found[rows] = self._compare(x[rows], scores[rows], threshold[rows])
        return many_open

    def _second_look(self, x: Tensor) -> Tensor:
        """Return the nearest of the candidates of each token, by scoring it again: ``(R, D) -> (R,)``."""
        tokens = tokens_as_scored(x, self.prepared, self.memory)
        scores = torch.cat([block.scores(tokens) for block in self.blocks], 1)
        best = scores.amax(1)
        return self._compare(x, scores, best - margin(lengths_as_scored(tokens), best, self.prepared.bound))

    def _compare(self, x: Tensor, scores: Tensor, threshold: Tensor) -> Tensor:
        """Return the nearest of the codes whose score reaches the threshold, -1 where there are none or many."""
        # Scores that overflowed exclude no code; tokens that are not finite have none.
        threshold = torch.where(torch.isfinite(threshold), threshold, torch.nan)
        threshold = torch.where(finite_rows(x), threshold, torch.inf)
        row, code = candidates(scores, threshold, len(self.codes), self.few)
        found = torch.full((len(x),), -1, dtype=torch.int64, device=x.device)
        if len(row):
            rows, nearest = settle(x, self.codes, self.metric, row, code)
            found[rows] = nearest
        return found


def _most_scores(rows: int, codes: Tensor) -> int:
    """Return how many scores of ``rows`` tokens are held at once, at most.

    On a CPU each thread gets 2^20 scores, 4 MB of float32: more do not fit its share of the cache, and with fewer the
    threads spend their time on starting. So tiles grow with the threads, up to the 16 MB that the allocator keeps from
    one product to the next, but not beyond half the size of the tokens: memory stays a fraction of what the caller
    already holds. A GPU gets fewer, larger launches.
    """
    if codes.device.type != "cpu":
        return 2**26
    return max(2**21, min(torch.get_num_threads() * 2**20, 2**22, rows * codes.shape[1] // 2))


def _most_rows(codes: Tensor) -> int:
    """Return how many tokens are scored at once, at most: on a CPU what leaves scores of few codes in the cache."""
    return 2**10 * torch.get_num_threads() if codes.device.type == "cpu" else 2**26


def _equal_steps(rows: int, most: int) -> int:
    """Return the size of about equal steps: a short last one would cost as many calls as a full one."""
    return math.ceil(rows / max(1, round(rows / max(1, most))))
