"""EMACodebook: vector quantisation whose codes follow the data by exponential moving averages."""

import sys
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from vqssl import kernels
from vqssl.checks import by_name, can_read_without_sync, check_object, check_range
from vqssl.distributed import gather_pool
from vqssl.ema_table import EMATable, update_together
from vqssl.functional.ema import EMARule
from vqssl.functional.estimators import ESTIMATORS, straight_through
from vqssl.functional.look_up import look_up
from vqssl.functional.search import check_precision, search
from vqssl.initialization import Initialization, SampleInit
from vqssl.revival import BatchRevival, Revival
from vqssl.types import Quantized

__all__ = ["EMACodebook"]


class EMACodebook(EMATable):
    r"""Replaces each token by the nearest of K codes, and moves the codes after the tokens.

    .. math:: k_i = \arg\min_j \lVert z_i - e_j \rVert^2, \qquad q_i = e_{k_i}, \qquad
        L = \beta \cdot \mathrm{mean}\,(z - \mathrm{sg}[q])^2

    (DiSSECT, arXiv 2509.18765, Eqs. 4 and 5). In training mode a forward pass also updates the codes, as BatchNorm
    updates its statistics: no gradient and no optimizer step is involved. The batch's own outputs use the codes from
    *before* that update. Gradients pass straight through to the tokens, in eval mode as well. For loops that
    accumulate gradients or recompute activations, call the halves: :meth:`quantize` (pure) and :meth:`update_`.

    Under ``torch.distributed`` the statistics are summed over the ranks of ``process_group``, asked for at call time;
    every rank has to call forward equally often, with any number of tokens, none included. Ranks that start with
    equal codes stay equal.

    Args:
        codebook_size: K, how many codes.
        dim: D, their width.
        decay: gamma, the share of the old statistics that a step keeps, 0 to 1.
        eps: epsilon of the Laplace smoothing, in tokens.
        metric: ``"euclidean"``, or ``"cosine"``: tokens and codes are then normalised to length 1, outputs too.
        commitment_weight: beta.
        ema: ``"count_weighted"`` (the conventional rule, default), ``"batch_mean"`` (the paper's Eq. 1), or a function
            with the signature of :func:`vqssl.functional.count_weighted_ema`.
        initialization: an object as in :mod:`vqssl.initialization`; by default codes are tokens of the first training
            batch that holds any.
        revival: an object as in :mod:`vqssl.revival`; by default codes that get less than a tenth of the fair share
            become tokens of the current batch. None leaves dead codes dead.
        estimator: ``"straight_through"``, ``"rotation"``, or a function ``(x, quantized) -> tensor``.
        precision: of the search, as in :func:`vqssl.functional.nearest_codeword`: ``"exact"`` (default), or what a GPU
            may round to: ``"tf32"``, ``"fp16"``, ``"bf16"``, ``"torch"``.
        seed: of the codebook's own counter-based generator; torch's global generators are not used. Ranks need the
            same seed.
        process_group: the ranks that share the codes; None is the default group.
        device: of the state.
        dtype: of the state: float64, or else float32, also where half precision is asked for here or by ``.half()``.

    Shape:
        Input ``(*batch, D)``, a mask ``(*batch,)``; output :class:`~vqssl.types.Quantized`: ``quantized``
        ``(*batch, D)`` in the input's dtype, ``indices`` ``(*batch,)`` int64, ``commitment_loss`` a scalar.

    State (buffers): ``embed`` ``(K, D)``, ``cluster_size`` ``(K,)`` in tokens a step, ``embed_avg`` ``(K, D)``,
    ``initialized`` (bool) and ``rng`` (int64: seed, draws so far); a loaded state continues bit for bit. In eval mode
    or frozen, a codebook that was neither trained nor loaded quantises by random codes: ``initialized`` is False then.
    Forward warns of it, once (not on a GPU or in a compiled graph, where the question would wait for the device).

    Raises:
        TypeError: an argument of another type than above.
        ValueError: a size below 1, a decay outside [0, 1], an unknown name.

    >>> import torch
    >>> codebook = EMACodebook(codebook_size=16, dim=4)
    >>> quantized, indices, loss = codebook(torch.randn(2, 10, 4))
    >>> quantized.shape, indices.shape, bool(loss >= 0)
    (torch.Size([2, 10, 4]), torch.Size([2, 10]), True)
    >>> codebook
    EMACodebook(16, 4, decay=0.99, metric=euclidean, ...)
    """

    def __init__(
        self,
        codebook_size: int,
        dim: int,
        *,
        decay: float = 0.99,
        eps: float = 1e-5,
        metric: str = "euclidean",
        commitment_weight: float = 0.25,
        ema: str | EMARule = "count_weighted",
        initialization: Initialization | None = None,
        revival: Revival | None = BatchRevival(),  # noqa: B008 (frozen)
        estimator: str | Callable[[Tensor, Tensor], Tensor] = "straight_through",
        precision: str = "exact",
        seed: int = 0,
        process_group: ProcessGroup | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            codebook_size, dim, decay=decay, eps=eps, metric=metric, ema=ema, revival=revival, seed=seed,
            process_group=process_group, device=device, dtype=dtype,
        )  # fmt: skip
        check_range("commitment_weight", commitment_weight, 0, float("inf"))
        self.commitment_weight = commitment_weight
        self.initialization = SampleInit() if initialization is None else initialization
        check_object("initialization", self.initialization, Initialization, "KMeansInit()")
        self.estimator = by_name("estimator", estimator, ESTIMATORS)
        check_precision(precision)
        self.precision = precision

    # ---- forward ----

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Quantized:
        """Quantise, and in training mode (unless frozen) initialise before and update after.

        Args:
            x: tokens ``(*batch, D)``.
            mask: ``(*batch,)`` bool, True where a token counts.

        Returns:
            See :meth:`quantize`.

        Raises:
            TypeError: ``x`` is no floating tensor, or the mask is not boolean.
            ValueError: the width of ``x`` is not D, it is on another device, the mask is not ``(*batch,)``, or the
                initialisation refuses the batch. The state is then as it was.
        """
        if self.training:
            self.initialize_(x, mask)
        self._check(x, mask)
        warn_of_random_codes(self, [self])
        tokens = self._unmasked(x, mask)
        result = self._quantize(tokens, mask)
        if self.training and not self.frozen:
            update_together([self], [tokens], [result.indices])
        return result

    def quantize(self, x: Tensor, mask: Tensor | None = None) -> Quantized:
        """The pure half of forward: nearest code, look-up, gradient estimator and commitment. Changes nothing.

        A masked token gets index -1 and zeros, and no part in the loss, whatever it holds. A token with NaN or an
        infinity that is not masked gets index -1 too, and makes its output NaN and the loss NaN or infinite, where a
        gradient scaler or anomaly check sees it; the statistics never do. An empty or fully masked batch has loss 0.

        Args and errors are those of :meth:`forward`.

        >>> import torch
        >>> codebook = EMACodebook(8, 4)
        >>> x = torch.randn(3, 4)
        >>> codebook.quantize(x, mask=torch.tensor([True, True, False])).indices[2].item()
        -1
        """
        self._check(x, mask)
        return self._quantize(self._unmasked(x, mask), mask)

    # ---- state ----

    @torch.no_grad()
    def initialize_(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Give the codes their first values from ``x``, once; later calls, and those while frozen, do nothing.

        Forward does so in training mode. A batch without any valid token on any rank is passed over.

        Args and errors are those of :meth:`forward`.

        >>> import torch
        >>> codebook = EMACodebook(8, 4)
        >>> codebook.initialize_(torch.randn(32, 4))
        >>> codebook.initialized.item()
        True
        """
        codes = self.first_codes(x, mask)
        if codes is not None:
            self.set_codes_(codes)

    @torch.no_grad()
    def first_codes(self, x: Tensor, mask: Tensor | None = None) -> Tensor | None:
        """The codes that :meth:`initialize_` would set, ``(K, D)``, or None where it would do nothing. Changes nothing.

        Args and errors are those of :meth:`forward`.

        >>> import torch
        >>> codebook = EMACodebook(8, 4)
        >>> codebook.first_codes(torch.randn(32, 4)).shape, codebook.initialized.item()
        (torch.Size([8, 4]), False)
        """
        self._check(x, mask)
        skip = self.frozen or self._known_initialized or self.embed.is_meta
        return None if skip else self._first_codes(x, mask)

    def _first_codes(self, x: Tensor, mask: Tensor | None) -> Tensor | None:
        # It waits for the device, once in a codebook's life, and so stays out of graphs. Said here and not by a
        # decorator, which would make `import vqssl` load all of torch's compiler: many times its own time.
        if "torch._dynamo" in sys.modules:
            return torch.compiler.disable(self._drawn_first_codes)(x, mask)
        return self._drawn_first_codes(x, mask)

    def _drawn_first_codes(self, x: Tensor, mask: Tensor | None) -> Tensor | None:
        if self.initialized:
            self._known_initialized = True
            return None
        tokens = self._tokens(x).reshape(-1, self.dim).to(self.embed.dtype)
        valid = kernels.finite_rows(tokens)
        if mask is not None:
            valid &= mask.reshape(-1)
        pool = gather_pool(tokens, valid, self.process_group)
        if pool.total == 0:
            return None
        codes = self.initialization(pool, self.codebook_size, self.rng, self.metric)
        return self.embed if codes is None else codes

    def extra_repr(self) -> str:
        options = {
            "decay": self.decay,
            "metric": self.metric,
            "ema": _name_of(self.ema),
            "initialization": self.initialization,
            "revival": self.revival,
            "estimator": _name_of(self.estimator),
            "precision": self.precision,
        }
        listed = ", ".join(f"{name}={value}" for name, value in options.items())
        return f"{self.codebook_size}, {self.dim}, {listed}{', frozen' if self.frozen else ''}"

    # ---- parts ----

    def _unmasked(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Tokens as they are compared, zeros where masked: a gradient of zero times a NaN there would still be NaN."""
        return self._tokens(x if mask is None else torch.where(mask[..., None], x, 0.0))

    def _quantize(self, tokens: Tensor, mask: Tensor | None) -> Quantized:
        indices = self._nearest(tokens, mask)
        quantized, squared_error = look_up(tokens, indices, self.embed, mask)
        if self.estimator is not straight_through:
            quantized = self.estimator(tokens, self._codes(indices)).to(tokens.dtype)
            if mask is not None:
                quantized = torch.where(mask[..., None], quantized, 0.0)
        count = max(tokens.numel(), 1) if mask is None else (mask.sum() * self.dim).clamp_min(1)
        return Quantized(quantized, indices, self.commitment_weight * squared_error / count)

    def _nearest(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        indices = search(tokens, self.embed, self.metric, self.precision)
        return indices if mask is None else torch.where(mask, indices, -1)

    if TYPE_CHECKING:  # nn.Module's __call__ is Any to type checkers

        def __call__(self, x: Tensor, mask: Tensor | None = None) -> Quantized: ...


def warn_of_random_codes(owner: nn.Module, codebooks: Sequence[EMACodebook]) -> None:
    """Once an owner: a forward that initialises nothing meets codes that nobody has set.

    Args:
        owner: whose forward it is, called by the user; its mode counts.
        codebooks: those it is about to use.
    """
    if getattr(owner, "_warned_of_random_codes", False):
        return
    if not any((codebook.frozen or not owner.training) and _is_random(codebook) for codebook in codebooks):
        return
    by_hand = "call initialize_(x), " if owner in codebooks else ""
    warnings.warn(
        f"this {type(owner).__name__} quantises by random codes: it is in eval mode or frozen, and was neither trained "
        f"nor loaded. Call it once in training mode, {by_hand}or load a state.",
        stacklevel=5,  # whoever called the module: between lie forward and the two calls of nn.Module
    )
    owner._warned_of_random_codes = True  # type: ignore[assignment]


def _is_random(codebook: EMACodebook) -> bool:
    """Whether nobody has set the codes, as far as it can be told without waiting."""
    if not can_read_without_sync(codebook.initialized) or torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
        return False
    try:
        return not codebook.initialized
    except RuntimeError:  # under torch.func.vmap, or of a fake tensor, there is no one value to look at
        return False


def _name_of(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", repr(function))
