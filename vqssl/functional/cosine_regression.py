"""BYOL's cosine regression, Eq. 7 of DiSSECT."""

import torch
from torch import Tensor

from vqssl.checks import check_alike
from vqssl.functional.vectors import unit

__all__ = ["cosine_regression_loss"]


def cosine_regression_loss(prediction: Tensor, target: Tensor) -> Tensor:
    r"""Return the squared distance between directions: equation 2 of BYOL (arXiv 2006.07733), 7 of DiSSECT.

    .. math:: L(p, t) = 2 - 2 \cdot \left\langle \frac{p}{\lVert p \rVert}, \frac{t}{\lVert t \rVert} \right\rangle

    Args:
        prediction: ``(*batch, D)``.
        target: ``(*batch, D)``; gradients pass to it too, so detach it where they should not.

    Returns:
        Scalar, float32 (float64 for float64 input): the mean over the batch, 0 (same direction) to 4 (opposite).

    Raises:
        TypeError: an input is not a floating tensor.
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
