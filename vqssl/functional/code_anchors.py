"""Quantised anchors: what a view shows, as the average of its codes."""

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from vqssl.checks import check_alike, check_floating, check_indices
from vqssl.functional.serf_operators import masked_mean
from vqssl.functional.vectors import unit

__all__ = ["anchor_loss", "code_anchor"]


def code_anchor(quantized: Tensor, indices: Tensor) -> Tensor:
    r"""Return the layer-normed average of the codes of each view.

    .. math:: t = \mathrm{LN}\Big(\frac{1}{|P|} \sum_{p \in P} q_p\Big)

    P are the places that have a code. What all images share is most of such an average, so subtract the mean over the
    batch before comparing directions; :class:`vqssl.CodePrediction` does.

    Args:
        quantized: q, ``(B, *places, D)``.
        indices: ``(B, *places)`` integers, -1 where a place has no code.

    Returns:
        t, ``(B, D)`` in the dtype of ``quantized``; zeros for a view without any code.

    Raises:
        TypeError: ``quantized`` is not floating, or the indices are not integers.
        ValueError: shapes or devices do not fit.

    >>> import torch
    >>> code_anchor(torch.tensor([[[1.0, 3.0], [0.0, 0.0]]]), torch.tensor([[4, -1]])).round(decimals=3).tolist()
    [[-1.0, 1.0]]
    """
    check_floating("quantized", quantized)
    if quantized.ndim < 3:
        raise ValueError(
            f"quantized must be (B, *places, D), got shape {tuple(quantized.shape)}: write quantized[None] for one view"
        )
    check_indices("indices", indices, quantized.shape[:-1], quantized.device)
    mean = masked_mean(quantized.flatten(1, -2), (indices >= 0).flatten(1))
    return layer_norm(mean, mean.shape[-1:])


def anchor_loss(prediction: Tensor, target: Tensor) -> Tensor:
    r"""Return the cosine regression loss over views that have a target: :func:`cosine_regression_loss` with gaps.

    .. math:: L = \frac{1}{|V|} \sum_{v \in V} \big( 2 - 2 \cos(p_v, t_v) \big), \qquad V = \{v : t_v \neq 0\}

    Args:
        prediction: p, ``(*batch, D)``.
        target: t, ``(*batch, D)``; zeros where there is none. Gradients pass to it too.

    Returns:
        Scalar, float32 (float64 for float64 input), 0 to 4. 0 where no view has a target.

    Raises:
        TypeError: an input is not a floating tensor.
        ValueError: the shapes or the devices differ.

    >>> import torch
    >>> anchor_loss(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.0, 2.0], [0.0, 0.0]])).item()
    2.0
    """
    check_alike("prediction", prediction, "target", target, "give the head the width of the target")
    dtype = torch.promote_types(torch.promote_types(prediction.dtype, target.dtype), torch.float32)
    cosines = (unit(prediction.to(dtype)) * unit(target.to(dtype))).sum(-1)
    counted = (target != 0).any(-1)
    return torch.where(counted, 2 - 2 * cosines, 0.0).sum() / counted.sum().clamp_min(1)
