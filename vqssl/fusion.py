"""SERFFusion: quantised feature maps refine the continuous embedding into a second target."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import linear

from vqssl.checks import (
    check_device,
    check_dtype,
    check_floating,
    check_floating_dtype,
    check_mask,
    check_one_a_scale,
    check_positive_int,
)
from vqssl.foreign_keywords import names_foreign_keywords
from vqssl.functional.masking import zero_where_masked
from vqssl.functional.serf_operators import (
    OPERATORS,
    OperatorName,
    SERFOperator,
    masked_mean,
    spatial_attention_weights,
)
from vqssl.loading import check_before_loading, check_finite_state
from vqssl.types import MultiScaleQuantized

__all__ = ["SERFFusion"]


class SERFFusion(nn.Module):
    r"""Fusion head that refines the continuous embedding z_c with quantised feature maps.

    .. math:: z_q = \mathrm{pool}\Big(\sum_s \alpha_s \psi_s(q^s)\Big), \qquad
        f = z_c + \mathrm{attention}(z_c, z_q), \qquad z_s = \mathrm{MLP}(f)

    Source: DiSSECT, arXiv 2509.18765, section "Multi-scale fusion" and Eq. 6. The maps q^s need no common grid: psi and
    the sum are linear, so pooling each map first gives the same anchor z_q. The operator ``"spatial"`` attends over the
    tokens of all maps instead of z_q. The MLP is Linear, BatchNorm, ReLU, Linear.

    The objective decides what trains psi, alpha and the MLP: see ``refinement`` in :class:`~vqssl.DiSSECTObjective`.

    Args:
        dim: D, width of the embedding, of the codes and of the output.
        num_scales: S, the number of maps in a call.
        operator: ``"spatial"`` (default), ``"channel"`` and ``"batch"`` (readings of Eq. 6), ``"pooled"`` (no
            attention), ``"concat"`` (the "no SERF" ablation), or a :class:`vqssl.functional.SERFOperator`.
        residual: True adds z_c to the operator's output. None (default) does so where the widths agree: for every
            operator above but ``"concat"``, whose output contains z_c.
        hidden_dim: width of the MLP's hidden layer. None leaves the MLP out (the "no MLP" ablation).
        channels_last: False for maps ``(B, D, *spatial)``, True for tokens ``(B, ..., D)``.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Shape:
        ``z_c`` ``(B, D)``; S maps ``(B, D, *spatial_s)``; optionally S masks ``(B, *spatial_s)``, True where a token
        is valid. Output ``(B, D)``.

    Raises:
        TypeError: an argument has another type than above.
        ValueError: a size is below 1, the operator is unknown, or ``residual`` or a missing MLP does not fit an
            operator whose width is not D.

    >>> import torch
    >>> fusion = SERFFusion(dim=8, num_scales=2, hidden_dim=16)
    >>> fusion(torch.randn(4, 8), [torch.randn(4, 8, 6, 6), torch.randn(4, 8, 3, 3)]).shape
    torch.Size([4, 8])
    """

    @names_foreign_keywords({}, sizes_by_name="SERFFusion(dim, num_scales)", positional=2)
    def __init__(
        self,
        dim: int,
        num_scales: int,
        *,
        operator: OperatorName | SERFOperator = "spatial",
        residual: bool | None = None,
        hidden_dim: int | None = 2048,
        channels_last: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive_int("dim", dim)
        check_positive_int("num_scales", num_scales)
        check_floating_dtype(dtype)
        self.operator_name, self.operator = _named_operator(operator)
        same_width = self.operator.width == 1
        if residual and not same_width:
            raise ValueError(
                f"residual needs an operator whose output has the width of z_c, got {self.operator_name!r} of width "
                f"{self.operator.width} x dim: leave residual out"
            )
        if hidden_dim is None and not same_width:
            raise ValueError(
                f"without an MLP the operator's output must have width dim, got {self.operator_name!r} of width "
                f"{self.operator.width} x dim: give hidden_dim"
            )
        self.dim = dim
        self.num_scales = num_scales
        self.residual = same_width if residual is None else residual
        self.hidden_dim = hidden_dim
        self.channels_last = channels_last
        check_before_loading(self)
        self.psi = nn.ModuleList(nn.Linear(dim, dim, device=device, dtype=dtype) for _ in range(num_scales))
        self.alpha = nn.Parameter(torch.full((num_scales,), 1 / num_scales, device=device, dtype=dtype))
        self.mlp: nn.Module = nn.Identity()
        if hidden_dim is not None:
            check_positive_int("hidden_dim", hidden_dim)
            self.mlp = nn.Sequential(
                nn.Linear(self.operator.width * dim, hidden_dim, device=device, dtype=dtype),
                nn.BatchNorm1d(hidden_dim, device=device, dtype=dtype),
                nn.ReLU(inplace=True),
                nn.Linear(hidden_dim, dim, device=device, dtype=dtype),
            )

    def forward(self, z_c: Tensor, quantized: Sequence[Tensor], masks: Sequence[Tensor | None] | None = None) -> Tensor:
        """Compute the refined target z_s.

        Args:
            z_c: the continuous embedding, ``(B, D)``.
            quantized: S maps ``(B, D, *spatial_s)``, or ``(B, ..., D)`` with ``channels_last``.
            masks: S masks ``(B, *spatial_s)``, an entry may be None; or None.

        Returns:
            z_s, ``(B, D)``.

        Raises:
            TypeError: an input is not a floating tensor or has another dtype than the parameters (outside autocast), a
                mask is not boolean, or a single tensor is given instead of a sequence.
            ValueError: the shapes do not fit ``dim``, ``num_scales`` or each other, a tensor is on another device than
                the parameters, or in training mode there are fewer than 2 samples for the MLP's BatchNorm.
        """
        f = self.refine(z_c, quantized, masks)
        if self.training and self.hidden_dim is not None and len(f) < 2:
            raise ValueError(
                f"a training batch must hold at least 2 samples, got {len(f)}: the MLP's BatchNorm has no statistics "
                "of fewer; drop the last batch, call .eval(), or leave the MLP out with hidden_dim=None"
            )
        return self.mlp(f)

    def refine(self, z_c: Tensor, quantized: Sequence[Tensor], masks: Sequence[Tensor | None] | None = None) -> Tensor:
        """Compute f, the input of the MLP. Arguments and errors as in :meth:`forward`.

        Returns:
            ``(B, D)``, or ``(B, width * D)`` for a wider operator, as ``"concat"`` is.

        >>> import torch
        >>> SERFFusion(8, 1, operator="concat").refine(torch.randn(4, 8), [torch.randn(4, 8, 3, 3)]).shape
        torch.Size([4, 16])
        """
        self._check_input(z_c, quantized, masks)
        tokens, token_masks = self._flatten(quantized, masks)
        if self.operator.keys == "anchor":
            keys, mask = self._pooled_anchor(tokens, token_masks), None
        else:
            keys, mask = self._projected_tokens(tokens, token_masks), _joined_mask(tokens, token_masks)
        f = self.operator.function(z_c, keys, mask)
        return z_c + f if self.residual else f

    def anchor(self, quantized: Sequence[Tensor], masks: Sequence[Tensor | None] | None = None) -> Tensor:
        """Compute z_q, the pooled and weighted sum of the maps. Arguments and errors as in :meth:`forward`.

        Returns:
            ``(B, D)``.

        >>> import torch
        >>> SERFFusion(8, 1).anchor([torch.randn(4, 8, 3, 3)]).shape
        torch.Size([4, 8])
        """
        self._check_input(None, quantized, masks)
        return self._pooled_anchor(*self._flatten(quantized, masks))

    def attention_maps(
        self, z_c: Tensor, quantized: Sequence[Tensor], masks: Sequence[Tensor | None] | None = None
    ) -> tuple[Tensor, ...]:
        """Compute the attention weights of the operator ``"spatial"`` as maps. Arguments as in :meth:`forward`.

        Returns:
            S maps ``(B, *spatial_s)``, whose sum over all positions of all maps is 1 for each sample.

        Raises:
            ValueError: the operator is another one, which does not attend over positions.

        >>> import torch
        >>> fusion = SERFFusion(8, 2)
        >>> maps = fusion.attention_maps(torch.randn(4, 8), [torch.randn(4, 8, 6, 6), torch.randn(4, 8, 3, 3)])
        >>> [tuple(m.shape) for m in maps]
        [(4, 6, 6), (4, 3, 3)]
        """
        if self.operator != OPERATORS["spatial"]:
            raise ValueError(
                f"attention maps need operator 'spatial', got {self.operator_name!r}, which does not attend over "
                "positions: write SERFFusion(..., operator='spatial')"
            )
        self._check_input(z_c, quantized, masks)
        tokens, token_masks = self._flatten(quantized, masks)
        weights = spatial_attention_weights(
            z_c, self._projected_tokens(tokens, token_masks), _joined_mask(tokens, token_masks)
        )
        per_scale = weights.split([z.shape[1] for z in tokens], dim=1)
        return tuple(w.reshape(len(w), *self._spatial(q)) for w, q in zip(per_scale, quantized, strict=True))

    def check_state(self, state_dict: Mapping[str, Any], prefix: str = "", *, assign: bool = False) -> None:
        """Raise if a state holds values that no training gives; ``load_state_dict`` begins with it.

        Args:
            state_dict: of this module or of one around it; entries may be missing.
            prefix: in front of the module's names, dot included.
            assign: True if the tensors are going to replace ours, False if they are copied into them.

        Raises:
            TypeError: an entry is not a tensor, or a counter is not an integer.
            ValueError: a value is NaN or infinite, or a variance or a counter is negative.

        >>> fusion = SERFFusion(8, 1)
        >>> fusion.check_state(fusion.state_dict())
        """
        check_finite_state(self, state_dict, prefix, assign)

    def extra_repr(self) -> str:
        """Return the options that ``repr`` shows."""
        return f"{self.dim}, num_scales={self.num_scales}, operator={self.operator_name!r}, residual={self.residual}"

    # ---- parts of the equation ----

    def _pooled_anchor(self, tokens: list[Tensor], masks: list[Tensor | None]) -> Tensor:
        pooled = [masked_mean(z, mask) for z, mask in zip(tokens, masks, strict=True)]
        return torch.stack([a * psi(z) for a, psi, z in zip(self.alpha, self.psi, pooled, strict=True)]).sum(0)

    def _projected_tokens(self, tokens: list[Tensor], masks: list[Tensor | None]) -> Tensor:
        # Masked tokens are zeroed before psi: a NaN there would make the gradient of psi's weight NaN.
        tokens = [zero_where_masked(z, mask) for z, mask in zip(tokens, masks, strict=True)]
        # alpha scales psi, which is small, and not its output, which has the size of the tokens.
        return torch.cat(
            [linear(z, a * psi.weight, a * psi.bias) for a, psi, z in zip(self.alpha, self.psi, tokens, strict=True)],
            dim=1,
        )

    # ---- layout of the maps ----

    def _spatial(self, q: Tensor) -> torch.Size:
        return q.shape[1:-1] if self.channels_last else q.shape[2:]

    def _flatten(
        self, quantized: Sequence[Tensor], masks: Sequence[Tensor | None] | None
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """Return each map as tokens ``(B, N_s, D)`` and each mask as ``(B, N_s)`` or None."""
        masks = [None] * self.num_scales if masks is None else masks
        maps = [q if self.channels_last else rearrange(q, "b d ... -> b ... d") for q in quantized]
        token_masks = [None if mask is None else _flatten_positions(mask[..., None]).squeeze(-1) for mask in masks]
        return [_flatten_positions(q) for q in maps], token_masks

    def _check_input(
        self, z_c: Tensor | None, quantized: Sequence[Tensor], masks: Sequence[Tensor | None] | None
    ) -> None:
        """Raise if a tensor does not fit the module or the others; ``z_c`` is None where there is no query."""
        if isinstance(quantized, MultiScaleQuantized):
            raise TypeError(
                "quantized must be a sequence of maps, got the whole MultiScaleQuantized: write its .quantized"
            )
        check_one_a_scale("quantized", quantized, self.num_scales)
        for scale, q in enumerate(quantized):
            _check_codes(f"quantized[{scale}]", q)
        if z_c is not None:
            self._check_query(z_c)
        for scale, q in enumerate(quantized):
            self._check_map(f"quantized[{scale}]", q)
        first, source = (quantized[0], "quantized[0]") if z_c is None else (z_c, "z_c")
        for scale, q in enumerate(quantized):
            if len(q) != len(first):
                raise ValueError(
                    f"quantized[{scale}] must hold the {len(first)} samples of {source}, got {len(q)}: give z_c and "
                    "all maps of the same images; chunk either all or none of two joined views"
                )
        if masks is not None:
            check_one_a_scale("masks", masks, self.num_scales)
            for scale, (q, mask) in enumerate(zip(quantized, masks, strict=True)):
                check_mask(mask, q.shape[:1] + self._spatial(q), q.device, f"masks[{scale}]")

    def _check_query(self, z_c: Tensor) -> None:
        check_floating("z_c", z_c, "the embedding comes first: z, maps = teacher(view), then fusion(z, quantized)")
        if z_c.ndim != 2 or z_c.shape[1] != self.dim:
            raise ValueError(
                f"z_c must be (B, dim) with dim = {self.dim}, one embedding a sample, got shape "
                f"{tuple(z_c.shape)}: write z_c.flatten(1) for (B, dim, 1, 1), and pool or project what is larger"
            )
        check_device("z_c", z_c, self.alpha.device, "the parameters")
        check_dtype("z_c", z_c, self.alpha.dtype)

    def _check_map(self, name: str, q: Tensor) -> None:
        axis, layout = (-1, "(B, ..., dim)") if self.channels_last else (1, "(B, dim, *spatial)")
        if q.ndim < 2 or q.shape[axis] != self.dim:
            raise ValueError(
                f"{name} must be {layout} with dim = {self.dim}, since channels_last is {self.channels_last}, got "
                f"shape {tuple(q.shape)}: give SERFFusion the dim and the channels_last of the quantizer, and its maps "
                "as they are"
            )
        check_dtype(name, q, self.alpha.dtype)
        check_device(name, q, self.alpha.device, "the parameters")

    if TYPE_CHECKING:  # nn.Module's __call__ is Any to type checkers

        def __call__(
            self, z_c: Tensor, quantized: Sequence[Tensor], masks: Sequence[Tensor | None] | None = None
        ) -> Tensor:
            """Call :meth:`forward`."""


def _flatten_positions(x: Tensor) -> Tensor:
    """Reshape ``(B, *spatial, D)`` to ``(B, N, D)``, also for B = 0 and for maps without spatial axes."""
    return x[:, None] if x.ndim == 2 else x.flatten(1, -2)


def _joined_mask(tokens: list[Tensor], masks: list[Tensor | None]) -> Tensor | None:
    """Concatenate the masks of all scales to ``(B, N)``; None if all tokens are valid."""
    if all(mask is None for mask in masks):
        return None
    whole = [
        torch.ones(z.shape[:2], dtype=torch.bool, device=z.device) if mask is None else mask
        for z, mask in zip(tokens, masks, strict=True)
    ]
    return torch.cat(whole, dim=1)


def _check_codes(name: str, q: Tensor) -> None:
    """Raise if a map is not a floating tensor; indices are the usual mistake."""
    if isinstance(q, Tensor) and q.dtype in (torch.int16, torch.int32, torch.int64):
        raise TypeError(
            f"{name} must hold codes, got integers of {q.dtype}: pass .quantized of the quantizer's result, not "
            ".indices"
        )
    check_floating(name, q)


def _named_operator(operator: OperatorName | SERFOperator) -> tuple[str, SERFOperator]:
    """Return an operator with the name that ``repr`` and errors show."""
    if isinstance(operator, SERFOperator):
        return getattr(operator.function, "__name__", "custom"), operator
    if not isinstance(operator, str):
        raise TypeError(
            f"operator must be a name or a vqssl.functional.SERFOperator, got {operator!r}: write operator='spatial', "
            "or SERFOperator(function, 'anchor') for a function of your own"
        )
    if operator not in OPERATORS:
        raise ValueError(
            f"operator must be one of {', '.join(map(repr, OPERATORS))}, or a SERFOperator, got {operator!r}"
        )
    return operator, OPERATORS[operator]
