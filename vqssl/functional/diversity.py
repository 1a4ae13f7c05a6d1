"""The loss that keeps all codes in use, for quantisers that are trained by gradients."""

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from vqssl.checks import check_floating, check_mask
from vqssl.distributed import all_reduce_sum, rank_and_world_size

__all__ = ["DiversityForm", "diversity_loss"]

DiversityForm = Literal["entropy", "perplexity"]


def diversity_loss(
    logits: Tensor,
    mask: Tensor | None = None,
    *,
    form: DiversityForm = "entropy",
    process_group: ProcessGroup | None = None,
) -> Tensor:
    r"""Return how unevenly the tokens of a batch choose among codes: equation 4 of wav2vec 2.0, arXiv 2006.11477.

    .. math:: L = \frac{1}{G K} \sum_g - H(\bar p_g) \quad\text{or}\quad
        L = 1 - \frac{1}{G K} \sum_g \exp H(\bar p_g), \qquad
        \bar p_g = \frac{1}{N} \sum_i \mathrm{softmax}(x_{i g}), \qquad H(p) = - \sum_j p_j \ln p_j

    The first is the paper's equation; the second, by perplexity, is what fairseq's code computes, from 0 (even) to
    nearly 1. Both are smallest where the mean over tokens is even, and leave each token free to be sharp. Codebooks
    that follow the data by moving averages need neither: their revival keeps codes in use.

    Under ``torch.distributed`` the mean is that over the tokens of all ranks, by one all-reduce, and the loss is the
    same on all. Gradients are scaled so that their mean over ranks, which DDP takes, is that of the joined batch.

    Args:
        logits: x, ``(*batch, G, K)``, of G codebooks; for one write ``logits[..., None, :]``.
        mask: ``(*batch,)`` bool, True where a token counts; other tokens are ignored, even if NaN.
        form: ``"entropy"`` or ``"perplexity"``.
        process_group: the ranks that share the mean; None is the default group.

    Returns:
        Scalar, float32 (float64 for float64 logits). 0 where no token counts, with a gradient of zeros.

    Raises:
        TypeError: ``logits`` is not a floating tensor, or the mask is not boolean.
        ValueError: there are fewer than three axes, or the last two are empty; ``form`` is unknown; or shape or
            device of the mask differ.

    >>> import torch
    >>> even, uneven = torch.zeros(5, 1, 4), torch.tensor([9.0, 0.0, 0.0, 0.0]).expand(5, 1, 4)
    >>> diversity_loss(even, form="perplexity").item()
    0.0
    >>> round(diversity_loss(uneven, form="perplexity").item(), 2)
    0.75
    """
    check_floating("logits", logits)
    if logits.ndim < 3 or 0 in logits.shape[-2:]:  # (N, K) would pass for one token of N codebooks
        raise ValueError(
            "logits must be (*batch, G, K) with an axis of tokens, of codebooks and of codes, got shape "
            f"{tuple(logits.shape)}: for one codebook write logits[..., None, :]"
        )
    check_mask(mask, logits.shape[:-2], logits.device)
    if form not in get_args(DiversityForm):
        raise ValueError(f"form must be 'entropy' or 'perplexity', got {form!r}")
    groups, codes = logits.shape[-2:]
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).reshape(-1, groups, codes)
    counts = torch.ones_like(wide[:, 0, 0], dtype=torch.bool) if mask is None else mask.reshape(-1)
    # Before the softmax: a gradient of zero times a NaN would still be NaN.
    shares = torch.softmax(torch.where(counts[:, None, None], wide, 0.0), -1)
    own = torch.where(counts[:, None, None], shares, 0.0).sum(0)
    total, number = all_reduce_sum([own.detach(), counts.sum().to(own.dtype)], process_group)
    world_size = rank_and_world_size(process_group)[1]
    mean = (total + world_size * (own - own.detach())) / number.clamp_min(1)
    # At 0, where a share underflows, the gradient of an entropy is infinite.
    entropy = torch.special.entr(mean.clamp_min(torch.finfo(mean.dtype).tiny)).sum(-1)
    loss = -entropy.mean() / codes if form == "entropy" else 1 - entropy.exp().mean() / codes
    return torch.where(number > 0, loss, 0.0 * own.sum())
