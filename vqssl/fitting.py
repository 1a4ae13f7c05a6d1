"""Fit the codes of a codebook to a whole data set: k-means over an iterable of batches."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vqssl import kernels
from vqssl.checks import check_mask, check_object, check_positive_int, check_range, check_tokens
from vqssl.codebook import EMACodebook
from vqssl.distributed import all_reduce_sum, gather_pool, rank_and_world_size
from vqssl.functional.commitment import commitment_loss
from vqssl.functional.metrics import search_metric
from vqssl.functional.random import random_bits, random_positions
from vqssl.functional.search import nearest_codeword

__all__ = ["CodebookFit", "fit_codebook"]

_SAMPLE = 64
"""Tokens a code in the sample from which the first codes are drawn."""
_ON_SAMPLE = 10
"""Iterations on the sample: they cost little beside a pass over the data, and save several."""
_SALT = 0x5DEECE66D
"""Apart from the codebook's own draws of the same seed."""


class CodebookFit(NamedTuple):
    """What :func:`fit_codebook` found.

    Attributes:
        errors: for each pass, the mean squared distance of a token from its code before the codes moved: never larger
            than that of the pass before, but for rounding and split codes.
        counts: ``(K,)`` int64: tokens of each code in the last pass, over all ranks.
        converged: True if the error of the last two passes differs by no more than the tolerance.

    >>> CodebookFit((2.0, 1.0), torch.tensor([3, 5]), False).errors[-1]
    1.0
    """

    errors: tuple[float, ...]
    counts: Tensor
    converged: bool


class _Pass(NamedTuple):
    counts: Tensor
    sums: Tensor
    error: Tensor
    batches: Tensor


@torch.no_grad()
def fit_codebook(
    codebook: EMACodebook,
    batches: Iterable[Any],
    *,
    passes: int = 20,
    tolerance: float = 1e-4,
    progress: Callable[[Iterable[Any]], Iterable[Any]] | None = None,
    after_pass: Callable[[int, float], None] | None = None,
) -> CodebookFit:
    r"""Fit the codes to all tokens of an iterable by k-means, and return how the error fell.

    .. math:: k_i = \arg\min_j \lVert z_i - e_j \rVert^2, \qquad
        e_j \leftarrow \frac{1}{|\{i : k_i = j\}|} \sum_{i : k_i = j} z_i

    (Lloyd 1982; the off-line codes of HuBERT, arXiv 2106.07447.) Each pass reads all batches once, with an exact
    search; only sums and counts are held, in float64. With a metric other than euclidean, tokens and means are brought
    into its form; by cosine this is spherical k-means. A code without tokens takes half of those of a busy one.

    A codebook that is not initialised gets its first codes in one pass more, by greedy k-means++ (Arthur and
    Vassilvitskii 2007) on a sample of 64 tokens a code. One that is initialised continues from its codes: after each
    pass it holds the result so far. So save its state in ``after_pass``; to resume, load it and call this again with
    the passes that are left. The result is the same to the bit.

    Nothing depends on torch's generators. Under ``torch.distributed`` every rank gives its own share of the data, in
    any number of batches, and all hold the same codes; a pass sends one all-reduce.

    Afterwards counts are the mean over batches of the last pass, and ``num_updates`` is -1. Write
    ``codebook.freeze()`` if training must not move the codes.

    Args:
        codebook: whose codes are fitted, frozen or not.
        batches: of tokens ``(*batch, D)``, or of pairs of tokens and mask ``(*batch,)``, that can be read again for
            each pass: a list or a data loader, not a generator. The same tokens in the same order are needed to repeat
            a result. Batches are moved to the codebook's device. Tokens that are not finite are skipped.
        passes: at most so many, at least 1.
        tolerance: stops where the errors of two passes differ by no more than this fraction; 0 never stops.
        progress: wraps the batches of each pass, such as ``tqdm.tqdm``.
        after_pass: called after each pass with its number, from 1, and its error, on every rank.

    Returns:
        :class:`CodebookFit`.

    Raises:
        TypeError: ``codebook`` is not an EMACodebook, ``batches`` is one tensor or can be read only once, or a batch is
            not of floating tokens.
        ValueError: fewer valid tokens than codes, a batch of another width, or an option out of range.

    >>> import torch, vqssl
    >>> codebook = vqssl.EMACodebook(codebook_size=3, dim=2)
    >>> centres = torch.tensor([[0.0, 0.0], [0.0, 9.0], [9.0, 0.0]])
    >>> batches = [centres.repeat(20, 1) + torch.randn(60, 2) for _ in range(5)]
    >>> fit = fit_codebook(codebook, batches)
    >>> fit.counts.tolist(), fit.converged
    ([100, 100, 100], True)
    """
    check_object("codebook", codebook, EMACodebook, "EMACodebook(codebook_size=, dim=)")
    check_positive_int("passes", passes)
    check_range("tolerance", tolerance, 0, 1, rule="a fraction of the error")
    if isinstance(batches, Tensor):
        raise TypeError("batches must be an iterable of batches, got one tensor: write [tokens], or tokens.split(n)")
    if isinstance(batches, Iterator):
        raise TypeError(
            f"batches must be an iterable that can be read for each pass, got {type(batches).__name__}, which is empty "
            "after the first: write list(batches), or give the data loader itself"
        )
    codebook.check_ranks()
    read = batches if progress is None else _Wrapped(batches, progress)
    if not codebook.initialized:
        codebook.set_codes_(_first_codes(codebook, read))
    errors: list[float] = []
    converged = False
    while len(errors) < passes and not converged:
        found = _read(codebook, read)
        _move_(codebook, found)
        errors.append((found.error / found.counts.sum()).item())
        # A split may raise the error: then it goes on.
        settled = len(errors) > 1 and abs(errors[-2] - errors[-1]) <= tolerance * errors[-2]
        converged = settled and tolerance > 0
        if after_pass is not None:
            after_pass(len(errors), errors[-1])
    return CodebookFit(tuple(errors), found.counts.long(), converged)


class _Wrapped:
    """Batches that are wrapped again for each pass."""

    def __init__(self, batches: Iterable[Any], wrap: Callable[[Iterable[Any]], Iterable[Any]]) -> None:
        self.batches, self.wrap = batches, wrap

    def __iter__(self) -> Iterator[Any]:
        return iter(self.wrap(self.batches))


def _tokens(codebook: EMACodebook, batches: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the valid tokens ``(N, D)`` of each batch, in the form in which the metric compares them."""
    state = codebook.embed
    for number, batch in enumerate(batches):
        several = isinstance(batch, tuple | list) and 1 <= len(batch) <= 2
        x, mask = (*batch, None)[:2] if several else (batch, None)
        _check_batch(number, x, mask, codebook.dim)
        check_mask(mask, x.shape[:-1], x.device, f"mask of batch {number}")
        kept = (x if mask is None else x[mask]).reshape(-1, codebook.dim).to(state)
        yield codebook.as_compared(kept[kernels.finite_rows(kept)])


def _check_batch(number: int, x: Any, mask: Any, dim: int) -> None:
    name = f"batch {number}"
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor of tokens, or a pair of tokens and mask, got {type(x).__name__}")
    if x.ndim > 2 and x.shape[1] == dim != x.shape[-1]:
        raise ValueError(
            f"{name} must be (*batch, dim) with dim = {dim} in its last axis, got shape {tuple(x.shape)}: for maps "
            "with channels first, move them there by movedim(1, -1)"
        )
    check_tokens(name, x, dim)
    if isinstance(mask, Tensor) and mask.dtype != torch.bool:
        raise TypeError(
            f"mask of {name} must be a boolean tensor, got {mask.dtype}: of a loader of tokens and labels give the "
            "tokens alone"
        )


def _read(codebook: EMACodebook, batches: Iterable[Any]) -> _Pass:
    """Return counts, sums and error of all tokens of all ranks by the present codes."""
    codes, size = codebook.embed, codebook.codebook_size
    total = _Pass(*(codes.new_zeros(shape, dtype=torch.float64) for shape in ((size,), codes.shape, (), ())))
    for tokens in _tokens(codebook, batches):
        nearest = nearest_codeword(tokens, codes, search_metric(codebook.metric))
        counts, sums = kernels.code_sums(tokens, nearest, size)
        error = commitment_loss(tokens, codes, weight=1.0, indices=nearest).double() * tokens.numel()
        parts = (counts, sums, error, codes.new_ones(()))
        total = _Pass(*(old + part for old, part in zip(total, parts, strict=True)))
    return _Pass(*all_reduce_sum(total, codebook.process_group))


def _move_(codebook: EMACodebook, found: _Pass) -> None:
    """Set codes to the means of their tokens, and counts to those of a batch."""
    _check_number(found.counts.sum(), codebook.codebook_size)
    means = found.sums / found.counts.clamp_min(1)[:, None]
    form = codebook.as_compared(means)
    # Tokens that cancel out have no direction, which matters to all metrics but the euclidean: it returns its argument.
    has_mean = found.counts > 0 if form is means else (found.counts > 0) & (form != 0).any(-1)
    codes = torch.where(has_mean[:, None], means, codebook.embed.double())
    codebook.set_codes_(_split(codes, found).to(codebook.embed.dtype))
    codebook.cluster_size.copy_(found.counts / found.batches.clamp_min(1))
    codebook.embed_avg.copy_(codebook.embed * codebook.cluster_size[:, None])
    codebook.num_updates.fill_(-1)


def _split(codes: Tensor, found: _Pass) -> Tensor:
    """Return codes of which each without tokens lies beside a busy one, on the other side of its place."""
    counts = found.counts
    empty = (counts == 0).nonzero()[:, 0]
    busy = counts.argsort(descending=True, stable=True)[: len(empty)]
    busy = busy[counts[busy] > 1]
    # A tenth of the distance of a token from its code.
    step = 0.1 * (found.error / counts.sum() / codes.shape[1]).sqrt().expand(codes.shape[1]).clone()
    step[1::2] *= -1
    codes = codes.clone()
    codes[empty[: len(busy)]] = codes[busy] + step
    codes[busy] -= step
    return codes


# ---- first codes ----


def _first_codes(codebook: EMACodebook, batches: Iterable[Any]) -> Tensor:
    size, group = codebook.codebook_size, codebook.process_group
    seed = int(codebook.rng[0]) ^ _SALT
    own = _sample(codebook, batches, seed)
    pool = gather_pool(own, own.new_ones(len(own), dtype=torch.bool), group)
    _check_number(pool.total, size)
    count = min(_SAMPLE * size, int(pool.total))
    sample = pool.take(random_positions(_rng(codebook, seed, -1), count, pool.total))
    codes = _plus_plus(sample, size, _rng(codebook, seed, -2))
    for _ in range(_ON_SAMPLE):
        nearest = nearest_codeword(sample, codes, search_metric(codebook.metric))
        counts, sums = kernels.code_sums(sample, nearest, size)
        means = codebook.as_compared(sums / counts.clamp_min(1)[:, None])
        codes = torch.where((counts > 0)[:, None] & (means != 0).any(-1, keepdim=True), means, codes)
    # Of rank 0: sums of the same numbers may round differently on other devices.
    own_codes = codes if rank_and_world_size(group)[0] == 0 else torch.zeros_like(codes)
    return all_reduce_sum([own_codes], group)[0]


def _sample(codebook: EMACodebook, batches: Iterable[Any], seed: int) -> Tensor:
    """Return at most 64 K of this rank's tokens, each token with the same chance: those of the smallest random keys."""
    rank, world_size = rank_and_world_size(codebook.process_group)
    limit = _SAMPLE * codebook.codebook_size
    sample, keys = codebook.embed[:0], codebook.rng[:0]
    for number, tokens in enumerate(_tokens(codebook, batches)):
        drawn = random_bits(_rng(codebook, seed, number * world_size + rank), len(tokens))
        sample, keys = torch.cat([sample, tokens]), torch.cat([keys, drawn])
        if len(keys) > limit:
            kept = keys.argsort(stable=True)[:limit]
            sample, keys = sample[kept], keys[kept]
    return sample


def _plus_plus(x: Tensor, size: int, rng: Tensor) -> Tensor:
    """Return tokens ``(K, D)`` far from each other: of some candidates, drawn by squared distance, always the best."""
    centred = (x - x.mean(0)).double()
    squares = centred.square().sum(-1)
    trials = 2 + int(math.log(size))
    uniform = (random_bits(rng, size * trials).double() * 2.0**-62).reshape(size, trials)
    chosen = [int(uniform[0, 0] * len(x))]

    def distances(rows: Tensor) -> Tensor:
        return (squares[rows][:, None] - 2 * centred[rows] @ centred.T + squares).clamp_min(0)

    nearest = distances(torch.tensor(chosen, device=x.device))[0]
    for draws in uniform[1:]:
        heights = nearest.cumsum(0)
        candidates = torch.searchsorted(heights, draws * heights[-1]).clamp_max(len(x) - 1)
        lowered = torch.minimum(nearest, distances(candidates))
        best = lowered.sum(-1).argmin()
        chosen.append(int(candidates[best]))
        nearest = lowered[best]
    return x[torch.tensor(chosen, device=x.device)]


def _rng(codebook: EMACodebook, seed: int, counter: int) -> Tensor:
    return codebook.rng.new_tensor([seed, counter])


def _check_number(total: Tensor, size: int) -> None:
    if total < size:
        raise ValueError(
            f"k-means needs at least as many tokens as codes, got {int(total)} valid tokens for codebook_size = "
            f"{size}: give more data or build a smaller codebook"
        )
