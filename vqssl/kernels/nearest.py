"""Nearest-codeword search: the op, its reference, and the tiled path that every device can run.

The rule that all backends share, and that :func:`nearest_reference` states in its slowest form:

- the answer is the code nearest in **float64** to the values as given, whatever the input's dtype;
- the lowest index wins ties, also between equal codes;
- a row that holds NaN or an infinity has no nearest code: its index is -1. It is reported, not raised, because
  a raise would have to wait for the device at every step and would break CUDA graphs;
- a code that holds NaN or an infinity is never chosen; where no finite code is left, the index is -1.

The tiled path gets there with one low-precision matrix product and a certificate. A tile of rows is scored
against all codes, s = x.c - |c|^2/2; rounding can move a score by at most ``err``, so any code that scores
within ``2 err`` of the best may be the true winner. Rows with a single such code are done. The others (a few in
a thousand) have just those candidates compared in float64. Codes and tokens are centred first: that leaves the
winner as it is and keeps ``err`` small when features have a large common mean.

A backend of its own (``nearest_triton.py``) registers itself on the same op for its device.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

METRICS = ("euclidean", "cosine")

# Scores per tile: 4 MB of float32 stays in a core's share of the cache; a GPU wants fewer, larger launches.
_TILE_SCORES = {"cpu": 2**20, "cuda": 2**26}
_MAX_ROWS = {"cpu": 512, "cuda": 2**16}
# Codes per group of the two-level maximum: an amax over 64 contiguous scores costs a tenth of torch.argmax.
_GROUP = 64
# Elements compared at once in the float64 second look.
_PAIR_ELEMENTS = 2**21


@torch.library.custom_op("vqssl::nearest_codeword", mutates_args=())
def nearest_codeword(x: Tensor, codebook: Tensor, metric: str) -> Tensor:
    """``(N, D), (K, D) -> (N,)`` int64, by the rule at the head of this file. Inputs are not validated here."""
    # A caller's autocast would turn the score product into bf16 and make the error bound a lie.
    with torch.autocast(x.device.type, enabled=False):
        return _search(x, codebook, metric)


@nearest_codeword.register_fake
def _(x: Tensor, codebook: Tensor, metric: str) -> Tensor:
    return x.new_empty(x.shape[0], dtype=torch.int64)


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


def _search(x: Tensor, codebook: Tensor, metric: str) -> Tensor:
    indices = torch.full((x.shape[0],), -1, dtype=torch.int64, device=x.device)
    if indices.numel() == 0:
        return indices
    index = _Index(x, codebook, metric)
    for start, stop in _tiles(x.shape[0], index.padded, x.device.type):
        indices[start:stop] = index.nearest(x[start:stop])
    return indices


def _tiles(rows: int, codes: int, device: str) -> Iterator[tuple[int, int]]:
    step = _TILE_SCORES.get(device, _TILE_SCORES["cuda"]) // codes
    step = max(16, min(step, _MAX_ROWS.get(device, _MAX_ROWS["cuda"])))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


class _Index:
    """A codebook made ready for scoring: centred, padded to whole groups, with its error bound."""

    def __init__(self, x: Tensor, codebook: Tensor, metric: str) -> None:
        self.metric = metric
        self.codebook = codebook
        self.work = torch.promote_types(torch.promote_types(x.dtype, codebook.dtype), torch.float32)
        self.usable = torch.isfinite(codebook).all(-1)

        codes = _exact_codes(codebook, metric).masked_fill(~self.usable[:, None], 0.0)
        self.centre = torch.zeros_like(codes[0])
        if metric == "euclidean":
            self.centre = (codes.sum(0) / self.usable.sum().clamp_min(1)).to(self.work).double()
            codes = codes - self.centre
        half_norms = 0.5 * codes.square().sum(-1) if metric == "euclidean" else torch.zeros_like(codes[:, 0])
        bias = (-half_norms).masked_fill(~self.usable, -torch.inf)

        pad = -len(codes) % _GROUP
        self.padded = len(codes) + pad
        self.codes = torch.nn.functional.pad(codes, (0, 0, 0, pad)).to(self.work)
        self.bias = torch.nn.functional.pad(bias, (0, pad), value=-torch.inf).to(self.work)
        self.max_norm = codes.norm(dim=-1).amax().to(self.work)
        self.scores: Tensor | None = None
        self._first: Tensor | None = None

    def nearest(self, x: Tensor) -> Tensor:
        tile = x.to(self.work)
        if self.metric == "euclidean":
            tile = tile - self.centre.to(self.work)
        if self.scores is None:
            self.scores = tile.new_empty(len(tile), self.padded)
        scores = torch.addmm(self.bias, tile, self.codes.T, out=self.scores[: len(tile)])

        groups = scores.view(len(tile), -1, _GROUP)
        peaks = groups.amax(-1)
        best, group = peaks.max(-1)
        margin = 2.0 * self._error_bound(tile)
        reach = (best - margin)[:, None]
        near = groups.gather(1, group[:, None, None].expand(-1, 1, _GROUP)).squeeze(1)
        indices = group * _GROUP + near.argmax(-1)
        certified = ((peaks >= reach).sum(-1) == 1) & ((near >= reach).sum(-1) == 1)
        certified &= torch.isfinite(best) & torch.isfinite(margin)

        unsure = (~certified).nonzero().squeeze(-1)
        if unsure.numel() > 0:
            rows = x[unsure]
            # Overflowed scores say nothing: then every usable code is a candidate.
            blind = ~(torch.isfinite(best) & torch.isfinite(margin))[unsure, None]
            candidates = (scores[unsure, : len(self.usable)] >= reach[unsure]) | blind
            candidates &= self.usable & torch.isfinite(rows).all(-1, keepdim=True)
            indices[unsure] = self._second_look(rows, candidates)
        return indices

    def _error_bound(self, tile: Tensor) -> Tensor:
        """How far rounding may have moved any score of each row: (D + 8) u (|x| |c| + |c|^2), and underflow.

        The first factor is the standard bound of a D-term inner product with a few roundings more for the
        centring and the bias; u is the unit roundoff in which products are formed.
        """
        info = torch.finfo(self.work)
        terms = tile.shape[-1] + 8
        relative = terms * info.eps / 2 + 3 * _input_roundoff(self.work)
        size = tile.norm(dim=-1) * self.max_norm + self.max_norm.square()
        return relative * size + terms * info.tiny

    def _second_look(self, x: Tensor, candidates: Tensor) -> Tensor:
        """Among each row's candidates, the exact winner; -1 where there is none."""
        if candidates.sum() > 8 * len(x):
            # Many candidates mean many equal codes: only the first of each can win.
            candidates = candidates & (self._first_of_equals() == torch.arange(len(self.usable), device=x.device))
        row, code = candidates.nonzero(as_tuple=True)
        scores = torch.cat(
            [
                _exact_scores(x[r].double(), _exact_codes(self.codebook[c], self.metric), self.metric)
                for r, c in zip(
                    row.split(max(1, _PAIR_ELEMENTS // x.shape[-1])),
                    code.split(max(1, _PAIR_ELEMENTS // x.shape[-1])),
                    strict=True,
                )
            ]
        )
        best = scores.new_full((len(x),), -torch.inf).scatter_reduce_(0, row, scores, "amax")
        wins = scores == best[row]
        nobody = len(self.usable)
        winner = code.new_full((len(x),), nobody).scatter_reduce_(0, row[wins], code[wins], "amin")
        return torch.where(winner == nobody, -1, winner)

    def _first_of_equals(self) -> Tensor:
        """``(K,)``: the lowest index of a code equal to this one."""
        if self._first is None:
            values, member = torch.unique(self.codebook, dim=0, return_inverse=True)
            order = torch.arange(len(member), device=member.device)
            first = order.new_full((len(values),), len(member)).scatter_reduce_(0, member, order, "amin")
            self._first = first[member]
        return self._first


def _input_roundoff(work: torch.dtype) -> float:
    """What ``torch.set_float32_matmul_precision`` lets the product round its inputs to, beyond float32."""
    if work != torch.float32:
        return 0.0
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # torch refuses to answer when its old and new switches were mixed: assume the worst
        precision = "medium"
    return {"highest": 0.0, "high": 2.0**-11}.get(precision, 2.0**-8)
