"""Another number of codes for a codebook that is trained: busy codes are split, idle ones merged."""

from typing import Any

import torch
from torch import Tensor, nn

from vqssl.checks import check_positive_int
from vqssl.codebook import EMACodebook
from vqssl.constructor_options import constructor_options
from vqssl.functional.ema_rules import CodebookState

__all__ = ["resized"]

_STEP = 0.1
"""Of the distance to the nearest code, by which the halves of a code lie off its place."""


@torch.no_grad()
def resized(codebook: EMACodebook, new_size: int) -> EMACodebook:
    r"""Return a codebook of another size that continues from the codes, counts and sums of a trained one.

    To grow, the code with the largest running count is split, again and again. Its halves lie on both sides of its
    place, on the line to its nearest code, and share its count:

    .. math:: e_k \pm 0.1\,(e_{k'} - e_k), \qquad N_k \leftarrow N_k / 2

    To shrink, the code with the smallest count is merged into its nearest code: counts and sums add up, and the code is
    their quotient. The sum of all counts stays.

    When it grows, codes keep their indices, and new ones come behind them. When it shrinks, those that remain move up:
    ``new.quantize(old.embed).indices`` says which code has the place of each old one.

    It depends on the state alone, so that all ranks get equal codes. The result has the options, device, mode and draws
    of the codebook, ``num_updates`` -1, and its births, 0 for codes that are new. The codebook itself does not change.
    A :class:`~vqssl.CodePrediction` of its codes has to be built again.

    Experimental: the paper (arXiv 2509.18765) names a fixed size as a limitation and has no method for it; this is one
    of ours. Measured with 128 codes (``python -m benchmarks.resizing``): after 200 steps the error is 5 to 8% below
    that of a fresh codebook. With tokens that turn meanwhile, growing gained little: twofold the error is 0.98 of a
    fresh codebook's and 26% of the codes are dead, against 9%; fourfold it is 1.01, and 51% are dead, against 37%.

    Args:
        codebook: initialised.
        new_size: K of the result.

    Returns:
        A new codebook.

    Raises:
        TypeError: ``codebook`` is not an EMACodebook, or ``new_size`` not an int.
        ValueError: it is not initialised, or ``new_size`` is below 1.

    >>> import torch
    >>> codebook = EMACodebook(codebook_size=2, dim=1)
    >>> codebook.set_codes_(torch.tensor([[0.0], [10.0]]))
    >>> state = {"cluster_size": torch.tensor([8.0, 2.0]), "embed_avg": torch.tensor([[0.0], [20.0]])}
    >>> codebook.load_state_dict({**codebook.state_dict(), **state})
    <All keys matched successfully>
    >>> grown = resized(codebook, 3)
    >>> grown.embed.flatten().tolist(), grown.cluster_size.tolist()
    ([-1.0, 10.0, 1.0], [4.0, 2.0, 4.0])
    >>> resized(codebook, 1).embed.item()
    2.0
    """
    given: Any = codebook
    if not isinstance(given, EMACodebook):
        several = isinstance(given, nn.Module) and callable(getattr(given, "codebook", None))
        cure = "resize its codebooks one by one, resized(quantizer.codebook(0), new_size)" if several else "give one"
        found = f"the class {given.__name__}" if isinstance(given, type) else type(given).__name__
        raise TypeError(f"codebook must be an EMACodebook, got {found}: {cure}")
    check_positive_int("new_size", new_size)
    if not codebook.initialized:
        raise ValueError(
            f"codebook must be initialised, got random codes: build a fresh one with codebook_size={new_size}, or "
            "train this one first"
        )
    options = {**constructor_options(codebook), "codebook_size": new_size}
    result = EMACodebook(
        **options, process_group=codebook.process_group, device=codebook.embed.device, dtype=codebook.embed.dtype
    )
    # On the CPU, where the lowest index wins a tie.
    state = CodebookState(*(tensor.cpu() for tensor in codebook.state()))
    births = codebook.births.cpu()
    state, births = (
        _grown(codebook, state, births, new_size)
        if new_size > len(births)
        else _shrunk(codebook, state, births, new_size)
    )
    loaded = {**state._asdict(), "births": births, "initialized": codebook.initialized, "rng": codebook.rng}
    result.load_state_dict({**loaded, "num_updates": torch.full_like(codebook.num_updates, -1)})
    return result.train(codebook.training).freeze(codebook.frozen)


def _grown(codebook: EMACodebook, state: CodebookState, births: Tensor, new_size: int) -> tuple[CodebookState, Tensor]:
    size, dim = state.embed.shape
    more = new_size - size
    embed = torch.cat([state.embed, state.embed.new_zeros(more, dim)])
    counts = torch.cat([state.cluster_size, state.cluster_size.new_zeros(more)])
    sums = torch.cat([state.embed_avg, state.embed_avg.new_zeros(more, dim)])
    for new in range(size, new_size):
        busiest = int(counts[:new].argmax())
        code = embed[busiest].clone()
        step = _STEP * (embed[_nearest(embed[:new], busiest)] - code)
        if not step.any():  # no other code, or one at the same place
            step[0] = _STEP * (code.norm() or 1.0)
        counts[busiest] /= 2
        counts[new] = counts[busiest]
        halves = codebook.as_compared(torch.stack([code - step, code + step]))
        embed[[busiest, new]] = halves
        sums[[busiest, new]] = halves * counts[busiest]
    return CodebookState(embed, counts, sums), torch.cat([births, births.new_zeros(more)])


def _shrunk(codebook: EMACodebook, state: CodebookState, births: Tensor, new_size: int) -> tuple[CodebookState, Tensor]:
    embed, counts, sums = (tensor.clone() for tensor in state)
    kept = torch.ones(len(counts), dtype=torch.bool)
    for _ in range(len(counts) - new_size):
        idlest = int(torch.where(kept, counts, torch.inf).argmin())
        nearest = _nearest(torch.where(kept[:, None], embed, torch.inf), idlest)
        kept[idlest] = False
        counts[nearest] += counts[idlest]
        sums[nearest] += sums[idlest]
        mean = codebook.as_compared(sums[nearest] / counts[nearest])
        # A code without a count, or one by which the metric cannot compare, keeps its place.
        if mean.isfinite().all() and (mean.any() or codebook.metric == "euclidean"):
            embed[nearest] = mean
    return CodebookState(embed[kept], counts[kept], sums[kept]), births[kept]


def _nearest(codes: Tensor, index: int) -> int:
    """Return the nearest other code; of equally near ones the first."""
    distances = (codes - codes[index]).double().square().sum(-1)
    distances[index] = torch.inf
    return int(torch.where(distances.isnan(), torch.inf, distances).argmin()) if len(codes) > 1 else index
