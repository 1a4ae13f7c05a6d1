"""The exact search in PyTorch, on any device: one matrix product, an error bound, and a second look at close calls.

1. *Scores.* The nearest code maximises ``s = x·c - |c|²/2`` (euclidean) or ``s = x·c`` with codes of length 1 (cosine).
   One product scores a tile of tokens against a block of codes in float32 (float64 for float64 input); the ``N x K``
   scores never exist as a whole.
2. *First look.* Rounding moves a score by at most half of the row's ``margin``, which :func:`_margin` computes. If the
   best score leads all others by more than the margin, its code is the nearest: the row is *certified*.
3. *Second look.* The few rows per thousand that remain are scored again. Every code within the margin of the best score
   is a *candidate*, and :func:`second_look` compares the candidates of a row in float64, from the values as given.

Copies and far codes are set apart first (:mod:`vqssl.kernels.nearest.set_apart`).

For the euclidean metric, tokens and codes are first centred on the mean of the codes. That changes no winner, and it
keeps the margin small when all features share a large mean.

Columns of scores come in *groups* of 64. The maximum of each group is computed first (the ``peaks``), because a maximum
over 64 contiguous numbers takes a tenth of the time of ``torch.argmax``.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from vqssl.kernels.finite import finite_rows
from vqssl.kernels.nearest.rule import exact_codes, exact_scores
from vqssl.kernels.nearest.set_apart import candidates_for_far_codes, far_codes, first_of_equals
from vqssl.kernels.workspace import workspace

__all__ = ["nearest_codeword_tiled"]

GROUP = 64
"""Codes per group of the two-level maximum."""
MAX_CODES = 2**11
"""Most codes per product. With more, a tile would have too few rows for a fast product, or too many scores."""
PAIR_ELEMENTS = 2**20
"""Most float64 numbers that the second look compares at once."""


def nearest_codeword_tiled(x: Tensor, codebook: Tensor, metric: str) -> Tensor:
    """Return the index of the code nearest to each token: ``(N, D), (K, D) -> (N,)`` int64.

    Must run without autocast: the error bound assumes the dtype that the scores are computed in.
    """
    if x.shape[0] == 0:
        return torch.empty(0, dtype=torch.int64, device=x.device)
    usable = first_of_equals(codebook, metric)
    far = far_codes(codebook, usable) if metric == "euclidean" else None
    if far is None:
        return _search(x, codebook, metric, usable)
    indices = _search(x, codebook, metric, usable & ~far.members)
    rows = candidates_for_far_codes(x, far)
    indices[rows] = _search(x[rows], codebook, metric, usable)
    return indices


def _search(x: Tensor, codebook: Tensor, metric: str, usable: Tensor) -> Tensor:
    """Return the index of the nearest usable code: ``(N, D), (K, D), (K,) -> (N,)`` int64."""
    indices = torch.full((x.shape[0],), -1, dtype=torch.int64, device=x.device)
    if indices.numel() == 0:
        return indices
    work = torch.promote_types(torch.promote_types(x.dtype, codebook.dtype), torch.float32)
    codes = _prepare(codebook, metric, work, len(x), usable)
    tiles = Tiles(len(x), codes)
    certified = torch.empty_like(indices, dtype=torch.bool)
    for start, stop in _ranges(len(x), tiles.rows):
        first_look(x[start:stop], codes, tiles, indices[start:stop], certified[start:stop])
    uncertified = (~certified).nonzero().squeeze(-1)
    for start, stop in _ranges(len(uncertified), tiles.rows_of_all_codes):
        rows = uncertified[start:stop]
        indices[rows] = second_look(x[rows], codes, tiles)
    return indices


def _ranges(length: int, step: int) -> Iterator[tuple[int, int]]:
    """Yield start and stop of consecutive pieces of ``length``."""
    for start in range(0, length, step):
        yield start, min(start + step, length)


class PreparedCodes(NamedTuple):
    """A codebook prepared for scoring."""

    metric: str
    given: Tensor
    """``(K, D)``: the codes as given."""
    usable: Tensor
    """``(K,)`` bool: the codes that may win."""
    centre: Tensor
    """``(D,)``: what is subtracted from tokens and codes; zeros for cosine."""
    columns: Tensor
    """``(D + 1, K')``: each column holds a centred code and, in the last row, the constant part of its score.

    The constant is -|c|²/2 (zero for cosine), and -inf for unusable codes. K' is K rounded up to whole groups. With the
    constant in the product, no bias has to be added to the scores afterwards, which would cost more.
    """
    max_norm: Tensor
    """Scalar: the length of the longest centred code."""


def _prepare(codebook: Tensor, metric: str, work: torch.dtype, rows: int, usable: Tensor) -> PreparedCodes:
    """Centre (or normalise) the codes and lay them out as the columns of the product with ``rows`` tokens."""
    codes = torch.where(usable[:, None], codebook, 0.0) if not usable.all() else codebook
    size, width = codes.shape
    padded = size + -size % GROUP
    scored = workspace("codes", work, codes.device, padded, width + 1)
    centred = scored[:size, :width]
    centre = scored.new_zeros(width)
    if metric == "euclidean":
        mean = codes.to(work).sum(0) / usable.sum().clamp_min(1)
        centre = torch.where(torch.isfinite(mean), mean, 0.0)
        torch.sub(codes, centre, out=centred)
    else:
        centred.copy_(exact_codes(codes, metric))
    lengths = torch.linalg.vector_norm(centred, dim=1)
    constant = -0.5 * lengths.square() if metric == "euclidean" else torch.zeros_like(lengths)
    scored[:size, width] = torch.where(usable, constant, -torch.inf)
    scored[size:, :width] = 0.0
    scored[size:, width] = -torch.inf
    columns = scored.T
    if rows > size:  # a contiguous right factor makes the product faster, which pays for the copy if rows are many
        columns = workspace("columns", work, codes.device, width + 1, padded).copy_(columns)
    return PreparedCodes(metric, codebook, usable, centre, columns, torch.where(usable, lengths, 0.0).amax())


class Tiles:
    """The sizes of the tiles, and the scratch memory that all tiles use in turn.

    On a CPU each thread gets 2^20 scores, 4 MB of float32: more do not fit its share of the cache, and with fewer the
    threads spend their time on starting. So tiles grow with the threads (64 of them share 2^26 scores), but not beyond
    half the size of the tokens: memory stays a fraction of what the caller already holds. A GPU gets fewer, larger
    launches.
    """

    def __init__(self, rows: int, codes: PreparedCodes) -> None:
        columns = codes.columns
        work, device = columns.dtype, columns.device
        width, size = columns.shape
        scores = 2**26
        if device.type == "cpu":
            scores = max(2**21, min(torch.get_num_threads() * 2**20, rows * width // 2))
        self.codes = min(size, MAX_CODES)
        # Equal tiles: a short last tile would cost as many calls as a full one.
        self.rows = math.ceil(rows / max(1, round(rows * self.codes / scores)))
        # In a second look every code of every row may be a candidate, listed as two int64.
        self.rows_of_all_codes = max(1, min(scores // 4 // size, self.rows))
        self.scores = workspace("scores", work, device, max(self.rows * self.codes, self.rows_of_all_codes * size))
        self.peaks = workspace("peaks", work, device, self.rows * self.codes // GROUP)
        self.members = workspace("members", work, device, self.rows, GROUP)
        self.tokens = workspace("tokens", work, device, self.rows, width)
        self.tokens[:, -1] = 1.0
        self.row = torch.arange(self.rows, device=device)
        place = torch.arange(max(GROUP, self.codes // GROUP), device=device)
        # (2, ·): the rows 1, 1, 1... and 0, 1, 2..., by which _best_of_each_row counts and locates.
        self.count_and_place = torch.stack([torch.ones_like(place), place]).to(work)

    def centred(self, x: Tensor, codes: PreparedCodes) -> Tensor:
        """Return the tokens as they are scored, with a last entry of 1: ``(R, D) -> (R, D + 1)``."""
        tokens = self.tokens[: len(x)]
        torch.sub(x, codes.centre, out=tokens[:, :-1])
        return tokens

    def score(self, tokens: Tensor, columns: Tensor) -> Tensor:
        """Return the scores of the tokens: ``(R, D + 1), (D + 1, K') -> (R, K')``."""
        return torch.mm(tokens, columns, out=self.scores[: len(tokens) * columns.shape[1]].view(len(tokens), -1))


def first_look(x: Tensor, codes: PreparedCodes, tiles: Tiles, indices: Tensor, certified: Tensor) -> None:
    """Write the best code of each row to ``indices``, and whether it is certified; if it is not, it may be wrong."""
    tokens = tiles.centred(x, codes)
    margin = _margin(tokens, codes)
    blocks = codes.columns.split(tiles.codes, 1)
    best, alone, index = _best_of_each_row(tiles.score(tokens, blocks[0]), margin, tiles)
    for number, block in enumerate(blocks[1:], 1):
        block_best, block_alone, place = _best_of_each_row(tiles.score(tokens, block), margin, tiles)
        better, apart = block_best > best, (block_best - best).abs_() > margin
        alone = torch.where(better, block_alone, alone) & apart
        index = torch.where(better, place + number * tiles.codes, index)
        best = torch.maximum(best, block_best)
    torch.logical_and(alone, torch.isfinite(best), out=certified)
    indices.copy_(index)


def _best_of_each_row(scores: Tensor, margin: Tensor, tiles: Tiles) -> tuple[Tensor, Tensor, Tensor]:
    """Return the best score of each row, whether it leads by more than the margin, and if so its place.

    Reads the scores only once, for the peak of each group. The peaks within the margin are then counted and located by
    one small product with the rows 1, 1, 1... and 0, 1, 2...: if the count is 1, the sum of the places is the place.
    The same finds the column in that group. (torch.argmax takes ten times as long, torch.topk twenty times.)

    Args:
        scores: ``(R, K')``, K' a multiple of the group.
        margin: ``(R,)``.
        tiles: scratch memory.

    Returns:
        ``(R,)``, ``(R,)`` bool and ``(R,)`` int64.
    """
    rows, groups = len(scores), scores.shape[1] // GROUP
    grouped = scores.view(rows, groups, GROUP)
    peaks = torch.amax(grouped, -1, out=tiles.peaks[: rows * groups].view(rows, groups))
    best = peaks.amax(-1)
    threshold = (best - margin)[:, None]
    close_groups, group = tiles.count_and_place[:, :groups] @ peaks.ge_(threshold).T
    group = group.clamp_(max=groups - 1).long()
    chosen = torch.add(group, tiles.row[:rows], alpha=groups)
    members = torch.index_select(grouped.view(-1, GROUP), 0, chosen, out=tiles.members[:rows])
    close_members, place = tiles.count_and_place[:, :GROUP] @ members.ge_(threshold).T
    return best, close_groups * close_members == 1, group.mul_(GROUP).add_(place.long())


def _margin(tokens: Tensor, codes: PreparedCodes) -> Tensor:
    r"""Return twice the largest rounding error of any score of each row: ``(R, D + 1) -> (R,)``.

    .. math:: 2 \left[ (D + 12)\, u + 3 r \right] (|x|\,|c| + |c|^2) + \text{underflow}

    The first term is the standard bound of an inner product of D terms (Higham, Accuracy and Stability of Numerical
    Algorithms, 3.1) with a few roundings more for centring and constant; c is the longest code, u the unit roundoff of
    the products' dtype, and r the rounding of their input that the user's settings allow.
    """
    info = torch.finfo(tokens.dtype)
    terms = tokens.shape[-1] + 11
    relative = terms * info.eps / 2 + 3 * _input_roundoff(tokens.dtype)
    size = tokens[:, :-1].norm(dim=-1) * codes.max_norm + codes.max_norm.square()
    return 2.0 * (relative * size + terms * info.tiny)


def _input_roundoff(work: torch.dtype) -> float:
    """Return how far a product may round its input, beyond its dtype, by ``torch.set_float32_matmul_precision``."""
    if work != torch.float32:
        return 0.0
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # torch raises if its old and its new switches were both used: assume the worst
        precision = "medium"
    return {"highest": 0.0, "high": 2.0**-11}.get(precision, 2.0**-8)


def second_look(x: Tensor, codes: PreparedCodes, tiles: Tiles) -> Tensor:
    """Return the index of the exact winner of each row, -1 if there is none: ``(R, D) -> (R,)`` int64."""
    row, code = _candidates(x, codes, tiles)
    step = max(1, PAIR_ELEMENTS // x.shape[-1])
    exact = torch.cat(
        [
            exact_scores(x[r].double(), exact_codes(codes.given[c], codes.metric), codes.metric)
            for r, c in zip(row.split(step), code.split(step), strict=True)
        ]
    )
    best = exact.new_full((len(x),), -torch.inf).scatter_reduce_(0, row, exact, "amax")
    wins = exact == best[row]
    no_code = len(codes.given)
    winner = code.new_full((len(x),), no_code).scatter_reduce_(0, row[wins], code[wins], "amin")
    return torch.where(winner == no_code, -1, winner)


def _candidates(x: Tensor, codes: PreparedCodes, tiles: Tiles) -> tuple[Tensor, Tensor]:
    """Return P pairs of a row and a usable code that may be its nearest; rows that are not finite have none.

    Args:
        x: ``(R, D)``.
        codes: the K codes.
        tiles: scratch memory.

    Returns:
        Rows ``(P,)`` and codes ``(P,)``, int64.
    """
    tokens = tiles.centred(x, codes)
    scores = tiles.score(tokens, codes.columns)
    groups = scores.shape[1] // GROUP
    grouped = scores.view(len(x), groups, GROUP)
    peaks = grouped.amax(-1)
    threshold = peaks.amax(-1) - _margin(tokens, codes)
    # Scores that overflowed exclude no code.
    overflowed = ~torch.isfinite(threshold)
    row, group = (
        ((peaks >= threshold[:, None]) | overflowed[:, None]).logical_and_(finite_rows(x)[:, None]).nonzero().unbind(1)
    )
    members = grouped.view(-1, GROUP)[row * groups + group]
    close, place = ((members >= threshold[row, None]) | overflowed[row, None]).nonzero().unbind(1)
    row, code = row[close], group[close] * GROUP + place
    usable = torch.nn.functional.pad(codes.usable, (0, groups * GROUP - len(codes.usable)))[code]
    return row[usable], code[usable]
