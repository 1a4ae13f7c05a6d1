"""Cross-entropy between predicted codes and target codes."""

import torch
from torch import Tensor

from vqssl.checks import check_code_range, check_device, check_floating, check_indices

__all__ = ["code_cross_entropy"]


def code_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    r"""Return the cross-entropy of predicted codes: the loss of BoWNet, HuBERT, BEiT v2 and BEST-RQ.

    .. math:: L = - \frac{1}{|P|} \sum_{p \in P} \sum_j y_{p j} \ln \mathrm{softmax}_j (x_p)

    P are the rows that have a target: an index that is not -1, or a distribution that is not all zeros. For several
    codebooks give logits ``(*batch, G, K)`` and indices ``(*batch, G)``.

    Against a distribution the smallest value is its entropy. The gradient is that of the Kullback-Leibler divergence.

    Args:
        logits: x, ``(*batch, K)``.
        target: y: integers ``(*batch,)``, -1 where there is none; or floating ``(*batch, K)``, whose rows sum to 1 or
            are zeros. Gradients pass to it too, so detach it where they should not.

    Returns:
        Scalar, float32 (float64 for float64 input): the mean over the rows that have a target, in nats. 0 where none
        has, with a gradient of zeros.

    Raises:
        TypeError: ``logits`` is not a floating tensor, or the target is neither integer nor floating.
        ValueError: the shapes or the devices differ, or (on a CPU) an index is not from -1 to K - 1.

    >>> import torch
    >>> logits = torch.tensor([[2.0, 0.0], [0.0, 0.0], [5.0, 5.0]])
    >>> round(code_cross_entropy(logits, torch.tensor([0, 1, -1])).item(), 4)
    0.41
    >>> round(code_cross_entropy(logits, torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])).item(), 4)
    0.41
    """
    check_floating("logits", logits)
    if logits.ndim < 1 or logits.shape[-1] == 0:
        raise ValueError(f"logits must be (*batch, K) with at least one code, got shape {tuple(logits.shape)}")
    if isinstance(target, Tensor) and target.is_floating_point():
        return _against_distributions(logits, target)
    return _against_indices(logits, target)


def _against_indices(logits: Tensor, target: Tensor) -> Tensor:
    check_indices("target", target)
    _check_shapes(logits, target, logits.shape[:-1], "one index for each row of logits")
    if target.device.type == "cpu":  # elsewhere it would synchronise
        check_code_range("target", target, logits.shape[-1])
    has_target = target >= 0
    chosen = _log_shares(logits).gather(-1, target.clamp_min(0).long()[..., None])[..., 0]
    return _mean_over(-chosen, has_target)


def _against_distributions(logits: Tensor, target: Tensor) -> Tensor:
    _check_shapes(logits, target, logits.shape, "the shape of the logits")
    log_shares = _log_shares(logits)
    # xlogy's rule, 0 times infinity is 0: a share of 0 asks nothing of a logit of minus infinity.
    terms = torch.where(target != 0, target.to(log_shares.dtype) * log_shares, 0.0)
    return _mean_over(-terms.sum(-1), (target != 0).any(-1))


def _log_shares(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)


def _mean_over(values: Tensor, counted: Tensor) -> Tensor:
    return torch.where(counted, values, 0.0).sum() / counted.sum().clamp_min(1)


def _check_shapes(logits: Tensor, target: Tensor, expected: torch.Size, rule: str) -> None:
    if target.shape != expected:
        raise ValueError(
            f"target must have {rule}, {tuple(expected)}, got {tuple(target.shape)}: give indices (*batch,) or "
            f"distributions (*batch, K), for logits (*batch, K) of shape {tuple(logits.shape)}"
        )
    check_device("target", target, logits.device, "logits")
