"""Places that two views of an image share, from the matrices of the augmentations."""

from typing import NamedTuple

import torch
from torch import Tensor

from vqssl.checks import check_device, check_floating, check_positive_int

__all__ = ["Grid", "canonical_cells", "entries_at", "matched_cells"]


class Grid(NamedTuple):
    """A feature map laid over an image.

    Attributes:
        image: height and width of the image in pixels.
        cells: height and width of the map in cells.

    >>> Grid((224, 224), (14, 14)).cells
    (14, 14)
    """

    image: tuple[int, int]
    cells: tuple[int, int]


def matched_cells(to_view: Tensor, to_target: Tensor, view: Grid, target: Grid) -> Tensor:
    r"""Return, for each cell of a view's map, the cell of the target's map that shows the same place of the image.

    .. math:: u' = A_{target}\, A_{view}^{-1}\, u

    u is the centre of the cell in pixels of the view, and u' lies in the cell that is returned. With equal matrices and
    grids every cell matches itself.

    Args:
        to_view: :math:`A_{view}`, ``(B, 3, 3)``: pixel coordinates (x, y, 1) of the image to those of the view. The
            centre of the first pixel is (0, 0). kornia's ``augmentation.transform_matrix`` is such a matrix.
        to_target: :math:`A_{target}`, of the other view.
        view: size of the view and of its map.
        target: size of the other view and of its map.

    Returns:
        ``(B, *view.cells)`` int64: row times width plus column of the cell in the target's map; -1 where the target
        does not show the place.

    Raises:
        TypeError: a matrix is not a floating tensor.
        ValueError: a matrix is not ``(B, 3, 3)``, or the two differ in batch size or device; a size is below 1.

    >>> import torch
    >>> same = torch.eye(3)[None]
    >>> flipped = torch.tensor([[[-1.0, 0.0, 3.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]])
    >>> grid = Grid((4, 4), (1, 2))
    >>> matched_cells(same, same, grid, grid).tolist(), matched_cells(same, flipped, grid, grid).tolist()
    ([[[0, 1]]], [[[1, 0]]])
    """
    _check_matrices("to_view", to_view)
    _check_matrices("to_target", to_target)
    if to_view.shape != to_target.shape:
        raise ValueError(
            f"to_view and to_target must have one matrix for each image, got shapes {tuple(to_view.shape)} and "
            f"{tuple(to_target.shape)}: give the matrices of two views of the same images"
        )
    check_device("to_target", to_target, to_view.device, "to_view")
    from_view_to_target = to_target.double() @ torch.linalg.inv(to_view.double())
    return _cells_of(from_view_to_target, view, target)


def canonical_cells(to_view: Tensor, view: Grid, image: Grid) -> Tensor:
    """Return, for each cell of a view's map, the cell of a grid over the whole image that it shows.

    Args:
        to_view: ``(B, 3, 3)``, as in :func:`matched_cells`.
        view: size of the view and of its map.
        image: size of the image, and of the grid over it.

    Returns:
        ``(B, *view.cells)`` int64: row times width plus column in the grid; -1 outside the image.

    Raises:
        TypeError: the matrix is not a floating tensor.
        ValueError: it is not ``(B, 3, 3)``, or a size is below 1.

    >>> import torch
    >>> canonical_cells(torch.eye(3)[None], Grid((4, 4), (2, 2)), Grid((4, 4), (1, 2))).tolist()
    [[[0, 1], [0, 1]]]
    """
    _check_matrices("to_view", to_view)
    return _cells_of(torch.linalg.inv(to_view.double()), view, image)


def entries_at(maps: Tensor, cells: Tensor) -> Tensor:
    """Return the entries of maps at given cells.

    Args:
        maps: ``(B, *spatial, D)`` floating, or ``(B, *spatial)`` integers.
        cells: ``(B, *spatial_of_cells)`` integers of as many axes, from :func:`matched_cells`; -1 for none.

    Returns:
        ``(B, *spatial_of_cells)``, with the axis of D where maps have it; zeros, or -1, where there is no cell.

    >>> import torch
    >>> entries_at(torch.tensor([[5, 6, 7]]), torch.tensor([[2, -1]])).tolist()
    [[7, -1]]
    """
    width = maps.shape[cells.ndim :] if maps.is_floating_point() else ()
    entries = maps.reshape(len(maps), -1, *width)
    flat = cells.flatten(1).long()
    chosen = entries[torch.arange(len(entries), device=entries.device)[:, None], flat.clamp_min(0)]
    there = flat >= 0
    if width:
        return torch.where(there[..., None], chosen, 0.0).unflatten(1, cells.shape[1:])
    return torch.where(there, chosen, -1).unflatten(1, cells.shape[1:])


def _cells_of(matrix: Tensor, source: Grid, target: Grid) -> Tensor:
    """Return which of the target's cells holds the image of each centre of the source's cells."""
    for name, grid in (("view", source), ("target", target)):
        for size in (*grid.image, *grid.cells):
            check_positive_int(f"each size of {name}", size)
    y, x = (
        (torch.arange(cells, device=matrix.device, dtype=matrix.dtype) + 0.5) * (size / cells) - 0.5
        for size, cells in zip(source.image, source.cells, strict=True)
    )
    centres = torch.stack(torch.broadcast_tensors(x, y[:, None], torch.ones_like(x)), -1)
    moved = torch.einsum("bij,hwj->bhwi", matrix, centres)
    column, row = (
        torch.floor((moved[..., axis] / moved[..., 2] + 0.5) * (cells / size)).long()
        for axis, size, cells in ((0, target.image[1], target.cells[1]), (1, target.image[0], target.cells[0]))
    )
    height, width = target.cells
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    return torch.where(inside, row * width + column, -1)


def _check_matrices(name: str, matrix: Tensor) -> None:
    check_floating(name, matrix)
    if matrix.ndim != 3 or matrix.shape[1:] != (3, 3):
        raise ValueError(f"{name} must be (B, 3, 3), got shape {tuple(matrix.shape)}: give one matrix for each image")
