"""The first look at the scores of a tile, and the candidates that it leaves.

Columns of scores come in *groups* of 64. The maximum of each group is computed first (the *peaks*), because a maximum
over 64 contiguous numbers takes a tenth of the time of ``torch.argmax``. Of the scores themselves only one group of
each row is kept, the one with the highest peak (the *members*): with the peaks it tells whether the best is alone.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vqssl.kernels.nearest.prepare import GROUP
from vqssl.kernels.workspace import Workspace

__all__ = ["OPEN", "Summary", "candidates", "lone_winners", "summarize"]

OPEN = -2
"""Stands for the index of a token that the scores do not decide."""


class Summary(NamedTuple):
    """What is kept of the scores ``(R, K')`` of R tokens."""

    length: Tensor
    """``(R,)``: the tokens' lengths."""
    peaks: Tensor
    """``(R, K' / 64)``: the best score of each group."""
    best: Tensor
    """``(R,)``: the best score."""
    group: Tensor
    """``(R,)`` int64: the first group that has it."""
    members: Tensor
    """``(R, 64)``: the scores of that group."""

    @classmethod
    def empty(cls, rows: int, groups: int, like: Tensor, memory: Workspace) -> "Summary":
        """Return memory for ``rows`` tokens."""
        dtype, device = like.dtype, like.device
        vectors = memory.empty("length and best", dtype, device, 2, rows)
        peaks = memory.empty("peaks", dtype, device, rows, groups)
        members = memory.empty("members", dtype, device, rows, GROUP)
        return cls(vectors[0], peaks, vectors[1], memory.empty("group", torch.int64, device, rows), members)

    def rows(self, start: int, stop: int) -> "Summary":
        """Return the summary of some of the tokens."""
        return Summary(*(entry[start:stop] for entry in self))


def summarize(scores: Tensor, first: int, summary: Summary) -> None:
    """Take the scores ``(R, B)`` of a block of codes into the summary.

    Args:
        scores: of the block.
        first: the block's first group; blocks come in order, beginning with 0.
        summary: of the same rows; overwritten by the first block.
    """
    grouped = scores.view(len(scores), -1, GROUP)
    rows, groups = grouped.shape[:2]
    peaks = torch.amax(grouped, -1, out=summary.peaks[:, first : first + groups])
    if first == 0:
        torch.max(peaks, 1, out=(summary.best, summary.group))
        chosen = summary.group + torch.arange(0, rows * groups, groups, device=scores.device)
        torch.index_select(grouped.view(-1, GROUP), 0, chosen, out=summary.members)
        return
    best, group = peaks.max(1)
    row = (best > summary.best).nonzero().squeeze(1)
    group = group[row]
    summary.best[row] = best[row]
    summary.group[row] = group + first
    summary.members[row] = grouped[row, group]


def lone_winners(summary: Summary, threshold: Tensor) -> Tensor:
    """Return the place of the only score of each row that reaches its threshold, OPEN where several or none do.

    Args:
        summary: of the scores; its peaks and members are overwritten.
        threshold: ``(R,)``; nothing reaches a NaN.
    """
    column = torch.arange(GROUP, device=threshold.device)
    # (2, 64): the rows 1, 1, 1... and 0, 1, 2... count and locate in one small product.
    count_and_place = torch.stack([torch.ones_like(column), column]).to(threshold.dtype)
    close, place = count_and_place @ summary.members.ge_(threshold[:, None]).T
    close_groups = summary.peaks.ge_(threshold[:, None]).sum(1)
    alone = (close == 1) & (close_groups == 1)
    return torch.where(alone, place.long().add_(summary.group, alpha=GROUP), OPEN)


def candidates(scores: Tensor, threshold: Tensor, count: int, few: int | None) -> tuple[Tensor, Tensor]:
    """Return P pairs of a row and a code whose score reaches the threshold, without rows that have more than a few.

    Args:
        scores: ``(R, K')``.
        threshold: ``(R,)``; NaN excludes no code.
        count: K, the number of codes.
        few: most candidates of a row; None for any number.

    Returns:
        Rows ``(P,)``, ascending, and codes ``(P,)``, int64.
    """
    grouped = scores.view(len(scores), -1, GROUP)
    close_groups = ~(grouped.amax(-1) < threshold[:, None])
    if few is not None:
        close_groups &= (close_groups.sum(1) <= few)[:, None]
    row, group = close_groups.nonzero().unbind(1)
    members = grouped.view(-1, GROUP)[row * grouped.shape[1] + group]
    close, column = (~(members < threshold[row, None])).nonzero().unbind(1)
    row, code = row[close], group[close] * GROUP + column
    kept = code < count
    if few is not None:
        kept &= (torch.bincount(row, minlength=len(scores)) <= few)[row]
    return row[kept], code[kept]
