r"""The refinement operators: how the continuous embedding z_c consults the quantised features.

DiSSECT's Eq. 6 is :math:`f = \mathrm{softmax}(z_c z_q^\top / \sqrt{D})\, z_q`, "z_c is the query, z_q both key and
value". With one vector a sample that has several readings; each is a function ``(z_c, keys, mask) -> f`` here and has
one entry in :data:`OPERATORS`. A new reading is one function and one entry.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from vqssl.checks import check_device, check_floating, check_mask
from vqssl.functional.vectors import unit

__all__ = [
    "OPERATORS",
    "SERFOperator",
    "batch_attention",
    "channel_attention",
    "concatenation",
    "masked_mean",
    "pooled_codes",
    "spatial_attention",
    "spatial_attention_weights",
]


def channel_attention(z_c: Tensor, z_q: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Eq. 6 within each sample: the D x D outer product, softmax over the channels of z_q.

    .. math:: f_i = \sum_j \mathrm{softmax}_j \big( z_{c,i}\, z_{q,j} / \sqrt{D} \big)\, z_{q,j}

    Does not depend on the other samples. Where z_q is small the softmax is nearly uniform and f nearly constant.

    Args:
        z_c: the query, ``(B, D)``.
        z_q: the quantised anchor, ``(B, D)``.
        mask: not used: the anchor was pooled over valid tokens.

    Returns:
        f, ``(B, D)``.

    Raises:
        ValueError: the shapes differ.

    >>> import torch
    >>> channel_attention(torch.zeros(1, 2), torch.tensor([[1.0, 3.0]])).tolist()
    [[2.0, 2.0]]
    """
    _check_pair(z_c, z_q)
    logits = z_c[:, :, None] * z_q[:, None, :] / z_c.shape[-1] ** 0.5
    return (logits.softmax(-1) * z_q[:, None, :]).sum(-1)


def batch_attention(z_c: Tensor, z_q: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Eq. 6 read over the batch: the B x B product, softmax over the samples of z_q.

    .. math:: f_b = \sum_{b'} \mathrm{softmax}_{b'} \big( \langle z_{c,b}, z_{q,b'} \rangle / \sqrt{D} \big)\, z_{q,b'}

    Mixes samples: the result depends on the batch size and on how a batch is sharded over ranks.

    Args:
        z_c: the query, ``(B, D)``.
        z_q: the quantised anchor, ``(B, D)``.
        mask: not used: the anchor was pooled over valid tokens.

    Returns:
        f, ``(B, D)``.

    Raises:
        ValueError: the shapes differ.

    >>> import torch
    >>> batch_attention(torch.zeros(2, 1), torch.tensor([[1.0], [3.0]])).tolist()
    [[2.0], [2.0]]
    """
    _check_pair(z_c, z_q)
    return (z_c @ z_q.T / z_c.shape[-1] ** 0.5).softmax(-1) @ z_q


def spatial_attention(z_c: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Cross-attention over places: z_c attends over the un-pooled quantised tokens of all scales.

    .. math:: f = \sum_n a_n t_n, \qquad a = \mathrm{softmax}_n \big( \sqrt{D}\, \cos(z_c, t_n) \big)

    Not the paper's wording, but the reading whose attention map can be looked at. The cosine keeps the weights'
    sharpness apart from the scale of the codes.

    Args:
        z_c: the query, ``(B, D)``.
        tokens: ``(B, N, D)``.
        mask: ``(B, N)`` bool, True where a token counts. A sample without any gets zeros.

    Returns:
        f, ``(B, D)``.

    Raises:
        TypeError: the mask is not boolean.
        ValueError: the shapes do not fit.

    >>> import torch
    >>> tokens = torch.tensor([[[2.0, 0.0], [0.0, 2.0]]])
    >>> spatial_attention(torch.tensor([[1.0, 1.0]]), tokens).tolist()
    [[1.0, 1.0]]
    """
    weights = spatial_attention_weights(z_c, tokens, mask)
    if mask is not None:
        tokens = torch.where(mask[..., None], tokens, 0.0)  # a weight of 0 does not silence a NaN
    return (weights[:, None, :] @ tokens).squeeze(1)


def spatial_attention_weights(z_c: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """The weights of :func:`spatial_attention`: ``(B, N)``, summing to 1 over the valid tokens of each sample.

    >>> import torch
    >>> spatial_attention_weights(torch.ones(1, 4), torch.ones(1, 5, 4)).sum().item()
    1.0
    """
    check_floating("z_c", z_c)
    check_floating("tokens", tokens)
    if tokens.ndim != 3 or z_c.ndim != 2 or tokens.shape[::2] != z_c.shape:
        raise ValueError(
            f"z_c must be (B, D) and tokens (B, N, D), got {tuple(z_c.shape)} and {tuple(tokens.shape)}: "
            "flatten maps with einops.rearrange(maps, 'b d ... -> b (...) d')"
        )
    check_device("tokens", tokens, z_c.device, "z_c")
    check_mask(mask, tokens.shape[:-1], tokens.device)
    if mask is not None:
        tokens = torch.where(mask[..., None], tokens, 0.0)
    cosine = (unit(tokens) @ unit(z_c)[:, :, None]).squeeze(-1)
    logits = cosine * z_c.shape[-1] ** 0.5
    if mask is None:
        return logits.softmax(-1)
    # A row of nothing but -inf would be NaN: the largest finite negative gives such a row weights that are then zeroed.
    logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
    return logits.softmax(-1) * mask


def pooled_codes(z_c: Tensor, z_q: Tensor, mask: Tensor | None = None) -> Tensor:
    """No attention: the quantised anchor itself, ``(B, D)``.

    >>> import torch
    >>> pooled_codes(torch.zeros(1, 2), torch.ones(1, 2)).tolist()
    [[1.0, 1.0]]
    """
    _check_pair(z_c, z_q)
    return z_q


def concatenation(z_c: Tensor, z_q: Tensor, mask: Tensor | None = None) -> Tensor:
    """No attention, the paper's "no SERF" ablation: ``(B, 2 D)``, z_c then z_q.

    >>> import torch
    >>> concatenation(torch.zeros(1, 2), torch.ones(1, 2)).tolist()
    [[0.0, 0.0, 1.0, 1.0]]
    """
    _check_pair(z_c, z_q)
    return torch.cat([z_c, z_q], dim=-1)


def masked_mean(tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """``(B, N, D) -> (B, D)``: the mean over the valid tokens of each sample; zeros where there is none.

    >>> import torch
    >>> masked_mean(torch.tensor([[[1.0], [3.0], [9.0]]]), torch.tensor([[True, True, False]])).tolist()
    [[2.0]]
    """
    check_floating("tokens", tokens)
    if tokens.ndim != 3:
        raise ValueError(
            f"tokens must be (B, N, D), got shape {tuple(tokens.shape)}: flatten maps with "
            "einops.rearrange(maps, 'b d ... -> b (...) d')"
        )
    check_mask(mask, tokens.shape[:-1], tokens.device)
    # Summed in float32 at least: float16 ends at 65504, which a map of a few thousand places reaches.
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    if mask is None:
        return (tokens.sum(1, dtype=dtype) / max(tokens.shape[1], 1)).to(tokens.dtype)
    total = torch.where(mask[..., None], tokens, 0.0).sum(1, dtype=dtype)
    return (total / mask.sum(1, keepdim=True).clamp_min(1)).to(tokens.dtype)


class SERFOperator(NamedTuple):
    """A refinement operator, and what :class:`vqssl.SERFFusion` must know to call it.

    >>> OPERATORS["concat"].width
    2
    """

    function: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    """``(z_c, keys, mask) -> f``; ``mask`` belongs to the tokens and is None where all count."""
    keys: Literal["anchor", "tokens"]
    """Whether keys are the pooled anchor ``(B, D)`` or the tokens of all scales ``(B, N, D)``."""
    width: int = 1
    """Width of f in multiples of D."""


OPERATORS = {
    "channel": SERFOperator(channel_attention, "anchor"),
    "batch": SERFOperator(batch_attention, "anchor"),
    "spatial": SERFOperator(spatial_attention, "tokens"),
    "pooled": SERFOperator(pooled_codes, "anchor"),
    "concat": SERFOperator(concatenation, "anchor", width=2),
}
"""The operators by name."""


def _check_pair(z_c: Tensor, z_q: Tensor) -> None:
    check_floating("z_c", z_c)
    check_floating("z_q", z_q)
    check_device("z_q", z_q, z_c.device, "z_c")
    if z_c.ndim != 2 or z_q.shape != z_c.shape:
        raise ValueError(
            f"z_c and z_q must both be (B, D), got {tuple(z_c.shape)} and {tuple(z_q.shape)}: "
            "pool maps over their places first, and project both to one width"
        )
