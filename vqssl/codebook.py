"""EMACodebook: vector quantisation whose codes follow the data by exponential moving averages."""

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from vqssl import kernels
from vqssl.agreement import Agreement, checksum, option_text
from vqssl.checks import (
    by_name,
    can_read_without_sync,
    check_code_range,
    check_device,
    check_floating_dtype,
    check_indices,
    check_mask,
    check_object,
    check_positive_int,
    check_range,
    check_seed,
    check_shape_of_result,
    check_state_fits,
    check_tokens,
    policy_name,
)
from vqssl.codebook_state import (
    STATE_VERSION,
    add_missing_entries,
    cast_entries_to_assign,
    check_codebook_state,
    check_codes,
    check_comparable,
    in_one_dtype,
)
from vqssl.distributed import Grouped
from vqssl.first_codes import draw_first_codes
from vqssl.foreign_keywords import FOREIGN_KEYWORDS, names_foreign_keywords
from vqssl.foreign_methods import ForeignMethod
from vqssl.functional.commitment import commitment_loss
from vqssl.functional.ema_rules import EMA_RULES, CodebookState, EMAName, EMARule
from vqssl.functional.estimators import ESTIMATORS, Estimator, EstimatorName, straight_through
from vqssl.functional.masking import zero_where_masked
from vqssl.functional.metrics import METRICS, Metric, MetricName, compared_form, search_metric
from vqssl.functional.quantized import straight_through_and_loss
from vqssl.functional.random import random_normal
from vqssl.functional.search import PrecisionName, check_precision, nearest_codeword
from vqssl.functional.usage import codebook_usage
from vqssl.initialization import Initialization, SampleInit
from vqssl.loading import count_of, reader_of_foreign_state
from vqssl.revival import BatchRevival, NoRevival, Revival
from vqssl.state_dtype import keeping_float32, state_dtype
from vqssl.types import CodebookUsage, Quantized
from vqssl.update import update_codebooks

__all__ = ["EMACodebook", "warn_of_random_codes"]


class EMACodebook(Grouped, nn.Module):
    r"""A codebook that replaces each token by the nearest of K codes, and moves the codes towards the tokens.

    .. math:: k_i = \arg\min_j \lVert z_i - e_j \rVert^2, \qquad q_i = e_{k_i}, \qquad
        L = \beta \cdot \mathrm{mean}\,(z - \mathrm{sg}[q])^2

    (DiSSECT, arXiv 2509.18765, Eqs. 4 and 5). In training mode a forward pass also updates the codes, as BatchNorm
    updates its statistics: without a gradient and without an optimizer step. The outputs of a batch use the codes
    from *before* that update. Gradients pass straight through to the tokens, in eval mode as well. Loops that
    accumulate gradients or recompute activations call the halves: :meth:`quantize` (pure) and :meth:`update_`.

    Under ``torch.distributed`` the statistics are summed over the ranks of ``process_group``, which is looked up at
    call time. Every rank has to call forward equally often, with any number of tokens, also with none. Ranks that start
    with equal codes stay equal; :meth:`check_ranks` compares them at the first call.

    Args:
        codebook_size: K, the number of codes.
        dim: D, their width.
        decay: gamma, the share of the old statistics that a step keeps, 0 to 1.
        eps: epsilon of the Laplace smoothing, in tokens.
        metric: ``"euclidean"``; ``"cosine"``, which scales tokens, codes and outputs to length 1; or a function
            ``(*batch, D) -> (*batch, D)`` that maps tokens and codes to the form in which euclidean distance compares
            them, see :data:`vqssl.functional.METRICS`. It has to leave that form as it is, ``metric(metric(x))`` equal
            to ``metric(x)``, since codes are mapped again after each update. Outputs have that form. A code whose form
            would be all zeros keeps its place.
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
        seed: of the codebook's own counter-based generator; torch's global generators are not used. All ranks need the
            same seed.
        process_group: the ranks that share the codes; None is the default group.
        device: of the state.
        dtype: of the state: float64, or else float32, also where half precision is requested here or by ``.half()``.

    Shape:
        Input ``(*batch, D)``, a mask ``(*batch,)``; output :class:`~vqssl.types.Quantized`: ``quantized``
        ``(*batch, D)`` in the input's dtype, ``indices`` ``(*batch,)`` int64, ``commitment_loss`` a scalar.

    State (buffers): ``embed`` ``(K, D)``, ``cluster_size`` ``(K,)`` in tokens a step, ``embed_avg`` ``(K, D)``,
    ``initialized`` (bool), ``num_updates`` (int64: updates since the counts started at 1; -1 where that is unknown),
    ``births`` ``(K,)`` (int64: how often a revival has replaced each code since then) and ``rng`` (int64: seed, and
    draws so far). A loaded state continues bit for bit.

    In eval mode or frozen, a codebook that was neither trained nor loaded quantises by random codes: ``initialized``
    is False then. Forward warns once, on the CPU only: the check would synchronise a GPU.

    Raises:
        TypeError: an argument of another type than above, sizes by position, or another library's keyword.
        ValueError: a size below 1, a decay outside [0, 1], an unknown name.

    >>> import torch
    >>> codebook = EMACodebook(codebook_size=16, dim=4)
    >>> quantized, indices, loss = codebook(torch.randn(2, 10, 4))
    >>> quantized.shape, indices.shape, bool(loss >= 0)
    (torch.Size([2, 10, 4]), torch.Size([2, 10]), True)
    >>> codebook
    EMACodebook(codebook_size=16, dim=4, decay=0.99, metric=euclidean, ...)
    """

    _version = STATE_VERSION

    embed: Tensor
    cluster_size: Tensor
    embed_avg: Tensor
    initialized: Tensor
    num_updates: Tensor
    rng: Tensor
    births: Tensor

    # vector-quantize-pytorch, encodec; and ours without the underscore
    get_codes_from_indices = ForeignMethod("lookup(indices)")
    get_output_from_indices = ForeignMethod("lookup(indices)")
    decode = ForeignMethod("lookup(indices)")
    encode = ForeignMethod("quantize(x).indices")
    initialize = ForeignMethod("initialize_(x)")
    set_codes = ForeignMethod("set_codes_(codes)")
    update = ForeignMethod("update_(x, indices)")

    @names_foreign_keywords(FOREIGN_KEYWORDS, sizes_by_name="EMACodebook(codebook_size=, dim=)")
    def __init__(
        self,
        *,
        codebook_size: int,
        dim: int,
        decay: float = 0.99,
        eps: float = 1e-5,
        metric: MetricName | Metric = "euclidean",
        commitment_weight: float = 0.25,
        ema: EMAName | EMARule = "count_weighted",
        initialization: Initialization | None = None,
        revival: Revival | None = BatchRevival(),  # noqa: B008 (frozen)
        estimator: EstimatorName | Estimator = "straight_through",
        precision: PrecisionName = "exact",
        seed: int = 0,
        process_group: ProcessGroup | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive_int("codebook_size", codebook_size)
        check_positive_int("dim", dim)
        check_range("decay", decay, 0, 1, rule="the share of the old statistics that a step keeps")
        check_range("eps", eps, 0, float("inf"))
        check_range("commitment_weight", commitment_weight, 0, float("inf"))
        check_seed(seed)
        check_precision(precision)
        check_floating_dtype(dtype)
        self.codebook_size = codebook_size
        self.dim = dim
        self.decay = decay
        self.eps = eps
        self.metric = metric
        by_name("metric", metric, METRICS)  # refuses an unknown one
        self.commitment_weight = commitment_weight
        self.ema = by_name("ema", ema, EMA_RULES)
        self.initialization = SampleInit() if initialization is None else initialization
        check_object("initialization", self.initialization, Initialization, "KMeansInit()")
        self.revival = NoRevival() if revival is None else revival
        check_object("revival", self.revival, Revival, "BatchRevival()")
        self.estimator = by_name("estimator", estimator, ESTIMATORS)
        self.precision = precision
        self.seed = seed
        self.process_group = process_group
        self.frozen = False

        dtype = state_dtype(dtype)
        self.register_buffer("embed", torch.empty(codebook_size, dim, device=device, dtype=dtype))
        self.register_buffer("cluster_size", torch.empty(codebook_size, device=device, dtype=dtype))
        self.register_buffer("embed_avg", torch.empty(codebook_size, dim, device=device, dtype=dtype))
        self.register_buffer("initialized", torch.empty((), device=device, dtype=torch.bool))
        self.register_buffer("num_updates", torch.empty((), device=device, dtype=torch.int64))
        self.register_buffer("rng", torch.empty(2, device=device, dtype=torch.int64))
        self.register_buffer("births", torch.empty(codebook_size, device=device, dtype=torch.int64))
        self.register_load_state_dict_post_hook(_settle_loaded)  # type: ignore[no-untyped-call]
        self._agreement = Agreement()
        self._warned_of_random_codes = False
        # The buffer `initialized` where it is known to be True. The buffer itself, not a flag: functional_call and
        # others put another tensor in its place for a while.
        self._known_initialized: Tensor | None = None
        self.reset_parameters()

    # ---- forward ----

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Quantized:
        """Quantise, and in training mode (unless frozen) initialise before and update after.

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
            self.check_ranks()
        tokens = self.as_compared(zero_where_masked(x, mask))
        if self.training and self.needs_codes:
            self._initialize(tokens, mask)
        warn_of_random_codes(self, [self])
        result = self._quantize(tokens, mask)
        if self.training:
            update_codebooks([self], [tokens], [result.indices], compared=True)
        return result

    def quantize(self, x: Tensor, mask: Tensor | None = None) -> Quantized:
        """Return nearest codes, indices and commitment loss: the pure half of forward, which changes nothing.

        A masked token gets index -1 and zeros, and no part in the loss, whatever it holds. A token with NaN or an
        infinity that is not masked gets index -1 too. It makes its output NaN and the loss NaN or infinite, where a
        gradient scaler or anomaly detection sees it; it never reaches the statistics. An empty or fully masked batch
        has loss 0.

        Args and errors are those of :meth:`forward`.

        >>> import torch
        >>> codebook = EMACodebook(codebook_size=8, dim=4)
        >>> x = torch.randn(3, 4)
        >>> codebook.quantize(x, mask=torch.tensor([True, True, False])).indices[2].item()
        -1
        """
        self._check(x, mask)
        return self._quantize(self.as_compared(zero_where_masked(x, mask)), mask)

    def _quantize(self, tokens: Tensor, mask: Tensor | None) -> Quantized:
        indices = nearest_codeword(tokens, self.embed, search_metric(self.metric), precision=self.precision)
        if mask is not None:
            indices = torch.where(mask, indices, -1)
        if self.estimator is straight_through:
            # By index: nothing of the tokens' size is held besides the result.
            quantized, loss = straight_through_and_loss(tokens, self.embed, indices, mask, self.commitment_weight)
            return Quantized(quantized, indices, loss)
        quantized = self.estimator(tokens, self._codes_or_zeros(indices))
        check_shape_of_result("estimator", quantized, tokens)
        quantized = zero_where_masked(quantized.to(tokens.dtype), mask)
        # Computed last, so that backward runs it first: autograd then adds the estimator's gradient to it in place.
        loss = commitment_loss(tokens, self.embed, mask, self.commitment_weight, indices=indices)
        return Quantized(quantized, indices, loss)

    def lookup(self, indices: Tensor) -> Tensor:
        """Return the codes at ``indices``, raw.

        Args:
            indices: integers of any shape; -1 (masked) gives zeros.

        Returns:
            ``(*indices.shape, D)`` in the dtype of the state.

        Raises:
            TypeError: ``indices`` is not an integer tensor.
            ValueError: an index is K or more, or below -1, or they are on another device.

        >>> import torch
        >>> EMACodebook(codebook_size=8, dim=2).lookup(torch.tensor([3, -1])).shape
        torch.Size([2, 2])
        """
        check_indices("indices", indices, device=self.embed.device)
        check_code_range("indices", indices, self.codebook_size)
        return self._codes_or_zeros(indices.long())

    def _codes_or_zeros(self, indices: Tensor) -> Tensor:
        codes = torch.nn.functional.embedding(indices.clamp_min(0), self.embed)
        return torch.where((indices >= 0)[..., None], codes, 0.0)

    def as_compared(self, x: Tensor) -> Tensor:
        """Return tokens or codes ``(*batch, D)`` in the form in which the metric compares them.

        >>> import torch
        >>> EMACodebook(codebook_size=8, dim=2, metric="cosine").as_compared(torch.tensor([3.0, 4.0])).tolist()
        [0.6000000238418579, 0.800000011920929]
        """
        return compared_form(x, self.metric)

    # ---- updates ----

    def update_(self, x: Tensor, indices: Tensor) -> None:
        """Move the codes towards the tokens that chose them, then revive dead codes: the other half of forward.

        Does nothing where the codebook is frozen or no rank has a valid token. Under ``torch.distributed`` all ranks of
        ``process_group`` have to call it: it holds one all-reduce of ``K (D + 1)`` numbers, and another of ``K D``
        where there is a revival. Several codebooks share both in :func:`vqssl.update_codebooks`.

        Args:
            x: tokens ``(*batch, D)``, as given to :meth:`quantize`.
            indices: ``(*batch,)``, what :meth:`quantize` returned; -1 is left out.

        Raises:
            TypeError: ``x`` is not a floating or ``indices`` not an integer tensor.
            ValueError: the width of ``x`` is not D, the shapes do not fit, or (on CPU) an index is out of range.

        >>> import torch
        >>> codebook, x = EMACodebook(codebook_size=8, dim=4), torch.randn(32, 4)
        >>> codebook.initialize_(x)
        >>> codebook.update_(x, codebook.quantize(x).indices)
        >>> round(codebook.cluster_size.sum().item(), 2)  # 0.99 * 8 + 0.01 * 32
        8.24
        """
        self._check(x)
        check_indices("indices", indices, x.shape[:-1], x.device)
        if indices.device.type == "cpu":  # elsewhere it would synchronise; the device has an assertion of its own
            check_code_range("indices", indices, self.codebook_size)
        if not self.frozen:
            self.check_ranks()
        finite = kernels.finite_rows(x.detach().reshape(-1, self.dim)).reshape(indices.shape)
        update_codebooks([self], [self.as_compared(x)], [torch.where(finite, indices.long(), -1)], compared=True)

    def freeze(self, frozen: bool = True) -> Self:
        """Stop updates, initialisation and revival in every mode; ``freeze(False)`` resumes them.

        Apart from ``.eval()``, which a Trainer may undo at any time. Gradients still reach the tokens. Not part of the
        state dict, as ``requires_grad`` is not.

        >>> EMACodebook(codebook_size=8, dim=4).freeze().frozen
        True
        """
        self.frozen = frozen
        return self

    # ---- first codes ----

    @property
    def needs_codes(self) -> bool:
        """True unless the codebook is frozen or known to be initialised; reading it never synchronises."""
        if self.frozen or self.embed.is_meta:
            return False
        if can_read_without_sync(self.initialized):
            return self.is_known_random()
        return self._known_initialized is not self.initialized

    def is_known_random(self) -> bool:
        """Return True if the codes are known to be uninitialised: on a CPU, outside of tracing and vmap."""
        if not can_read_without_sync(self.initialized) or torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
            return False
        try:
            return not self.initialized
        except RuntimeError:  # under torch.func.vmap, or of a fake tensor, there is no one value to read
            return False

    @torch.no_grad()
    def initialize_(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Draw the first codes from ``x``, once; later calls, and those while frozen, do nothing.

        Forward does so in training mode. A batch without any valid token on any rank is skipped.

        Args and errors are those of :meth:`forward`.

        >>> import torch
        >>> codebook = EMACodebook(codebook_size=8, dim=4)
        >>> codebook.initialize_(torch.randn(32, 4))
        >>> codebook.initialized.item()
        True
        """
        self._check(x, mask)
        if not self.frozen:
            self.check_ranks()
        if self.needs_codes:
            self._initialize(self.as_compared(zero_where_masked(x, mask)), mask)

    @torch.no_grad()
    def first_codes(self, x: Tensor, mask: Tensor | None = None) -> Tensor | None:
        """Return the codes ``(K, D)`` that :meth:`initialize_` would set, or None where it would do nothing.

        Changes nothing. Args and errors are those of :meth:`forward`.

        >>> import torch
        >>> codebook = EMACodebook(codebook_size=8, dim=4)
        >>> codebook.first_codes(torch.randn(32, 4)).shape, codebook.initialized.item()
        (torch.Size([8, 4]), False)
        """
        self._check(x, mask)
        if not self.frozen:
            self.check_ranks()
        return self._first_codes(self.as_compared(zero_where_masked(x, mask)), mask) if self.needs_codes else None

    @torch.no_grad()
    def _initialize(self, tokens: Tensor, mask: Tensor | None) -> None:
        codes = self._first_codes(tokens, mask)
        if codes is not None:
            self.set_codes_(codes)

    def _first_codes(self, tokens: Tensor, mask: Tensor | None) -> Tensor | None:
        # It synchronises, once in a codebook's life, and so stays out of graphs. A decorator would load torch's
        # compiler at import, which takes many times as long as the package.
        if "torch._dynamo" in sys.modules:
            return torch.compiler.disable(self._draw_first_codes)(tokens, mask)
        return self._draw_first_codes(tokens, mask)

    def _draw_first_codes(self, tokens: Tensor, mask: Tensor | None) -> Tensor | None:
        self.check_ranks()
        if self.initialized:
            self._known_initialized = self.initialized
            return None
        return draw_first_codes(
            tokens,
            mask,
            self.embed,
            initialization=self.initialization,
            metric=self.metric,
            rng=self.rng,
            group=self.process_group,
        )

    # ---- ranks ----

    def check_ranks(self, **more: object) -> None:
        """Raise if the ranks of ``process_group`` differ in the options or the state of this codebook.

        Compares once, at the first call under ``torch.distributed``; one rank, and later calls, have nothing to do.
        Forward in training mode, :meth:`initialize_`, :meth:`first_codes` and :meth:`update_` begin with it. It does
        nothing in a compiled graph. A frozen codebook does not wait for other ranks.

        Compared are all options, the seed and the number of draws, ``initialized``, ``num_updates``, the number of
        ``births``, and once it is initialised every bit of codes, counts and sums. A later difference, such as a
        checkpoint that one rank alone loads during training, is not found.

        Args:
            **more: what else has to be equal on all ranks, for quantisers made of codebooks.

        Raises:
            ValueError: the ranks differ; all of them raise it, and nothing has changed. Or the codebook is frozen on
                some ranks alone; those that wait for them raise it.
            RuntimeError: a rank did not come within the time-out of ``init_process_group``. It is named.

        >>> EMACodebook(codebook_size=8, dim=4).check_ranks()
        """
        if torch.compiler.is_compiling() or self.embed.is_meta:
            return

        def facts() -> dict[str, str]:
            return {name: option_text(value) for name, value in {**more, **self._options(), **self._history()}.items()}

        self._agreement.reach(type(self).__name__, facts, self.process_group, frozen=self.frozen)

    def _history(self) -> dict[str, object]:
        """Return what ranks have to have in common besides options."""
        seed, draws = self.rng.tolist()
        initialized = bool(self.initialized)
        return {
            "dtype": str(self.embed.dtype),
            "initialized": initialized,
            "num_updates": int(self.num_updates),
            "births": int(self.births.sum()),
            "seed": seed,
            "draws": draws,
            "checksum of codes, counts and sums": checksum(self.state()) if initialized else "none",
        }

    # ---- state ----

    def state(self) -> CodebookState:
        """Return codes, counts and sums: the buffers themselves, not copies.

        >>> EMACodebook(codebook_size=8, dim=4).state().cluster_size.shape
        torch.Size([8])
        """
        return CodebookState(self.embed, self.cluster_size, self.embed_avg)

    def usage(self, dead_below: float = 0.1) -> CodebookUsage:
        """Return how evenly the codes are used, from the running counts, which are sums over all ranks.

        Counts start at 1 and decay by the factor ``decay`` a step. So usage looks perfect before the first update, and
        too even in the first few times 1 / (1 - decay) updates. For one batch write
        ``functional.codebook_usage(functional.code_counts(indices, K))``.

        Args:
            dead_below: a code is dead that gets less than this fraction of the fair share, or that equals an earlier
                one, which gets all its tokens.

        Returns:
            :class:`~vqssl.types.CodebookUsage` of detached scalars.

        >>> EMACodebook(codebook_size=8, dim=4).usage().dead.item()
        0
        """
        return codebook_usage(self.cluster_size, dead_below, self.embed)

    @torch.no_grad()
    def set_codes_(self, codes: Tensor) -> None:
        """Replace the codes, and set counts and sums to match; the codebook counts as initialised then.

        Args:
            codes: ``(K, D)``, finite.

        Raises:
            TypeError: ``codes`` is not a floating tensor.
            ValueError: the shape is not ``(K, D)``, a value is NaN or infinite, or the metric cannot compare a code: by
                all but the euclidean, one whose form is all zeros.

        >>> import torch
        >>> codebook = EMACodebook(codebook_size=3, dim=2)
        >>> codebook.set_codes_(torch.eye(3, 2))
        >>> codebook.quantize(torch.tensor([0.1, 0.8])).indices.item()
        1
        """
        check_codes(codes, self.embed)
        codes = codes.to(self.embed)  # first: what is finite in float64 may not be finite here
        if not codes.is_meta and not torch.isfinite(codes).all():
            raise ValueError("codes must be finite, got NaN or infinite values: drop or replace those rows")
        check_comparable("codes", codes, self.metric)
        self._start_from(codes)
        self.initialized.fill_(True)
        self._known_initialized = self.initialized

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start over: standard normal codes from ``seed``, counts of 1, not initialised."""
        self.rng.copy_(self.rng.new_tensor([self.seed, 0]))
        codes = random_normal(self.rng, self.codebook_size * self.dim, self.embed.dtype)
        self._start_from(codes.reshape(self.codebook_size, self.dim))
        self.initialized.fill_(False)
        self._known_initialized = None

    def _start_from(self, codes: Tensor) -> None:
        self.embed.copy_(self.as_compared(codes))
        self.embed_avg.copy_(self.embed)
        self.cluster_size.fill_(1.0)
        self.num_updates.fill_(0)
        self.births.fill_(0)
        self.rng[1] += 1

    def _options(self) -> dict[str, object]:
        return {
            "codebook_size": self.codebook_size,
            "dim": self.dim,
            "decay": self.decay,
            "eps": self.eps,
            "metric": policy_name(self.metric),
            "commitment_weight": self.commitment_weight,
            "ema": policy_name(self.ema),
            "initialization": self.initialization,
            "revival": self.revival,
            "estimator": policy_name(self.estimator),
            "precision": self.precision,
        }

    def extra_repr(self) -> str:
        """Return sizes and options, for ``repr``."""
        shown = {name: value for name, value in self._options().items() if name not in ("eps", "commitment_weight")}
        listed = ", ".join(f"{name}={value}" for name, value in shown.items())
        return f"{listed}{', frozen' if self.frozen else ''}"

    def _check(self, x: Tensor, mask: Tensor | None = None) -> None:
        check_tokens("x", x, self.dim)
        check_device("x", x, self.embed.device)
        check_mask(mask, x.shape[:-1], x.device)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a state, as every module does, and refuse a damaged one before anything changes.

        Args:
            state_dict: of a codebook of any version.
            strict: True raises where names are missing or unknown.
            assign: True puts the tensors themselves in place of the buffers, half precision as float32.

        Raises:
            TypeError: an entry is not a tensor, or a counter is not an integer.
            ValueError: the sizes differ, the state is damaged (see :meth:`check_state`), or it is another library's.
            RuntimeError: names are missing or unknown.

        >>> codebook = EMACodebook(codebook_size=8, dim=4)
        >>> codebook.load_state_dict(codebook.state_dict())
        <All keys matched successfully>
        """
        reader = reader_of_foreign_state(state_dict)
        if reader and strict:
            raise ValueError(f"state_dict must be one of EMACodebook, got another library's: write {reader}")
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *arguments: Any
    ) -> None:
        assign = local_metadata.get("assign_to_params_buffers", False)
        reader = reader_of_foreign_state(state_dict, prefix)
        if reader:  # whether its names are an error is decided at the root
            warnings.warn(f"the state under {prefix!r} is another library's: write {reader}", stacklevel=2)
        check_state_fits(self, state_dict, prefix)
        self.check_state(state_dict, prefix, assign=assign)
        # Files without versions, such as safetensors, count as version 1.
        add_missing_entries(state_dict, prefix, local_metadata.get("version", 1), self.seed, self.rng)
        if assign:  # the tensors themselves become the state
            cast_entries_to_assign(state_dict, prefix, dict(self.named_buffers(recurse=False)))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *arguments)

    def check_state(self, state_dict: Mapping[str, Any], prefix: str = "", *, assign: bool = False) -> None:
        """Raise if a state holds values that no training gives; ``load_state_dict`` begins with it.

        Args:
            state_dict: of this codebook or of a module around it; entries may be missing.
            prefix: in front of the codebook's names, dot included.
            assign: True if the tensors are going to replace the buffers, False if they are copied into them.

        Raises:
            TypeError: an entry is not a tensor, or a counter is not an integer.
            ValueError: a value is NaN or infinite, a count is negative, a counter is out of its range, or the metric
                cannot compare a code.

        >>> codebook = EMACodebook(codebook_size=8, dim=4)
        >>> codebook.check_state(codebook.state_dict())
        """
        buffers = dict(self.named_buffers(recurse=False))
        check_codebook_state(state_dict, prefix, buffers, self.metric, assign=assign)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        known = self._known_initialized is self.initialized  # also on another device
        # .half() and .bfloat16() cast the rest of a model; statistics that add a hundredth a step need float32.
        super()._apply(keeping_float32(fn), recurse)  # type: ignore[no-untyped-call]
        self._known_initialized = self.initialized if known else None
        return self

    if TYPE_CHECKING:  # nn.Module's __call__ is Any to type checkers

        def __call__(self, x: Tensor, mask: Tensor | None = None) -> Quantized:
            """Call :meth:`forward`."""


def warn_of_random_codes(owner: nn.Module, codebooks: Sequence[EMACodebook]) -> None:
    """Warn, once for these codebooks, if a forward pass that initialises nothing is about to use random codes.

    Args:
        owner: the module that the user called; its mode counts.
        codebooks: those it is about to use.
    """
    suspects = [codebook for codebook in codebooks if codebook.frozen or not owner.training]
    random = [each for each in suspects if not each._warned_of_random_codes and each.is_known_random()]
    if not random:
        return
    by_hand = "call initialize_(x), " if owner in codebooks else ""
    warnings.warn(
        f"this {type(owner).__name__} quantises by random codes: it is in eval mode or frozen, and was neither trained "
        f"nor loaded. Call it once in training mode, {by_hand}or load a state.",
        stacklevel=5,  # the caller of the module: between lie forward and the two calls of nn.Module
    )
    for codebook in random:
        codebook._warned_of_random_codes = True


def _settle_loaded(module: nn.Module, incompatible_keys: Any) -> None:
    assert isinstance(module, EMACodebook)
    for name, tensor in zip(module.state()._fields, in_one_dtype(module.state()), strict=True):
        setattr(module, name, tensor)
    # Read here, since a compiled training step cannot.
    module._known_initialized = module.initialized if count_of(module.initialized) else None
