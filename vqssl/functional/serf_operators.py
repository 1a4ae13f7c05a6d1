r"""Refinement operators: how the continuous embedding z_c reads the quantised features.

DiSSECT's Eq. 6 (arXiv 2509.18765) is :math:`f = \mathrm{softmax}(z_c z_q^\top / \sqrt{D})\, z_q`, "z_c is the query,
z_q both key and value". With one vector a sample, the equation has several readings. Each is a function
``(z_c, keys, mask) -> f`` here, with an entry in :data:`OPERATORS`. A new reading is a function and an entry.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from vqssl.checks import check_device, check_floating, check_mask
from vqssl.functional.autocast import without_autocast
from vqssl.functional.masking import zero_where_masked
from vqssl.functional.vectors import unit

__all__ = [
    "OPERATORS",
    "OperatorName",
    "SERFOperator",
    "batch_attention",
    "channel_attention",
    "concatenation",
    "masked_mean",
    "pooled_codes",
    "spatial_attention",
    "spatial_attention_weights",
]

_FLATTEN = "for maps (B, D, *spatial), write einops.rearrange(maps, 'b d ... -> b (...) d')"


def channel_attention(z_c: Tensor, z_q: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Attend over the channels of z_q within each sample: equation 6 with the D x D outer product.

    .. math:: f_i = \sum_j \mathrm{softmax}_j \big( z_{c,i}\, z_{q,j} / \sqrt{D} \big)\, z_{q,j}

    The result does not depend on other samples. If z_q is small, the softmax is nearly uniform and f nearly constant.

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
    r"""Attend over the samples of the batch: equation 6 with the B x B product.

    .. math:: f_b = \sum_{b'} \mathrm{softmax}_{b'} \big( \langle z_{c,b}, z_{q,b'} \rangle / \sqrt{D} \big)\, z_{q,b'}

    This mixes samples: the result depends on the batch size and on how ranks share a batch.

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
    r"""Attend over positions: z_c is the query, the quantised tokens of all scales are keys and values.

    .. math:: f = \sum_n a_n t_n, \qquad a = \mathrm{softmax}_n \big( \sqrt{D}\, \cos(z_c, t_n) \big)

    The paper does not say this, but only this reading has an attention map to look at. With the cosine, the sharpness
    of the weights does not depend on the scale of the codes.

    Args:
        z_c: the query, ``(B, D)``.
        tokens: ``(B, N, D)``.
        mask: ``(B, N)`` bool, True where a token is valid.

    Returns:
        f, ``(B, D)``; zeros for a sample without a valid token.

    Raises:
        TypeError: an input is not floating, or the mask is not boolean.
        ValueError: the shapes or the devices do not fit.

    >>> import torch
    >>> tokens = torch.tensor([[[2.0, 0.0], [0.0, 2.0]]])
    >>> spatial_attention(torch.tensor([[1.0, 1.0]]), tokens).tolist()
    [[1.0, 1.0]]
    """
    weights = spatial_attention_weights(z_c, tokens, mask)
    return (weights[:, None, :] @ zero_where_masked(tokens, mask)).squeeze(1)


def spatial_attention_weights(z_c: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """Compute the attention weights of :func:`spatial_attention`.

    Args:
        z_c: the query, ``(B, D)``.
        tokens: ``(B, N, D)``.
        mask: ``(B, N)`` bool, True where a token is valid.

    Returns:
        ``(B, N)``, summing to 1 over the valid tokens of a sample; zeros for a sample without any.

    Raises:
        TypeError: an input is not floating, or the mask is not boolean.
        ValueError: the shapes or the devices do not fit.

    >>> import torch
    >>> spatial_attention_weights(torch.ones(1, 4), torch.ones(1, 5, 4)).sum().item()
    1.0
    """
    check_floating("z_c", z_c)
    check_floating("tokens", tokens)
    if tokens.ndim != 3 or z_c.ndim != 2 or tokens.shape[::2] != z_c.shape:
        cure = _FLATTEN if tokens.ndim != 3 else "give both the same samples and the same width"
        raise ValueError(
            f"z_c must be (B, D) and tokens (B, N, D), got {tuple(z_c.shape)} and {tuple(tokens.shape)}: {cure}"
        )
    check_device("tokens", tokens, z_c.device, "z_c")
    check_mask(mask, tokens.shape[:-1], tokens.device)
    logits = _cosines(z_c, zero_where_masked(tokens, mask)) * z_c.shape[-1] ** 0.5
    if mask is None:
        return logits.softmax(-1)
    # Not -inf: a row of only -inf would become NaN. The weights of such a row are zeroed below.
    logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
    return logits.softmax(-1) * mask


def _cosines(z_c: Tensor, tokens: Tensor) -> Tensor:
    """Return the cosines ``(B, N)`` of z_c and the tokens; 0 for tokens of length 0."""
    # Lengths divide the products, not the tokens: nothing of the tokens' size is made. In float32 at least, because
    # products of float16 tokens may pass 65504.
    wide = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    length = wide.norm(dim=-1)
    with without_autocast(tokens):
        products = (wide @ unit(z_c).to(wide.dtype)[:, :, None]).squeeze(-1)
    return (products / torch.where(length > 0, length, 1.0)).to(tokens.dtype)


def pooled_codes(z_c: Tensor, z_q: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the quantised anchor: no attention.

    Args:
        z_c: the query, ``(B, D)``; only its shape is checked.
        z_q: the quantised anchor, ``(B, D)``.
        mask: not used: the anchor was pooled over valid tokens.

    Returns:
        z_q, ``(B, D)``.

    Raises:
        ValueError: the shapes differ.

    >>> import torch
    >>> pooled_codes(torch.zeros(1, 2), torch.ones(1, 2)).tolist()
    [[1.0, 1.0]]
    """
    _check_pair(z_c, z_q)
    return z_q


def concatenation(z_c: Tensor, z_q: Tensor, mask: Tensor | None = None) -> Tensor:
    """Concatenate z_c and z_q: no attention, the paper's "no SERF" ablation.

    Args:
        z_c: the query, ``(B, D)``.
        z_q: the quantised anchor, ``(B, D)``.
        mask: not used: the anchor was pooled over valid tokens.

    Returns:
        ``(B, 2 D)``: z_c, then z_q.

    Raises:
        ValueError: the shapes differ.

    >>> import torch
    >>> concatenation(torch.zeros(1, 2), torch.ones(1, 2)).tolist()
    [[0.0, 0.0, 1.0, 1.0]]
    """
    _check_pair(z_c, z_q)
    return torch.cat([z_c, z_q], dim=-1)


def masked_mean(tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """Average the valid tokens of each sample.

    Args:
        tokens: ``(B, N, D)``.
        mask: ``(B, N)`` bool, True where a token is valid.

    Returns:
        ``(B, D)``; zeros for a sample without a valid token.

    Raises:
        TypeError: the tokens are not floating, or the mask is not boolean.
        ValueError: the shapes or the devices do not fit.

    >>> import torch
    >>> masked_mean(torch.tensor([[[1.0], [3.0], [9.0]]]), torch.tensor([[True, True, False]])).tolist()
    [[2.0]]
    """
    check_floating("tokens", tokens)
    if tokens.ndim != 3:
        raise ValueError(f"tokens must be (B, N, D), got shape {tuple(tokens.shape)}: {_FLATTEN}")
    check_mask(mask, tokens.shape[:-1], tokens.device)
    # Summed in float32 at least: float16 ends at 65504, which the sum over a few thousand tokens reaches.
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    if mask is None:
        return (tokens.sum(1, dtype=dtype) / max(tokens.shape[1], 1)).to(tokens.dtype)
    total = zero_where_masked(tokens, mask).sum(1, dtype=dtype)
    return (total / mask.sum(1, keepdim=True).clamp_min(1)).to(tokens.dtype)


class SERFOperator(NamedTuple):
    """A refinement operator with what :class:`vqssl.SERFFusion` needs to call it.

    Attributes:
        function: ``(z_c, keys, mask) -> f``. The mask belongs to the tokens, and is None if all are valid.
        keys: ``"anchor"`` for the pooled anchor ``(B, D)``, ``"tokens"`` for the tokens of all scales ``(B, N, D)``.
        width: width of f in multiples of D.

    >>> OPERATORS["concat"].width
    2
    """

    function: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    keys: Literal["anchor", "tokens"]
    width: int = 1


OperatorName = Literal["spatial", "channel", "batch", "pooled", "concat"]
OPERATORS: dict[OperatorName, SERFOperator] = {
    "channel": SERFOperator(channel_attention, "anchor"),
    "batch": SERFOperator(batch_attention, "anchor"),
    "spatial": SERFOperator(spatial_attention, "tokens"),
    "pooled": SERFOperator(pooled_codes, "anchor"),
    "concat": SERFOperator(concatenation, "anchor", width=2),
}
"""The operators by name."""


def _check_pair(z_c: Tensor, z_q: Tensor) -> None:
    """Raise if the two are not floating tensors of one shape ``(B, D)`` on one device."""
    check_floating("z_c", z_c)
    check_floating("z_q", z_q)
    check_device("z_q", z_q, z_c.device, "z_c")
    if z_c.ndim != 2 or z_q.shape != z_c.shape:
        raise ValueError(
            f"z_c and z_q must both be (B, D), got {tuple(z_c.shape)} and {tuple(z_q.shape)}: "
            "average maps over their positions first, and project both to one width"
        )
