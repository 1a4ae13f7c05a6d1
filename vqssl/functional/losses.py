"""The two losses of the method: commitment (Eq. 5) and cosine regression (Eq. 7)."""

import torch
from torch import Tensor

from vqssl.checks import check_alike, check_mask
from vqssl.functional.vectors import unit

__all__ = ["commitment_loss", "cosine_regression_loss"]


def commitment_loss(x: Tensor, quantized: Tensor, mask: Tensor | None = None, weight: float = 0.25) -> Tensor:
    r"""How far tokens are from their codes, Eq. 5 of DiSSECT (arXiv 2509.18765) and of VQ-VAE (arXiv 1711.00937).

    .. math:: L = \beta \cdot \mathrm{mean}\, (z - \mathrm{sg}[q])^2

    Args:
        x: tokens ``(*batch, D)``.
        quantized: their codes, of the same shape; no gradient passes to them.
        mask: ``(*batch,)`` bool, True where a token counts; what stands elsewhere, NaN included, does not matter.
        weight: beta.

    Returns:
        Scalar, float32 (float64 for float64 tokens): the mean over the elements that count. 0 where none does, and
        then with a gradient of zeros.

    Raises:
        TypeError: an input is no floating tensor, or the mask is not boolean.
        ValueError: the shapes or the devices differ.

    >>> import torch
    >>> commitment_loss(torch.tensor([[1.0, 3.0], [9.0, 9.0]]), torch.zeros(2, 2), torch.tensor([True, False])).item()
    1.25
    """
    cure = "look the codes up with the indices of these very tokens"
    several = "call it once for each pair and add the results, torch.stack(losses).sum()"
    check_alike("x", x, "quantized", quantized, cure, several)
    check_mask(mask, x.shape[:-1], x.device)
    dtype = torch.promote_types(x.dtype, torch.float32)
    difference = x.to(dtype) - quantized.detach().to(dtype)
    if mask is None:
        count = difference.new_tensor(max(difference.numel(), 1))
    else:
        difference = torch.where(mask[..., None], difference, 0.0)
        count = (mask.sum() * x.shape[-1]).clamp_min(1)
    return weight * difference.square().sum() / count


def cosine_regression_loss(prediction: Tensor, target: Tensor) -> Tensor:
    r"""BYOL's regression (arXiv 2006.07733, Eq. 2), Eq. 7 of DiSSECT: the squared distance of unit vectors.

    .. math:: L(p, t) = 2 - 2 \cdot \left\langle \frac{p}{\lVert p \rVert}, \frac{t}{\lVert t \rVert} \right\rangle

    Args:
        prediction: ``(*batch, D)``.
        target: ``(*batch, D)``; gradients pass to it too, so detach it where they should not.

    Returns:
        Scalar, float32 (float64 for float64 input): the mean over the batch, 0 (same direction) to 4 (opposite).

    Raises:
        TypeError: an input is no floating tensor.
        ValueError: the shapes or the devices differ, or the batch is empty.

    >>> import torch
    >>> cosine_regression_loss(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 3.0]])).item()
    2.0
    """
    cure = "give both heads the same output width and both views the same images"
    several = (
        "of a student that returns (z, maps), write student(view)[0]; for several pairs call it once for each, and "
        "write torch.stack(losses).mean()"
    )
    check_alike("prediction", prediction, "target", target, cure, several)
    if prediction.ndim < 1:
        raise ValueError("prediction and target must both be (*batch, D), got single numbers: give the embeddings")
    if prediction.numel() == 0:
        raise ValueError(
            f"cosine_regression_loss needs at least one pair, got shape {tuple(prediction.shape)}: skip an empty batch"
        )
    dtype = torch.promote_types(torch.promote_types(prediction.dtype, target.dtype), torch.float32)
    p, t = unit(prediction.to(dtype)), unit(target.to(dtype))
    return 2 - 2 * (p * t).sum(-1).mean()
