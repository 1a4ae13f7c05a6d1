"""Nearest-codeword search: the op, its reference, and the tiled path that every device can run.

The rule that all backends share, and that :func:`nearest_reference` states in its slowest form:

- the answer is the code nearest in **float64** to the values as given, whatever the input's dtype;
- the lowest index wins ties, also between equal codes;
- a row that holds NaN or an infinity has no nearest code: its index is -1. It is reported, not raised, because
  a raise would have to wait for the device at every step and would break CUDA graphs;
- a code that holds NaN or an infinity is never chosen; where no finite code is left, the index is -1.

The tiled path gets there with one matrix product and a certificate. A tile of rows is scored against the codes,
s = x.c - |c|^2/2; rounding can move a score by at most ``err``, so a code that wins by more than ``2 err`` has won.
The other rows (a few in a thousand) are scored again, and the codes within ``2 err`` of the best are compared in
float64. Codes and tokens are centred first: that leaves the winner as it is and keeps ``err`` small when features
have a large common mean.

CUDA tensors go to ``nearest_triton.py`` where Triton is, float64 excepted, and to the tiled path elsewhere.

A precision other than "exact" allows a backend to skip the certificate and round the product's input to that format.
Only the Triton backend takes the offer: on a CPU the exact answer costs no more.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vqssl.kernels.backends import by_triton
from vqssl.kernels.look_up import unbatched
from vqssl.kernels.workspace import workspace

METRICS = ("euclidean", "cosine")
PRECISIONS = ("exact", "tf32", "fp16", "bf16")

# Codes per group of the two-level maximum: an amax over 64 contiguous scores costs a tenth of torch.argmax.
_GROUP = 64
# Codes per product at most: with more, a tile would have too few rows for the product to be fast, or too many scores.
_MAX_CODES = 2**11
# Elements compared at once in the float64 second look.
_PAIR_ELEMENTS = 2**20


@torch.library.custom_op("vqssl::nearest_codeword", mutates_args=())
def nearest_codeword(x: Tensor, codebook: Tensor, metric: str, precision: str = "exact") -> Tensor:
    """``(N, D), (K, D) -> (N,)`` int64, by the rule at the head of this file. Inputs are not validated here."""
    # A caller's autocast would turn the score product into bf16 and make the error bound a lie.
    with torch.autocast(x.device.type, enabled=False):
        return _search(x, codebook, metric)


@nearest_codeword.register_kernel("cuda")
def _(x: Tensor, codebook: Tensor, metric: str, precision: str = "exact") -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        if torch.float64 not in (x.dtype, codebook.dtype):
            found = by_triton("nearest_triton", "nearest_codeword_triton", x, codebook, metric, precision)
            if found is not None:
                return found
        return _search(x, codebook, metric)


@nearest_codeword.register_fake
def _(x: Tensor, codebook: Tensor, metric: str, precision: str = "exact") -> Tensor:
    return x.new_empty(x.shape[0], dtype=torch.int64)


@nearest_codeword.register_vmap
def _(info: Any, in_dims: Any, *arguments: Any) -> tuple[Tensor, int]:
    if in_dims[1] is None:  # more tokens for the same codes
        tokens = arguments[0].movedim(in_dims[0], 0)
        found = nearest_codeword(tokens.reshape(-1, tokens.shape[-1]), *arguments[1:])
        return found.view(tokens.shape[:-1]), 0
    each = unbatched(info.batch_size, in_dims, arguments)
    return torch.stack([nearest_codeword(*one) for one in each]), 0


def nearest_reference(x: Tensor, codebook: Tensor, metric: str = "euclidean") -> Tensor:
    """The rule in its slowest form: float64, every pair, ``N x K x D`` memory. For tests."""
    scores = _exact_scores(x.double()[:, None, :], _exact_codes(codebook, metric)[None, :, :], metric)
    scores = scores.masked_fill(~torch.isfinite(codebook).all(-1), -torch.inf)
    found = torch.isfinite(x).all(-1) & torch.isfinite(codebook).all(-1).any()
    return torch.where(found, scores.argmax(-1), -1)


def _exact_codes(codebook: Tensor, metric: str) -> Tensor:
    codes = codebook.double()
    if metric == "cosine":
        # A zero code has similarity 0 with everything.
        codes = codes / codes.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    return codes


def _exact_scores(x: Tensor, codes: Tensor, metric: str) -> Tensor:
    """Higher is nearer. The difference is taken before the square: no cancellation, and equal codes tie exactly."""
    return (x * codes).sum(-1) if metric == "cosine" else -(x - codes).square().sum(-1)


def finite_rows(x: Tensor) -> Tensor:
    """``(N, D) -> (N,)`` bool: no entry is NaN or infinite. NaN passes through both extremes, and they cost a tenth of
    asking every entry."""
    return torch.isfinite(x.amax(-1)) & torch.isfinite(x.amin(-1))


# ---- the tiled path ----


def _search(x: Tensor, codebook: Tensor, metric: str) -> Tensor:
    indices = torch.full((x.shape[0],), -1, dtype=torch.int64, device=x.device)
    if indices.numel() == 0:
        return indices
    work = torch.promote_types(torch.promote_types(x.dtype, codebook.dtype), torch.float32)
    codes = _prepare(codebook, metric, work, len(x))
    tiles = _Tiles(len(x), codes)
    certified = torch.empty_like(indices, dtype=torch.bool)
    for start, stop in _ranges(len(x), tiles.rows):
        _first_look(x[start:stop], codes, tiles, indices[start:stop], certified[start:stop])
    unsure = (~certified).nonzero().squeeze(-1)
    for start, stop in _ranges(len(unsure), tiles.rows_of_all_codes):
        rows = unsure[start:stop]
        indices[rows] = _second_look(x[rows], codes, tiles)
    return indices


def _ranges(length: int, step: int) -> Iterator[tuple[int, int]]:
    for start in range(0, length, step):
        yield start, min(start + step, length)


class _Codes(NamedTuple):
    """A codebook made ready for scoring."""

    metric: str
    given: Tensor
    """``(K, D)``: the codes as they came."""
    usable: Tensor
    """``(K,)`` bool: finite."""
    centre: Tensor
    """``(D,)``: what is subtracted from tokens and codes."""
    columns: Tensor
    """``(D + 1, K')``: centred codes, each a column, over the score's constant part -|c|^2/2; K' is a multiple of the
    group. The extra row costs the product less than adding a bias afterwards would."""
    max_norm: Tensor
    """The length of the longest centred code."""


def _prepare(codebook: Tensor, metric: str, work: torch.dtype, rows: int) -> _Codes:
    usable = finite_rows(codebook)
    codes = torch.where(usable[:, None], codebook, 0.0) if not usable.all() else codebook
    size, width = codes.shape
    padded = size + -size % _GROUP
    scored = workspace("codes", work, codes.device, padded, width + 1)
    centred = scored[:size, :width]
    centre = scored.new_zeros(width)
    if metric == "euclidean":
        mean = codes.to(work).sum(0) / usable.sum().clamp_min(1)
        centre = torch.where(torch.isfinite(mean), mean, 0.0)
        torch.sub(codes, centre, out=centred)
    else:
        centred.copy_(_exact_codes(codes, metric))
    lengths = torch.linalg.vector_norm(centred, dim=1)
    constant = -0.5 * lengths.square() if metric == "euclidean" else torch.zeros_like(lengths)
    scored[:size, width] = torch.where(usable, constant, -torch.inf)
    scored[size:, :width] = 0.0
    scored[size:, width] = -torch.inf
    columns = scored.T
    if rows > size:  # columns that lie one after the other make a faster product; turning them has to pay
        columns = workspace("columns", work, codes.device, width + 1, padded).copy_(columns)
    return _Codes(metric, codebook, usable, centre, columns, torch.where(usable, lengths, 0.0).amax())


class _Tiles:
    """How much is scored at once, and the memory for it.

    On a CPU each thread gets 2^20 scores, 4 MB of float32: more stops fitting its share of the cache, fewer leaves the
    product and the maximum too short for the threads to be worth waking. So tiles grow with the threads (64 of them
    share 2^26 scores), but not beyond half the tokens' own size, so that memory stays a fraction of what the caller
    holds already. A GPU wants fewer, larger launches.
    """

    def __init__(self, rows: int, codes: _Codes) -> None:
        columns = codes.columns
        work, device = columns.dtype, columns.device
        width, size = columns.shape
        scores = 2**26
        if device.type == "cpu":
            scores = max(2**21, min(torch.get_num_threads() * 2**20, rows * width // 2))
        self.codes = min(size, _MAX_CODES)
        # Equal tiles: a last one of a few rows takes the calls of a whole one.
        self.rows = math.ceil(rows / max(1, round(rows * self.codes / scores)))
        # A second look may find every code of every row a candidate, and lists candidates as two int64 each.
        self.rows_of_all_codes = max(1, min(scores // 4 // size, self.rows))
        self.scores = workspace("scores", work, device, max(self.rows * self.codes, self.rows_of_all_codes * size))
        self.peaks = workspace("peaks", work, device, self.rows * self.codes // _GROUP)
        self.members = workspace("members", work, device, self.rows, _GROUP)
        self.tokens = workspace("tokens", work, device, self.rows, width)
        self.tokens[:, -1] = 1.0
        self.row = torch.arange(self.rows, device=device)
        place = torch.arange(max(_GROUP, self.codes // _GROUP), device=device)
        self.count_and_place = torch.stack([torch.ones_like(place), place]).to(work)

    def centred(self, x: Tensor, codes: _Codes) -> Tensor:
        """``(R, D) -> (R, D + 1)``: tokens as they are scored, the last entry 1."""
        tokens = self.tokens[: len(x)]
        torch.sub(x, codes.centre, out=tokens[:, :-1])
        return tokens

    def score(self, tokens: Tensor, columns: Tensor) -> Tensor:
        """``(R, D + 1), (D + 1, K') -> (R, K')``."""
        return torch.mm(tokens, columns, out=self.scores[: len(tokens) * columns.shape[1]].view(len(tokens), -1))


def _first_look(x: Tensor, codes: _Codes, tiles: _Tiles, indices: Tensor, certified: Tensor) -> None:
    """Write each row's best code and whether it has won for certain; where it has not, the code is any."""
    tokens = tiles.centred(x, codes)
    margin = _margin(tokens, codes)
    blocks = codes.columns.split(tiles.codes, 1)
    best, alone, index = _peak(tiles.score(tokens, blocks[0]), margin, tiles)
    for number, block in enumerate(blocks[1:], 1):
        peak, sole, place = _peak(tiles.score(tokens, block), margin, tiles)
        better, apart = peak > best, (peak - best).abs_() > margin
        alone = torch.where(better, sole, alone) & apart
        index = torch.where(better, place + number * tiles.codes, index)
        best = torch.maximum(best, peak)
    torch.logical_and(alone, torch.isfinite(best), out=certified)
    indices.copy_(index)


def _peak(scores: Tensor, margin: Tensor, tiles: _Tiles) -> tuple[Tensor, Tensor, Tensor]:
    """``(R, K'), (R,) -> (R,), (R,) bool, (R,)``: the best score, whether it alone is within its margin, and its place.

    Reads the scores once, for the maximum of each group. What is within the margin is then counted and placed by one
    small product with the rows 1, 1, 1... and 0, 1, 2...: where the count is 1, the sum of places is the place.
    (torch.argmax takes ten times as long, and topk twenty.)
    """
    rows, groups = len(scores), scores.shape[1] // _GROUP
    grouped = scores.view(rows, groups, _GROUP)
    peaks = torch.amax(grouped, -1, out=tiles.peaks[: rows * groups].view(rows, groups))
    best = peaks.amax(-1)
    reach = (best - margin)[:, None]
    in_reach, group = tiles.count_and_place[:, :groups] @ peaks.ge_(reach).T
    group = group.clamp_(max=groups - 1).long()
    chosen = torch.add(group, tiles.row[:rows], alpha=groups)
    members = torch.index_select(grouped.view(-1, _GROUP), 0, chosen, out=tiles.members[:rows])
    also_in_reach, place = tiles.count_and_place[:, :_GROUP] @ members.ge_(reach).T
    return best, in_reach * also_in_reach == 1, group.mul_(_GROUP).add_(place.long())


def _margin(tokens: Tensor, codes: _Codes) -> Tensor:
    """Twice how far rounding may have moved any score of each row: 2 (D + 12) u (|x| |c| + |c|^2), and underflow.

    The first factor is the standard bound of a D-term inner product with a few roundings more for the
    centring and the constant; u is the unit roundoff in which products are formed.
    """
    info = torch.finfo(tokens.dtype)
    terms = tokens.shape[-1] + 11
    relative = terms * info.eps / 2 + 3 * _input_roundoff(tokens.dtype)
    size = tokens[:, :-1].norm(dim=-1) * codes.max_norm + codes.max_norm.square()
    return 2.0 * (relative * size + terms * info.tiny)


def _second_look(x: Tensor, codes: _Codes, tiles: _Tiles) -> Tensor:
    """The exact winner of each row; -1 where there is none."""
    row, code = _candidates(x, codes, tiles)
    if len(row) > 8 * len(x):
        # Many candidates mean many equal codes: only the first of each can win.
        first = _is_first_of_equals(codes.given)[code]
        row, code = row[first], code[first]
    step = max(1, _PAIR_ELEMENTS // x.shape[-1])
    exact = torch.cat(
        [
            _exact_scores(x[r].double(), _exact_codes(codes.given[c], codes.metric), codes.metric)
            for r, c in zip(row.split(step), code.split(step), strict=True)
        ]
    )
    best = exact.new_full((len(x),), -torch.inf).scatter_reduce_(0, row, exact, "amax")
    wins = exact == best[row]
    nobody = len(codes.given)
    winner = code.new_full((len(x),), nobody).scatter_reduce_(0, row[wins], code[wins], "amin")
    return torch.where(winner == nobody, -1, winner)


def _candidates(x: Tensor, codes: _Codes, tiles: _Tiles) -> tuple[Tensor, Tensor]:
    """``(P,), (P,)`` int64: rows and usable codes that may be their nearest; none for a row with junk in it."""
    tokens = tiles.centred(x, codes)
    scores = tiles.score(tokens, codes.columns)
    groups = scores.shape[1] // _GROUP
    grouped = scores.view(len(x), groups, _GROUP)
    peaks = grouped.amax(-1)
    reach = peaks.amax(-1) - _margin(tokens, codes)
    # Overflowed scores say nothing: then every usable code is a candidate.
    blind = ~torch.isfinite(reach)
    row, group = ((peaks >= reach[:, None]) | blind[:, None]).logical_and_(finite_rows(x)[:, None]).nonzero().unbind(1)
    members = grouped.view(-1, _GROUP)[row * groups + group]
    hit, place = ((members >= reach[row, None]) | blind[row, None]).nonzero().unbind(1)
    row, code = row[hit], group[hit] * _GROUP + place
    known = torch.nn.functional.pad(codes.usable, (0, groups * _GROUP - len(codes.usable)))[code]
    return row[known], code[known]


def _is_first_of_equals(codes: Tensor) -> Tensor:
    """``(K,)`` bool: no code of a lower index equals this one."""
    values, member = torch.unique(codes, dim=0, return_inverse=True)
    order = torch.arange(len(member), device=member.device)
    first = order.new_full((len(values),), len(member)).scatter_reduce_(0, member, order, "amin")
    return first[member] == order


def _input_roundoff(work: torch.dtype) -> float:
    """What ``torch.set_float32_matmul_precision`` lets the product round its inputs to, beyond float32."""
    if work != torch.float32:
        return 0.0
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # torch refuses to answer when its old and new switches were mixed: assume the worst
        precision = "medium"
    return {"highest": 0.0, "high": 2.0**-11}.get(precision, 2.0**-8)
