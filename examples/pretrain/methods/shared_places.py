"""Places as cells of maps: the averages of each place of the whole image, and the places that two crops share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

import vqssl
from vqssl.functional import Grid, canonical_cells, matched_cells


def size_of(maps: Tensor) -> tuple[int, int]:
    """Return the height and the width of images or maps `(B, C, H, W)`."""
    return maps.shape[-2], maps.shape[-1]


def grid_of(images: Tensor, maps: Tensor) -> Grid:
    """Return the grid of maps `(B, C, H, W)` over the images `(B, C, S, S)` that they are computed from."""
    return Grid(size_of(images), size_of(maps))


def shared_cells(first: Tensor, second: Tensor, grid: Grid) -> Tensor:
    """Return the cell of the other crop for each cell of both: `(2 B, H, W)`, -1 where the other shows no such place.

    Args:
        first: matrices `(B, 3, 3)` from pixels of the images to those of the first crop.
        second: the same of the second crop.
        grid: of the maps of both.
    """
    return torch.cat([matched_cells(first, second, grid, grid), matched_cells(second, first, grid, grid)])


class CentredMaps(nn.ModuleList):
    """Maps of several scales, minus the running average of each place of the whole image (`vqssl.PlaceCentring`).

    Args:
        channels: of each scale.
        side: cells along each side of the grid of places.
    """

    def __init__(self, channels: Sequence[int], side: int) -> None:
        super().__init__(vqssl.PlaceCentring(each, side**2) for each in channels)
        self.places = (side, side)

    def forward(self, maps: Sequence[Tensor], views: Tensor, to_view: Tensor) -> list[Tensor]:
        """Return the centred maps of views.

        Args:
            maps: `(V, C, H, W)`, one a scale.
            views: images of the size of the views.
            to_view: matrices `(V, 3, 3)` from pixels of the whole images to those of each view.
        """
        whole = Grid(size_of(views), self.places)
        cells = [canonical_cells(to_view, grid_of(views, each), whole) for each in maps]
        return [centre(each, where) for centre, each, where in zip(self, maps, cells, strict=True)]
