"""Centring of targets: what all views share is subtracted, so that directions and logits tell views apart."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from vqssl.checks import check_floating, check_one_a_scale, check_positive_int, check_range
from vqssl.distributed import Grouped, all_reduce_sum
from vqssl.foreign_keywords import names_foreign_keywords

__all__ = ["CentringName", "TargetCentring"]

CentringName = Literal["batch", "running"]


class TargetCentring(Grouped, nn.Module):
    r"""A layer that subtracts from each target the mean of all views, over the ranks, or its moving average.

    .. math:: t \leftarrow t - c, \qquad c = \frac{1}{|V|} \sum_{v \in V} t_v \quad\text{or}\quad
        c \leftarrow m\, c + (1 - m)\, \frac{1}{|V|} \sum_{v \in V} t_v

    Targets of all zeros stand for views without one: they stay zero and have no part in the mean. DINO (arXiv
    2104.14294) centres its targets by a moving average.

    Args:
        widths: of the targets, one number a scale.
        how: ``"batch"``, the mean over the batch; or ``"running"``, its moving average, for small batches. In training
            mode a call moves it, in eval mode it stays.
        momentum: m, of the moving average. The first batch sets it.
        process_group: the ranks that share the mean. None is the default group at the time of the call.

    Shape:
        A sequence of S tensors ``(*batch, width_s)``, which may differ in batch; output a list of the same.

    Raises:
        TypeError: ``widths`` is not a sequence of ints, or ``momentum`` is not a number.
        ValueError: a width is below 1, ``how`` is unknown, or the momentum is not from 0 to 1.

    >>> import torch
    >>> TargetCentring([1])([torch.tensor([[1.0], [5.0], [0.0]])])[0].tolist()
    [[-2.0], [2.0], [0.0]]
    """

    centre: Tensor
    num_updates: Tensor

    @names_foreign_keywords({}, sizes_by_name="TargetCentring(widths, momentum=)", positional=1, what="options")
    def __init__(
        self,
        widths: Sequence[int],
        *,
        how: CentringName = "batch",
        momentum: float = 0.9,
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        for width in widths:
            check_positive_int("each of widths", width)
        if how not in get_args(CentringName):
            raise ValueError(f"centring must be 'batch' or 'running', got {how!r}")
        check_range("momentum", momentum, 0, 1, rule="the share of the old mean that a step keeps")
        self.widths = tuple(widths)
        self.how = how
        self.momentum = float(momentum)
        self.process_group = process_group
        self.register_buffer("centre", torch.zeros(sum(widths)))
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def forward(self, targets: Sequence[Tensor]) -> list[Tensor]:
        """Return the centred targets, without a gradient.

        Raises:
            TypeError: a target is not a floating tensor.
            ValueError: another number of targets than widths, or another width.
        """
        check_one_a_scale("targets", targets, len(self.widths))
        for scale, (target, width) in enumerate(zip(targets, self.widths, strict=True)):
            check_floating(f"targets[{scale}]", target)
            if target.shape[-1:] != (width,):
                raise ValueError(f"targets[{scale}] must be (*batch, {width}), got shape {tuple(target.shape)}")
        rows = [target.flatten(0, -2) for target in targets]
        present = [(row != 0).any(-1, keepdim=True) for row in rows]
        centres = self._mean(rows, present) if self.how == "batch" or self.training else self.centre
        if self.how == "running" and self.training:
            weight = torch.where(self.num_updates > 0, 1 - self.momentum, 1.0)
            centres = self.centre.lerp_(centres.to(self.centre.dtype), weight)
            self.num_updates.add_(1)
        return [
            torch.where(here, row - centre.to(row.dtype), 0.0).view(target.shape)
            for row, here, centre, target in zip(rows, present, centres.split(self.widths), targets, strict=True)
        ]

    def _mean(self, rows: list[Tensor], present: list[Tensor]) -> Tensor:
        """Return the mean of each target over all ranks, ``(sum of widths,)``, in one all-reduce."""
        # In float32 at least: half precision ends at 65504, which a sum over a batch may pass.
        dtype = torch.promote_types(rows[0].dtype, torch.float32)
        sums = [torch.where(here, row, 0.0).sum(0, dtype=dtype) for row, here in zip(rows, present, strict=True)]
        counts = [here.sum().to(dtype) for here in present]
        reduced = all_reduce_sum([*sums, *counts], self.process_group)
        totals, numbers = reduced[: len(rows)], reduced[len(rows) :]
        return torch.cat([total / number.clamp_min(1) for total, number in zip(totals, numbers, strict=True)])

    def extra_repr(self) -> str:
        """Return sizes and options, for ``repr``."""
        momentum = f", momentum={self.momentum:g}" if self.how == "running" else ""
        return f"widths={list(self.widths)}, how={self.how!r}{momentum}"

    if TYPE_CHECKING:  # nn.Module's __call__ is Any to type checkers

        def __call__(self, targets: Sequence[Tensor]) -> list[Tensor]:
            """Call :meth:`forward`."""
