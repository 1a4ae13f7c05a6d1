"""SERFFusion: the quantised maps refine the continuous embedding into a second target."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from torch import Tensor, nn

from vqssl.checks import (
    check_device,
    check_dtype,
    check_floating,
    check_mask,
    check_one_a_scale,
    check_positive_int,
    check_state_fits,
)
from vqssl.functional.serf import OPERATORS, SERFOperator, masked_mean, spatial_attention_weights
from vqssl.types import MultiScaleQuantized

__all__ = ["SERFFusion"]


class SERFFusion(nn.Module):
    r"""Fuses quantised maps into an anchor, lets the embedding consult it, and maps the result to a refined target.

    .. math:: z_q = \mathrm{pool}\Big(\sum_s \alpha_s \psi_s(q^s)\Big), \qquad
        f = z_c + \mathrm{attention}(z_c, z_q), \qquad z_s = \mathrm{MLP}(f)

    (DiSSECT, arXiv 2509.18765, section "Multi-scale fusion" and Eq. 6.) The psi and the sum are linear, so each map
    is pooled first: the same anchor, and no common grid. The operator ``"spatial"`` attends over the tokens themselves.
    The MLP is Linear, BatchNorm, ReLU, Linear.

    Who trains psi, alpha and the MLP is decided by the objective: see ``refinement`` in
    :class:`~vqssl.DiSSECTObjective`.

    Args:
        dim: D, width of the embedding, of the codes and of the output.
        num_scales: S, how many maps a call takes.
        operator: ``"spatial"`` (default), ``"channel"`` and ``"batch"`` (readings of Eq. 6), ``"pooled"`` (no
            attention), ``"concat"`` (the "no SERF" ablation), or a :class:`vqssl.functional.SERFOperator`.
        residual: whether z_c is added to what the operator returns; None (default) does so wherever the widths agree,
            which is everywhere but for ``"concat"``, which holds z_c already.
        hidden_dim: width of the MLP's hidden layer; None leaves the MLP out (the "no MLP" ablation).
        channels_last: False for maps ``(B, D, *spatial)``, True for tokens ``(B, ..., D)``.
        device, dtype: of the parameters.

    Shape:
        ``z_c`` ``(B, D)``; S maps ``(B, D, *spatial_s)``; optionally S masks ``(B, *spatial_s)``, True where a token
        counts. Output ``(B, D)``.

    Raises:
        TypeError: an argument of another type than above.
        ValueError: a size below 1, an unknown operator, a residual or a missing MLP where the operator's width is
            not D.

    >>> import torch
    >>> fusion = SERFFusion(dim=8, num_scales=2, hidden_dim=16)
    >>> fusion(torch.randn(4, 8), [torch.randn(4, 8, 6, 6), torch.randn(4, 8, 3, 3)]).shape
    torch.Size([4, 8])
    """

    def __init__(
        self,
        dim: int,
        num_scales: int,
        *,
        operator: str | SERFOperator = "spatial",
        residual: bool | None = None,
        hidden_dim: int | None = 2048,
        channels_last: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive_int("dim", dim)
        check_positive_int("num_scales", num_scales)
        self.operator_name, self.operator = _operator(operator)
        fits = self.operator.width == 1
        if residual and not fits:
            raise ValueError(
                f"residual needs an operator whose output has the width of z_c, got {self.operator_name!r} of width "
                f"{self.operator.width} x dim: leave residual out"
            )
        if hidden_dim is None and not fits:
            raise ValueError(
                f"without an MLP the operator's output must have width dim, got {self.operator_name!r} of width "
                f"{self.operator.width} x dim: give hidden_dim"
            )
        self.dim = dim
        self.num_scales = num_scales
        self.residual = fits if residual is None else residual
        self.hidden_dim = hidden_dim
        self.channels_last = channels_last
        self.register_load_state_dict_pre_hook(check_state_fits)  # type: ignore[no-untyped-call]
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
        """The refined target z_s.

        Args:
            z_c: the continuous embedding, ``(B, D)``.
            quantized: S maps ``(B, D, *spatial_s)``, or ``(B, ..., D)`` where ``channels_last``.
            masks: S masks ``(B, *spatial_s)``, or None.

        Returns:
            z_s, ``(B, D)``.

        Raises:
            TypeError: an input is no floating tensor or of another dtype than the parameters (outside autocast), a mask
                is not boolean, or one tensor came instead of a sequence.
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
        """f, what goes into the MLP: ``(B, D)``, or ``(B, 2 D)`` for ``"concat"``. Arguments as in :meth:`forward`."""
        tokens, token_masks = self._tokens(z_c, quantized, masks)
        if self.operator.keys == "anchor":
            keys, mask = self._anchor(tokens, token_masks), None
        else:
            keys, mask = self._places(tokens, token_masks), _joined(token_masks, tokens)
        f = self.operator.function(z_c, keys, mask)
        return z_c + f if self.residual else f

    def anchor(self, quantized: Sequence[Tensor], masks: Sequence[Tensor | None] | None = None) -> Tensor:
        """z_q, the pooled weighted fusion of the maps: ``(B, D)``.

        >>> import torch
        >>> SERFFusion(8, 1).anchor([torch.randn(4, 8, 3, 3)]).shape
        torch.Size([4, 8])
        """
        return self._anchor(*self._tokens(None, quantized, masks))

    def attention_maps(
        self, z_c: Tensor, quantized: Sequence[Tensor], masks: Sequence[Tensor | None] | None = None
    ) -> tuple[Tensor, ...]:
        """Where ``"spatial"`` looks: S maps ``(B, *spatial_s)`` of weights, which sum to 1 over all places of a sample.

        Arguments as in :meth:`forward`.

        Raises:
            ValueError: the operator is another one, and has no places.

        >>> import torch
        >>> fusion = SERFFusion(8, 2)
        >>> maps = fusion.attention_maps(torch.randn(4, 8), [torch.randn(4, 8, 6, 6), torch.randn(4, 8, 3, 3)])
        >>> [tuple(m.shape) for m in maps]
        [(4, 6, 6), (4, 3, 3)]
        """
        if self.operator != OPERATORS["spatial"]:
            raise ValueError(
                f"attention maps need operator 'spatial', got {self.operator_name!r}, which has no places: write "
                "SERFFusion(..., operator='spatial')"
            )
        tokens, token_masks = self._tokens(z_c, quantized, masks)
        weights = spatial_attention_weights(z_c, self._places(tokens, token_masks), _joined(token_masks, tokens))
        per_scale = weights.split([z.shape[1] for z in tokens], dim=1)
        shapes = [q.shape[1:-1] if self.channels_last else q.shape[2:] for q in quantized]
        return tuple(w.reshape(len(w), *shape) for w, shape in zip(per_scale, shapes, strict=True))

    def extra_repr(self) -> str:
        return f"{self.dim}, num_scales={self.num_scales}, operator={self.operator_name!r}, residual={self.residual}"

    # ---- parts ----

    def _cure(self, q: Tensor, quantized: Sequence[Tensor]) -> str:
        """What to write instead of a map whose shape does not fit."""
        axis, other = (-1, 1) if self.channels_last else (1, -1)
        if q.ndim > 1 and q.shape[axis] == self.dim:
            return "give z_c and all maps of the same images; chunk either all or none of two joined views"
        if q.ndim > 1 and q.shape[other] == self.dim:
            if any(each.ndim > 1 and each.shape[axis] == self.dim for each in quantized):  # as they should be
                move = "1, -1" if self.channels_last else "-1, 1"
                return f"write movedim({move}) behind it if this one has another layout than the rest"
            return f"write SERFFusion(..., channels_last={not self.channels_last}) for this layout, as in the quantizer"
        return "give the quantizer and SERFFusion the same dim, or project the maps to it first"

    def _anchor(self, tokens: list[Tensor], masks: list[Tensor | None]) -> Tensor:
        pooled = [masked_mean(z, mask) for z, mask in zip(tokens, masks, strict=True)]
        return torch.stack([a * psi(z) for a, psi, z in zip(self.alpha, self.psi, pooled, strict=True)]).sum(0)

    def _places(self, tokens: list[Tensor], masks: list[Tensor | None]) -> Tensor:
        # What stands under a mask must not reach psi: a NaN there would make the gradient of its weight NaN.
        tokens = [
            z if mask is None else torch.where(mask[..., None], z, 0.0) for z, mask in zip(tokens, masks, strict=True)
        ]
        return torch.cat([a * psi(z) for a, psi, z in zip(self.alpha, self.psi, tokens, strict=True)], dim=1)

    def _tokens(
        self, z_c: Tensor | None, quantized: Sequence[Tensor], masks: Sequence[Tensor | None] | None
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """Maps as ``(B, N_s, D)`` and masks as ``(B, N_s)``, checked."""
        if isinstance(quantized, MultiScaleQuantized):
            raise TypeError(
                "quantized must be a sequence of maps, got the whole MultiScaleQuantized: write its .quantized"
            )
        masks = [None] * self.num_scales if masks is None else masks
        check_one_a_scale("quantized", quantized, self.num_scales)
        check_one_a_scale("masks", masks, self.num_scales)
        for scale, q in enumerate(quantized):
            _check_codes(f"quantized[{scale}]", q)
        batch = quantized[0].shape[0] if quantized[0].ndim else 0
        if z_c is not None:
            check_floating("z_c", z_c, "the embedding comes first: z, maps = teacher(view), then fusion(z, quantized)")
            if z_c.ndim != 2 or z_c.shape[1] != self.dim:
                raise ValueError(
                    f"z_c must be (B, dim) with dim = {self.dim}, one embedding a sample, got shape "
                    f"{tuple(z_c.shape)}: write z_c.flatten(1) for (B, dim, 1, 1), and pool or project what is larger"
                )
            check_device("z_c", z_c, self.alpha.device, "the parameters")
            check_dtype("z_c", z_c, self.alpha.dtype)
            batch = len(z_c)
        axis, layout = (-1, "(B, ..., dim)") if self.channels_last else (1, "(B, dim, *spatial)")
        tokens, token_masks = [], []
        for scale, (q, mask) in enumerate(zip(quantized, masks, strict=True)):
            if q.ndim < 2 or q.shape[axis] != self.dim or len(q) != batch:
                raise ValueError(
                    f"quantized[{scale}] must be {layout} with B = {batch} and dim = {self.dim}, got shape "
                    f"{tuple(q.shape)}: {self._cure(q, quantized)}"
                )
            check_dtype(f"quantized[{scale}]", q, self.alpha.dtype)
            places = q.shape[1:-1] if self.channels_last else q.shape[2:]
            check_device(f"quantized[{scale}]", q, self.alpha.device, "the parameters")
            check_mask(mask, q.shape[:1] + places, q.device, f"masks[{scale}]")
            tokens.append(_in_a_row(q if self.channels_last else rearrange(q, "b d ... -> b ... d")))
            token_masks.append(None if mask is None else _in_a_row(mask[..., None]).squeeze(-1))
        return tokens, token_masks

    if TYPE_CHECKING:  # nn.Module's __call__ is Any to type checkers

        def __call__(
            self, z_c: Tensor, quantized: Sequence[Tensor], masks: Sequence[Tensor | None] | None = None
        ) -> Tensor: ...


def _in_a_row(x: Tensor) -> Tensor:
    """``(B, *spatial, D) -> (B, N, D)``, also for B = 0 and for maps without spatial axes."""
    return x[:, None] if x.ndim == 2 else x.flatten(1, -2)


def _joined(masks: list[Tensor | None], tokens: list[Tensor]) -> Tensor | None:
    """Masks of all scales side by side, ``(B, N)``, or None where every token counts."""
    if all(mask is None for mask in masks):
        return None
    whole = [
        torch.ones(z.shape[:2], dtype=torch.bool, device=z.device) if mask is None else mask
        for mask, z in zip(masks, tokens, strict=True)
    ]
    return torch.cat(whole, dim=1)


def _check_codes(name: str, q: Tensor) -> None:
    if isinstance(q, Tensor) and q.dtype in (torch.int16, torch.int32, torch.int64):
        raise TypeError(
            f"{name} must hold the codes themselves, got their numbers, {q.dtype}: pass .quantized of what the "
            "quantizer returned, not .indices"
        )
    check_floating(name, q)


def _operator(operator: str | SERFOperator) -> tuple[str, SERFOperator]:
    if isinstance(operator, SERFOperator):
        return getattr(operator.function, "__name__", "custom"), operator
    if not isinstance(operator, str):
        raise TypeError(
            f"operator must be a name or a vqssl.functional.SERFOperator, got {operator!r}: write operator='spatial', "
            "or SERFOperator(function, 'anchor') for a function of your own"
        )
    if operator not in OPERATORS:
        raise ValueError(f"operator must be one of {', '.join(map(repr, OPERATORS))}, got {operator!r}")
    return operator, OPERATORS[operator]
