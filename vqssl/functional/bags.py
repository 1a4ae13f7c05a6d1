"""Bags of codes: which codes a view shows, and how often, without their places."""

from typing import Literal, get_args

import torch
from torch import Tensor

from vqssl.checks import (
    check_code_range,
    check_device,
    check_floating,
    check_indices,
    check_mask,
    check_positive_int,
    check_range,
)
from vqssl.functional.autocast import without_autocast

__all__ = ["BagReduction", "bag_of_codes", "soft_codes"]

BagReduction = Literal["mean", "max"]


def bag_of_codes(
    indices: Tensor, codebook_size: int, mask: Tensor | None = None, reduction: BagReduction = "mean"
) -> Tensor:
    r"""Return the distribution of codes over the places of each view: the bag of words of BoWNet, arXiv 2002.12247.

    .. math:: y_j = \frac{1}{|P|} \sum_{p \in P} a_{p j} \quad\text{or}\quad
        y_j = \frac{\max_{p \in P} a_{p j}}{\sum_l \max_{p \in P} a_{p l}}

    P are the places that count. The code of a place is one index, so that :math:`a_p` is one-hot, or a distribution
    over codes (:func:`soft_codes`). "mean" counts how often a code occurs; "max" (OBoW, arXiv 2012.11552) says whether
    it does.

    Args:
        indices: ``(B, *places)`` integers, -1 where a place has no code; or floating, ``(B, *places, K)``, the share of
            each code at each place.
        codebook_size: K.
        mask: ``(B, *places)`` bool, True where a place counts.
        reduction: ``"mean"`` or ``"max"``.

    Returns:
        ``(B, K)`` float32 (float64 for float64 input), rows sum to 1. A view without any place that counts gives zeros,
        which :func:`code_cross_entropy` leaves out. Of floating input, with its gradient.

    Raises:
        TypeError: ``indices`` is neither an integer nor a floating tensor, or the mask is not boolean.
        ValueError: there is no axis of places, an index is not from -1 to K - 1 (checked on a CPU), K or the reduction
            is out of range, or shapes or devices differ.

    >>> import torch
    >>> bag_of_codes(torch.tensor([[0, 2, 2, -1]]), 3, torch.tensor([[True, True, True, True]])).tolist()
    [[0.3333333432674408, 0.0, 0.6666666865348816]]
    >>> bag_of_codes(torch.tensor([[0, 2, 2, -1]]), 3, reduction="max").tolist()
    [[0.5, 0.0, 0.5]]
    """
    check_positive_int("codebook_size", codebook_size)
    if reduction not in get_args(BagReduction):
        raise ValueError(f"reduction must be 'mean' or 'max', got {reduction!r}")
    if isinstance(indices, Tensor) and indices.is_floating_point():
        weights = _weights_of_shares(indices, codebook_size, mask, reduction)
    else:
        counts = _counts(indices, codebook_size, mask)
        weights = counts if reduction == "mean" else (counts > 0).to(counts.dtype)
    total = weights.sum(-1, keepdim=True)
    return weights / torch.where(total > 0, total, 1.0)


def _counts(indices: Tensor, codebook_size: int, mask: Tensor | None) -> Tensor:
    """Return how many places of each view have each code, ``(B, K)`` float32."""
    check_indices("indices", indices)
    _check_places("indices", indices, indices.ndim, mask)
    if indices.device.type == "cpu":  # elsewhere it would synchronise
        check_code_range("indices", indices, codebook_size)
    flat = indices.flatten(1).long()
    counted = flat >= 0 if mask is None else (flat >= 0) & mask.flatten(1)
    # One axis, and one row more for places that do not count: on a GPU, sums along one axis are deterministic.
    rows = torch.arange(len(flat), device=flat.device)[:, None]
    slot = torch.where(counted, rows * codebook_size + flat, len(flat) * codebook_size).flatten()
    counts = torch.zeros(len(flat) * codebook_size + 1, device=flat.device)
    counts = counts.scatter_add(0, slot, torch.ones_like(slot, dtype=counts.dtype))
    return counts[:-1].view(len(flat), codebook_size)


def _weights_of_shares(shares: Tensor, codebook_size: int, mask: Tensor | None, reduction: BagReduction) -> Tensor:
    """Return the sum or the maximum over the places of each view, ``(B, K)``."""
    if shares.shape[-1:] != (codebook_size,):
        raise ValueError(
            f"indices, where they are floating, must be shares (B, *places, K) with K = {codebook_size}, got shape "
            f"{tuple(shares.shape)}: write indices.long() for code numbers"
        )
    _check_places("indices", shares, shares.ndim - 1, mask)
    wide = shares.flatten(1, -2).to(torch.promote_types(shares.dtype, torch.float32))
    if mask is not None:
        wide = torch.where(mask.flatten(1)[..., None], wide, 0.0)
    if reduction == "mean" or wide.shape[1] == 0:
        return wide.sum(1)
    return wide.amax(1)


def _check_places(name: str, x: Tensor, ndim: int, mask: Tensor | None) -> None:
    if ndim < 2:
        raise ValueError(
            f"{name} must have a view on the first axis and its places on the others, got shape {tuple(x.shape)}: "
            f"write {name}[None] for one view"
        )
    check_mask(mask, x.shape[:ndim], x.device)


def soft_codes(tokens: Tensor, codes: Tensor, sharpness: float | Tensor) -> Tensor:
    r"""Return how much of each code a token is: the soft assignment of OBoW, arXiv 2012.11552.

    .. math:: a_j = \mathrm{softmax}_j \big( -\kappa \lVert z - e_j \rVert^2 \big)

    As the sharpness grows, ``a`` becomes the one-hot vector of the nearest code. OBoW divides its sharpness, 10, by the
    running mean of the smallest squared distance, so that it fits tokens of any scale.

    Args:
        tokens: z, ``(*batch, D)``.
        codes: ``(K, D)``.
        sharpness: kappa, in 1 over the unit of squared distance, at least 0: a number or a scalar tensor.

    Returns:
        ``(*batch, K)`` float32 (float64 for float64 input), rows sum to 1. Gradients pass to all three. A token that is
        not finite gives NaN.

    Raises:
        TypeError: tokens or codes are not floating tensors.
        ValueError: the widths or devices differ, or the sharpness is negative.

    >>> import torch
    >>> soft_codes(torch.tensor([0.0]), torch.tensor([[0.0], [1.0]]), 2.0).tolist()
    [0.8807970285415649, 0.11920291185379028]
    """
    check_floating("tokens", tokens)
    check_floating("codes", codes)
    if codes.ndim != 2 or tokens.ndim < 1 or tokens.shape[-1] != codes.shape[1]:
        raise ValueError(
            f"tokens must be (*batch, D) and codes (K, D), of one width D, got shapes {tuple(tokens.shape)} and "
            f"{tuple(codes.shape)}"
        )
    check_device("codes", codes, tokens.device, "tokens")
    if not isinstance(sharpness, Tensor):
        check_range("sharpness", sharpness, 0, float("inf"))
    dtype = torch.promote_types(torch.promote_types(tokens.dtype, codes.dtype), torch.float32)
    # Centred, so that nothing cancels where all tokens share a large mean. |z|^2, the same for all codes, is left out.
    centre = codes.detach().to(dtype).mean(0)
    z, e = tokens.to(dtype) - centre, codes.to(dtype) - centre
    with without_autocast(tokens):
        scores = 2 * z @ e.mT - e.square().sum(-1)
    return torch.softmax(sharpness * scores, -1)
