"""Centring of maps by place: what all images show at a place is subtracted from what this image shows there."""

from typing import TYPE_CHECKING

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from vqssl import kernels
from vqssl.checks import check_code_range, check_device, check_floating, check_indices, check_positive_int, check_range
from vqssl.distributed import Grouped, all_reduce_sum
from vqssl.foreign_keywords import names_foreign_keywords

__all__ = ["PlaceCentring"]


class PlaceCentring(Grouped, nn.Module):
    r"""A layer that subtracts from each feature the moving average of the features at the same place of the image.

    .. math:: h_p \leftarrow h_p - \frac{s_{c(p)}}{n_{c(p)}}, \qquad
        n_c \leftarrow m\, n_c + |P_c|, \qquad s_c \leftarrow m\, s_c + \sum_{p \in P_c} h_p

    Radiographs of one view are alike at equal places, so that the code of a place says little but where it is. Without
    the average of its place, it says what is unusual there. c(p) is the cell, of a grid over the whole image, that
    place p of a crop shows, from :func:`vqssl.functional.canonical_cells`.

    Args:
        in_channels: C, the channels of the map.
        num_cells: G, how many cells the grid has.
        momentum: m. An average is over some 1 / (1 - m) batches, weighed by how often they show the cell.
        process_group: the ranks that share the averages. None is the default group at the time of the call.

    Shape:
        A map ``(B, C, *spatial)`` and cells ``(B, *spatial)``; output a map of the same.

    State (buffers): ``counts`` ``(G,)`` and ``sums`` ``(G, C)``.

    Raises:
        TypeError: a size is not an int.
        ValueError: a size is below 1, or the momentum is not from 0 to 1.

    >>> import torch
    >>> centre = PlaceCentring(in_channels=1, num_cells=2)
    >>> maps, cells = torch.tensor([[[1.0, 10.0]], [[3.0, 30.0]]]), torch.tensor([[0, 1], [0, 1]])
    >>> centre(maps, cells).tolist()
    [[[-1.0, -10.0]], [[1.0, 10.0]]]
    """

    counts: Tensor
    sums: Tensor

    @names_foreign_keywords(
        {}, sizes_by_name="PlaceCentring(in_channels, num_cells, momentum=)", positional=2, what="options"
    )
    def __init__(
        self, in_channels: int, num_cells: int, *, momentum: float = 0.99, process_group: ProcessGroup | None = None
    ) -> None:
        super().__init__()
        check_positive_int("in_channels", in_channels)
        check_positive_int("num_cells", num_cells)
        check_range("momentum", momentum, 0, 1, rule="the share of the old sums that a step keeps")
        self.in_channels = in_channels
        self.num_cells = num_cells
        self.momentum = float(momentum)
        self.process_group = process_group
        self.register_buffer("counts", torch.zeros(num_cells))
        self.register_buffer("sums", torch.zeros(num_cells, in_channels))

    def forward(self, maps: Tensor, cells: Tensor) -> Tensor:
        """Subtract the averages, in training mode with this batch in them.

        Args:
            maps: ``(B, C, *spatial)``. Gradients pass to it, not to the averages.
            cells: ``(B, *spatial)`` integers from 0 to G - 1; -1 where a place shows none: it has no part in the
                averages and stays as it is.

        Returns:
            ``(B, C, *spatial)``. A place whose cell has not been seen yet stays as it is.

        Raises:
            TypeError: ``maps`` is not a floating or ``cells`` not an integer tensor.
            ValueError: shapes or devices do not fit, or (on a CPU) a cell is out of range.
        """
        self._check(maps, cells)
        tokens, flat = rearrange(maps, "b c ... -> b ... c"), cells.long()
        if self.training:
            self._update(tokens.detach().reshape(-1, self.in_channels), flat.reshape(-1))
        means = self.sums / torch.where(self.counts > 0, self.counts, 1.0)[:, None]
        there = torch.where((flat >= 0)[..., None], means[flat.clamp_min(0)], 0.0)
        return rearrange(tokens - there.to(tokens.dtype), "b ... c -> b c ...")

    @torch.no_grad()
    def _update(self, tokens: Tensor, cells: Tensor) -> None:
        finite = kernels.finite_rows(tokens)
        batch = kernels.code_sums(tokens, torch.where(finite, cells, -1), self.num_cells)
        counts, sums = all_reduce_sum(batch, self.process_group)
        self.counts.mul_(self.momentum).add_(counts)
        self.sums.mul_(self.momentum).add_(sums)

    def _check(self, maps: Tensor, cells: Tensor) -> None:
        check_floating("maps", maps)
        if maps.ndim < 2 or maps.shape[1] != self.in_channels:
            raise ValueError(
                f"maps must be (B, C, *spatial) with C = {self.in_channels}, got shape {tuple(maps.shape)}: build the "
                "module with the channels of the map"
            )
        check_indices("cells", cells)
        if cells.shape != maps.shape[:1] + maps.shape[2:]:
            raise ValueError(
                f"cells must have one entry for each place of the map, {tuple(maps.shape[:1] + maps.shape[2:])}, got "
                f"{tuple(cells.shape)}"
            )
        check_device("maps", maps, self.sums.device, "the averages")
        check_device("cells", cells, maps.device, "the map")
        if cells.device.type == "cpu":  # elsewhere it would synchronise
            check_code_range("cells", cells, self.num_cells)

    def extra_repr(self) -> str:
        """Return sizes and options, for ``repr``."""
        return f"in_channels={self.in_channels}, num_cells={self.num_cells}, momentum={self.momentum:g}"

    if TYPE_CHECKING:  # nn.Module's __call__ is Any to type checkers

        def __call__(self, maps: Tensor, cells: Tensor) -> Tensor:
            """Call :meth:`forward`."""
