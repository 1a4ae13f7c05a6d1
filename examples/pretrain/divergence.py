"""Divergence: numbers that are not finite, found before they are written over a good checkpoint.

Training looks once an epoch, where the log reads figures anyway, and not after every step: a look waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Diverged(ArithmeticError):
    """Training or features have left the finite numbers."""


def check_losses(losses: Tensor, names: Sequence[str], *, of: str, advice: str) -> None:
    """Raise Diverged at the first step whose loss is not finite, and name the parts of the loss that are not.

    Args:
        losses: `(steps, 1 + parts)`, the loss first; averaged over the ranks, so that all of them raise alike.
        names: of the columns.
        of: what was trained, such as "byol, epoch 3".
        advice: what to try instead.
    """
    bad = (~torch.isfinite(losses[:, 0])).nonzero()
    if not len(bad):
        return
    step = int(bad[0])
    values = zip(names, losses[step].tolist(), strict=True)
    parts = ", ".join(f"{name} {value:g}" for name, value in values if not math.isfinite(value))
    raise Diverged(f"training diverged: the loss must be finite, got {parts} in {of}, step {step + 1}. {advice}")


def check_state(parts: dict[str, Any], *, of: str, advice: str) -> None:
    """Raise Diverged if a parameter, a buffer or an entry of an optimizer's state is not finite.

    Args:
        parts: modules and optimizers by name.
        of: as in :func:`check_losses`.
        advice: as in :func:`check_losses`.
    """
    found = [(name, tensor) for part, owner in parts.items() for name, tensor in _tensors(part, owner)]
    for name in not_finite(found):
        raise Diverged(
            f"training diverged: parameters, buffers and the optimizer's state must be finite, got others in {name} "
            f"after {of}. {advice}"
        )


def not_finite(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Return the names of those tensors that hold NaN or infinity; waits for the device once."""
    floats = [(name, tensor) for name, tensor in tensors if tensor.is_floating_point() or tensor.is_complex()]
    if not floats:
        return []
    device = floats[0][1].device
    fine = torch.stack([torch.isfinite(tensor.detach()).all().to(device) for _, tensor in floats]).tolist()
    return [name for (name, _), ok in zip(floats, fine, strict=True) if not ok]


def _tensors(part: str, owner: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(owner, nn.Module):
        yield from owner.named_parameters()
        yield from owner.named_buffers()
        return
    for group in owner.state.values():
        for name, value in group.items():
            if isinstance(value, Tensor):
                yield f"{part}'s {name}", value


def finite(values: Tensor, *, of: str) -> Tensor:
    """Return `values`, or raise Diverged if one is not finite: a score of such features would mean nothing."""
    if not torch.isfinite(values).all():
        share = 1 - torch.isfinite(values).float().mean().item()
        raise Diverged(f"{of} must be finite, got NaN or infinity in {share:.1%} of the values: the weights diverged")
    return values
