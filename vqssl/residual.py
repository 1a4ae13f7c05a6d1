"""ResidualQuantizer: several codebooks in a row, each for what the ones before it left."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self, Unpack

import torch
from torch import Tensor, nn

from vqssl.agreement import Agreement
from vqssl.checks import (
    by_name,
    check_device,
    check_floating,
    check_indices,
    check_mask,
    check_positive_int,
    check_range,
    check_seed,
    check_shape_of_result,
    check_tokens,
    policy_name,
)
from vqssl.codebook import EMACodebook, warn_of_random_codes
from vqssl.codebook_options import CodebookOptions
from vqssl.codebook_state import STATE_RULES
from vqssl.foreign_keywords import FOREIGN_KEYWORDS, names_foreign_keywords
from vqssl.foreign_methods import ForeignMethod
from vqssl.functional.estimators import ESTIMATORS
from vqssl.functional.masking import zero_where_masked
from vqssl.functional.random import random_bits
from vqssl.functional.search import nearest_codeword
from vqssl.initialization import KMeansInit
from vqssl.loading import check_before_loading, check_entry
from vqssl.several_codebooks import (
    codebook_at,
    codebooks_in,
    freeze_all,
    sizes_of,
    usage_of_all,
)
from vqssl.types import CodebookUsage, MultiCodeQuantized, Quantized
from vqssl.update import update_codebooks

__all__ = ["ResidualQuantizer"]

KEYWORDS = {
    **FOREIGN_KEYWORDS,
    **dict.fromkeys(("num_quantizers", "n_q", "n_codebooks", "num_codebooks", "depth"), "num_levels="),
    "quantize_dropout": "level_dropout=1.0 if it is True, nothing if it is False",
    "quantize_dropout_cutoff_index": "min_levels=, one more than the index",
}


class ResidualQuantizer(nn.Module):
    r"""L codebooks in a row: each quantises what the ones before it left of a token, and the code is their sum.

    .. math:: r^1 = z, \qquad k^l = \arg\min_j \lVert r^l - e^l_j \rVert^2, \qquad r^{l+1} = r^l - e^l_{k^l}, \\
        q = \sum_l e^l_{k^l}, \qquad L = \sum_l \beta \cdot \mathrm{mean}\,(r^l - \mathrm{sg}[e^l_{k^l}])^2

    (SoundStream, arXiv 2107.03312, Algorithm 1; encodec, arXiv 2210.13438.) In training mode a forward pass updates the
    codes, as :class:`~vqssl.EMACodebook` does. All levels are quantised with the codes from before that update, and
    updated together: under ``torch.distributed`` a step has two all-reduces, however many levels there are.

    The output is formed once, from the sum of all levels, so that its gradient to ``x`` is exactly 1. The commitment
    loss of every level has a gradient to ``x``.

    Each level draws with a seed of its own. The first codes of a level are drawn from what the level before it leaves.
    A token that itself became a code there would leave 0: what it leaves of another code counts instead.

    Args:
        codebook_size: K, for all levels or one number a level.
        dim: D, the width of tokens and codes.
        num_levels: L.
        level_dropout: the probability that a training step uses only the first n levels, with n uniform over
            ``min_levels`` to L, so that the first levels are of use alone. All ranks draw the same n. Dropped levels
            have index -1 and no part in code, loss or update. There is none in eval mode or while frozen.
        min_levels: the fewest levels that such a step uses.
        seed: level l, from 0, draws from ``seed + l``.
        device: of the codebooks.
        dtype: of the codebooks.
        **codebook_options: what :class:`~vqssl.EMACodebook` takes by name, but for ``metric``, which is euclidean: a
            residual is a difference. ``estimator`` carries the gradient past all levels at once. The default of
            ``initialization`` is k-means, or tokens themselves where the first batch has fewer than there are codes.

    Shape:
        Input ``(*batch, D)``, a mask ``(*batch,)``; output :class:`~vqssl.types.MultiCodeQuantized`: ``quantized``
        ``(*batch, D)`` in the input's dtype, ``indices`` ``(*batch, L)``, ``commitment_loss`` a scalar,
        ``commitment_losses`` L scalars.

    State: ``codebooks``, and ``rng`` (int64: seed, and a count of draws) for the dropout.

    Raises:
        TypeError: an argument of another type than above, sizes by position, or another library's keyword.
        ValueError: a size below 1, another number of sizes than levels, another metric than euclidean, a probability
            outside [0, 1], ``min_levels`` above L, or what :class:`~vqssl.EMACodebook` refuses.

    >>> import torch
    >>> quantizer = ResidualQuantizer(codebook_size=16, dim=4, num_levels=3)
    >>> x = torch.randn(2, 100, 4)
    >>> out = quantizer(x)
    >>> out.quantized.shape, out.indices.shape
    (torch.Size([2, 100, 4]), torch.Size([2, 100, 3]))
    >>> indices = quantizer.quantize(x).indices
    >>> errors = [(x - quantizer.lookup(indices[..., :levels])).square().mean() for levels in (1, 2, 3)]
    >>> bool(errors[0] > errors[1] > errors[2])
    True
    """

    rng: Tensor

    # vector-quantize-pytorch; and ours without the underscore
    get_output_from_indices = ForeignMethod("lookup(indices)")
    initialize = ForeignMethod("initialize_(x)")
    set_codes = ForeignMethod("set_codes_(codes)")
    update = ForeignMethod("update_(x, indices)")

    @names_foreign_keywords(
        KEYWORDS,
        sizes_by_name="ResidualQuantizer(codebook_size=, dim=, num_levels=)",
        passed_on=CodebookOptions.__annotations__,
    )
    def __init__(
        self,
        *,
        codebook_size: int | Sequence[int],
        dim: int,
        num_levels: int,
        level_dropout: float = 0.0,
        min_levels: int = 1,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **codebook_options: Unpack[CodebookOptions],
    ) -> None:
        super().__init__()
        check_positive_int("num_levels", num_levels)
        check_range("level_dropout", level_dropout, 0, 1, rule="a probability")
        check_positive_int("min_levels", min_levels)
        if min_levels > num_levels:
            raise ValueError(f"min_levels must be at most num_levels = {num_levels}, got {min_levels}")
        check_seed(seed)
        metric = codebook_options.get("metric", "euclidean")
        if metric != "euclidean":
            raise ValueError(
                f"metric must be 'euclidean', by which residuals are differences, got {policy_name(metric)!r}: leave "
                "it out; for codes of length 1 normalise the tokens of a single EMACodebook"
            )
        sizes = sizes_of(codebook_size, num_levels, "level")
        self.dim = dim
        self.num_levels = num_levels
        self.level_dropout = level_dropout
        self.min_levels = min_levels
        self.seed = seed
        # Codes that are single tokens are too long for what other tokens leave. Measured against k-means: two to three
        # times the error of six levels after the first step, and 1.4 to 1.6 times after 150.
        options: CodebookOptions = {"initialization": KMeansInit(few_tokens="sample"), **codebook_options}
        self.estimator = by_name("estimator", options.pop("estimator", "straight_through"), ESTIMATORS)
        self.codebooks = nn.ModuleList(
            EMACodebook(codebook_size=size, dim=dim, seed=seed + level, device=device, dtype=dtype, **options)
            for level, size in enumerate(sizes)
        )
        self.register_buffer("rng", torch.empty(2, device=device, dtype=torch.int64))
        self._agreement = Agreement()
        check_before_loading(self)
        self.reset_parameters()

    # ---- forward ----

    def forward(self, x: Tensor, mask: Tensor | None = None) -> MultiCodeQuantized:
        """Quantise, and in training mode initialise levels before and update them after.

        Args:
            x: tokens ``(*batch, D)``.
            mask: ``(*batch,)`` bool, True where a token counts.

        Returns:
            See :meth:`quantize`.

        Raises:
            TypeError: ``x`` is not a floating tensor, or the mask is not boolean.
            ValueError: the width of ``x`` is not D, it is on another device, the mask is not ``(*batch,)``, or the
                initialisation refuses the batch. The state is then as it was.
        """
        self._check(x, mask)
        if self.training:
            self._check_ranks()
            self._initialize(x, mask)
        warn_of_random_codes(self, self._own_codebooks())
        used = self._drawn_levels() if self.training else None
        residuals, results = self._quantize_levels(x, mask, used)
        if self.training:
            indices = [result.indices for result in results]
            update_codebooks(self._own_codebooks(), residuals, indices, compared=True)
        return self._joined(x, mask, results)

    def quantize(self, x: Tensor, mask: Tensor | None = None) -> MultiCodeQuantized:
        """Return codes, indices and commitment losses: the pure half of forward, which changes and drops nothing.

        A masked token gets indices -1 and zeros, and no part in the losses, whatever it holds. A token with NaN or an
        infinity that is not masked gets indices -1 too; its output is NaN, and the loss is not finite.

        Args and errors are those of :meth:`forward`.

        >>> import torch
        >>> ResidualQuantizer(codebook_size=8, dim=4, num_levels=2).quantize(torch.randn(3, 4)).indices.shape
        torch.Size([3, 2])
        """
        self._check(x, mask)
        _, results = self._quantize_levels(x, mask)
        return self._joined(x, mask, results)

    def lookup(self, indices: Tensor) -> Tensor:
        """Return the sum of the codes at ``indices``.

        The first l levels alone are ``lookup(indices[..., :l])``, a coarser code.

        Args:
            indices: ``(*batch, l)`` integers with l from 1 to L; -1 (masked or dropped) adds nothing.

        Returns:
            ``(*batch, D)`` in the dtype of the state.

        Raises:
            TypeError: ``indices`` is not an integer tensor.
            ValueError: the last axis does not have 1 to L levels, an index is K or more, or below -1, or they are on
                another device.

        >>> import torch
        >>> quantizer = ResidualQuantizer(codebook_size=8, dim=2, num_levels=3)
        >>> quantizer.lookup(torch.tensor([[3, 0, 7], [-1, -1, -1]])).shape
        torch.Size([2, 2])
        """
        check_indices("indices", indices)
        if indices.ndim < 1 or not 1 <= indices.shape[-1] <= self.num_levels:
            raise ValueError(
                f"indices must be (*batch, levels) with 1 to {self.num_levels} levels in the last axis, got shape "
                f"{tuple(indices.shape)}: for indices of level 0 alone write indices[..., None]"
            )
        levels = zip(self._own_codebooks(), indices.unbind(-1), strict=False)
        return _sum([codebook.lookup(k) for codebook, k in levels])

    # ---- updates ----

    def update_(self, x: Tensor, indices: Tensor) -> None:
        """Move the codes of all levels towards what chose them, then revive dead codes: the other half of forward.

        Args:
            x: tokens ``(*batch, D)``, as given to :meth:`quantize`.
            indices: ``(*batch, L)``, what :meth:`quantize` returned; -1 is left out.

        Raises:
            TypeError: ``x`` is not a floating or ``indices`` not an integer tensor.
            ValueError: the width of ``x`` is not D, the shapes do not fit, or (on CPU) an index is out of range.

        >>> import torch
        >>> quantizer, x = ResidualQuantizer(codebook_size=8, dim=4, num_levels=2), torch.randn(32, 4)
        >>> quantizer.initialize_(x)
        >>> quantizer.update_(x, quantizer.quantize(x).indices)
        >>> [codebook.num_updates.item() for codebook in quantizer.codebooks]
        [1, 1]
        """
        self._check(x)
        check_indices("indices", indices, torch.Size([*x.shape[:-1], self.num_levels]), x.device)
        self._check_ranks()
        rest, residuals = self._in_dtype_of_residuals(x.detach()), []
        for codebook, k in zip(self._own_codebooks(), indices.unbind(-1), strict=True):
            residuals.append(rest)
            rest = rest - codebook.lookup(k)
        # A token that is not finite is left out, whatever its indices.
        where = rest.isfinite().all(-1)
        update_codebooks(
            self._own_codebooks(), residuals, [torch.where(where, k.long(), -1) for k in indices.unbind(-1)]
        )

    def freeze(self, frozen: bool = True) -> Self:
        """Freeze all levels, see :meth:`vqssl.EMACodebook.freeze`; ``freeze(False)`` resumes their updates."""
        freeze_all(self.codebooks, frozen)
        return self

    @torch.no_grad()
    def initialize_(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Draw the first codes of each level that has none yet; levels that have some, or are frozen, stay.

        Forward does so in training mode. Args and errors are those of :meth:`forward`.

        >>> import torch
        >>> quantizer = ResidualQuantizer(codebook_size=8, dim=4, num_levels=2)
        >>> quantizer.initialize_(torch.randn(32, 4))
        >>> [codebook.initialized.item() for codebook in quantizer.codebooks]
        [True, True]
        """
        self._check(x, mask)
        self._check_ranks()
        self._initialize(x, mask)

    @torch.no_grad()
    def set_codes_(self, codes: Sequence[Tensor]) -> None:
        """Replace the codes of all levels, and set counts and sums to match.

        Args:
            codes: L tensors ``(K, D)``, finite; one tensor ``(L, K, D)`` is such a sequence.

        Raises:
            TypeError: an entry is not a floating tensor.
            ValueError: another number of entries than levels, another shape, or a value that is NaN or infinite. No
                level has changed then.

        >>> import torch
        >>> quantizer = ResidualQuantizer(codebook_size=2, dim=1, num_levels=2)
        >>> quantizer.set_codes_(torch.tensor([[[0.0], [10.0]], [[-1.0], [1.0]]]))
        >>> quantizer.quantize(torch.tensor([[8.7], [0.2]])).indices.tolist()
        [[1, 0], [0, 1]]
        """
        if len(codes) != self.num_levels:
            raise ValueError(f"codes must have one entry for each of the {self.num_levels} levels, got {len(codes)}")
        for level, (codebook, of_level) in enumerate(zip(self._own_codebooks(), codes, strict=True)):
            check_floating(f"codes[{level}]", of_level)
            if of_level.shape != codebook.embed.shape:
                raise ValueError(
                    f"codes[{level}] must be (codebook_size, dim) = {tuple(codebook.embed.shape)}, got shape "
                    f"{tuple(of_level.shape)}"
                )
            if not of_level.is_meta and not of_level.to(codebook.embed.dtype).isfinite().all():
                raise ValueError(f"codes[{level}] must be finite, got NaN or infinite values: replace those rows")
        for codebook, of_level in zip(self._own_codebooks(), codes, strict=True):
            codebook.set_codes_(of_level)

    # ---- parts ----

    def codebook(self, level: int) -> EMACodebook:
        """Return the codebook of a level, 0 to L - 1.

        Raises:
            ValueError: there is no such level.

        >>> ResidualQuantizer(codebook_size=8, dim=4, num_levels=2).codebook(1)
        EMACodebook(codebook_size=8, dim=4, ...)
        """
        return codebook_at(self.codebooks, level, self.num_levels, "level")

    def usage(self, dead_below: float = 0.1) -> tuple[CodebookUsage, ...]:
        """Return :meth:`vqssl.EMACodebook.usage` of each level.

        >>> [usage.dead.item() for usage in ResidualQuantizer(codebook_size=8, dim=4, num_levels=2).usage()]
        [0, 0]
        """
        return usage_of_all(self.codebooks, dead_below)

    def reset_parameters(self) -> None:
        """Start the draws of the dropout over; each codebook has a ``reset_parameters`` of its own."""
        # Counted down from -2: codebooks of the same seed use the counters from 0.
        self.rng.copy_(self.rng.new_tensor([self.seed, -2]))

    def check_state(self, state_dict: Mapping[str, Any], prefix: str = "", *, assign: bool = False) -> None:
        """Raise if the draw counter of a state is damaged, as :meth:`vqssl.EMACodebook.check_state` does."""
        check_entry(state_dict, prefix + "rng", self.rng, STATE_RULES["rng"], assign)

    def extra_repr(self) -> str:
        """Return sizes and options, for ``repr``."""
        dropout = f", level_dropout={self.level_dropout}, min_levels={self.min_levels}" if self.level_dropout else ""
        return f"dim={self.dim}, num_levels={self.num_levels}{dropout}"

    def _own_codebooks(self) -> list[EMACodebook]:
        return codebooks_in(self.codebooks)

    def _check(self, x: Tensor, mask: Tensor | None = None) -> None:
        check_tokens("x", x, self.dim)
        check_device("x", x, self.codebook(0).embed.device)
        check_mask(mask, x.shape[:-1], x.device)

    def _check_ranks(self) -> None:
        codebooks = self._own_codebooks()
        for level, codebook in enumerate(codebooks):
            codebook.check_ranks(level=level, num_levels=self.num_levels, estimator=policy_name(self.estimator))
        if self.level_dropout == 0 or torch.compiler.is_compiling() or self.rng.is_meta:
            return

        def facts() -> dict[str, str]:
            of_dropout = {"level_dropout": self.level_dropout, "min_levels": self.min_levels}
            return {name: str(value) for name, value in {**of_dropout, "draws": self.rng.tolist()}.items()}

        frozen = all(codebook.frozen for codebook in codebooks)
        self._agreement.reach(type(self).__name__, facts, codebooks[0].process_group, frozen=frozen)

    @torch.no_grad()
    def _initialize(self, x: Tensor, mask: Tensor | None) -> None:
        codebooks = self._own_codebooks()
        if not any(codebook.needs_codes for codebook in codebooks):
            return
        # All are drawn before any is set: an initialisation that refuses one level leaves the others as they were.
        rest, first = self._in_dtype_of_residuals(zero_where_masked(x, mask)), []
        for codebook in codebooks:
            codes = codebook.first_codes(rest, mask) if codebook.needs_codes else None
            first.append(codes)
            rest = _left_by_others(rest, codebook.embed if codes is None else codes)
        for codebook, codes in zip(codebooks, first, strict=True):
            if codes is not None:
                codebook.set_codes_(codes)

    def _drawn_levels(self) -> Tensor | None:
        """Return how many levels this step uses, a scalar int64 tensor, or None for all of them."""
        if self.level_dropout == 0 or all(codebook.frozen for codebook in self._own_codebooks()):
            return None
        bits = random_bits(self.rng, 2)
        self.rng[1] -= 1
        few = self.min_levels + bits[1] % (self.num_levels - self.min_levels + 1)
        return torch.where(bits[0] < int(self.level_dropout * 2**62), few, self.num_levels)

    def _quantize_levels(
        self, x: Tensor, mask: Tensor | None, used: Tensor | None = None
    ) -> tuple[list[Tensor], list[Quantized]]:
        """Return what each level was given, and what it made of it."""
        rest = self._in_dtype_of_residuals(zero_where_masked(x, mask))
        residuals, results = [], []
        for level, codebook in enumerate(self._own_codebooks()):
            result = codebook.quantize(rest, mask if used is None else _mask_of(x, mask, used > level))
            residuals.append(rest)
            results.append(result)
            # Without the code's gradient: the loss of each level then has one to x, and the sum of codes has none.
            rest = rest - result.quantized.detach()
        return residuals, results

    def _joined(self, x: Tensor, mask: Tensor | None, results: Sequence[Quantized]) -> MultiCodeQuantized:
        state = self.codebook(0).embed.dtype
        codes = _sum([result.quantized.detach().to(state) for result in results])
        tokens = zero_where_masked(x, mask)
        quantized = self.estimator(tokens, codes)
        check_shape_of_result("estimator", quantized, tokens)
        losses = tuple(result.commitment_loss for result in results)
        return MultiCodeQuantized(
            quantized=zero_where_masked(quantized.to(x.dtype), mask),
            indices=torch.stack([result.indices for result in results], -1),
            commitment_loss=torch.stack(losses).sum(),
            commitment_losses=losses,
        )

    def _in_dtype_of_residuals(self, x: Tensor) -> Tensor:
        return x.to(torch.promote_types(x.dtype, self.codebook(0).embed.dtype))

    if TYPE_CHECKING:  # nn.Module's __call__ is Any to type checkers

        def __call__(self, x: Tensor, mask: Tensor | None = None) -> MultiCodeQuantized:
            """Call :meth:`forward`."""


def _left_by_others(tokens: Tensor, codes: Tensor) -> Tensor:
    """Return what the nearest code leaves of each token; for a token that is a code, what another code leaves.

    The first codes of a level are tokens. These leave 0, which says nothing about what later tokens leave: the first
    codes of the next level would all be 0, if there were no more tokens than codes.
    """
    nearest = nearest_codeword(tokens, codes)
    left = tokens - codes[nearest.clamp_min(0)]
    if len(codes) == 1:
        return left
    # Another code: the nearest one among those whose index has the other parity.
    even, odd = (half[nearest_codeword(tokens, half).clamp_min(0)] for half in (codes[0::2], codes[1::2]))
    left_by_other = tokens - torch.where((nearest % 2 == 0)[..., None], odd, even)
    is_code = (left == 0).all(-1)
    return torch.where(is_code[..., None], left_by_other, left)


def _mask_of(x: Tensor, mask: Tensor | None, is_used: Tensor) -> Tensor:
    return is_used.expand(x.shape[:-1]) if mask is None else mask & is_used


def _sum(codes: Sequence[Tensor]) -> Tensor:
    # Level by level, in the order in which look-up and forward both add: equal to the bit.
    total = codes[0]
    for each in codes[1:]:
        total = total + each
    return total
