"""Matched cells against a search over centres, against pixels that carry their own position, and against kornia."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vqssl.functional import Grid, canonical_cells, matched_cells

seeds = st.integers(0, 2**31 - 1)
IMAGE = (32, 24)


def crop_matrix(x, y, width, height, size, flip):
    """Return the matrix of a crop from corner (x, y), resized to `size` and flipped."""
    rows, columns = size
    a, b = columns / width, rows / height
    matrix = torch.tensor([[a, 0, a * (0.5 - x) - 0.5], [0, b, b * (0.5 - y) - 0.5], [0, 0, 1]], dtype=torch.float64)
    mirror = torch.tensor([[-1.0, 0, columns - 1], [0, 1, 0], [0, 0, 1]], dtype=torch.float64)
    return mirror @ matrix if flip else matrix


def draw(seed, views, size):
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(views):
        u = torch.rand(5, generator=generator).tolist()
        width, height = 8 + 16 * u[0], 8 + 24 * u[1]
        found.append(crop_matrix(u[2] * (24 - width), u[3] * (32 - height), width, height, size, u[4] < 0.5))
    return torch.stack(found)


@given(seed=seeds, cells=st.tuples(st.integers(1, 5), st.integers(1, 5)))
def test_every_cell_matches_itself_under_equal_crops(seed, cells):
    matrix, grid = draw(seed, 3, (20, 20)), Grid((20, 20), cells)
    expected = torch.arange(cells[0] * cells[1]).view(1, *cells).expand(3, *cells)
    assert torch.equal(matched_cells(matrix, matrix, grid, grid), expected)
    assert torch.equal(matched_cells(matrix.float(), matrix.float(), grid, grid), expected)


@given(seed=seeds)
def test_matched_cells_are_those_that_hold_the_centre(seed):
    view, target = Grid((20, 20), (4, 5)), Grid((12, 16), (3, 2))
    a, b = draw(seed, 2, view.image), draw(seed + 1, 2, target.image)
    found = matched_cells(a, b, view, target)
    for image in range(2):
        for row in range(4):
            for column in range(5):
                centre = torch.tensor([(column + 0.5) * 4 - 0.5, (row + 0.5) * 5 - 0.5, 1.0], dtype=torch.float64)
                x, y, _ = (b[image] @ torch.linalg.solve(a[image], centre)).tolist()
                expected = -1
                for r in range(3):
                    for c in range(2):
                        if r * 4 <= y + 0.5 < (r + 1) * 4 and c * 8 <= x + 0.5 < (c + 1) * 8:
                            expected = r * 2 + c
                assert found[image, row, column] == expected


@given(seed=seeds)
def test_matches_are_mutual_where_cells_have_one_size(seed):
    """A crop of the same scale, moved by whole cells."""
    generator = torch.Generator().manual_seed(seed)
    shift = torch.randint(-2, 3, (2,), generator=generator).tolist()
    a = crop_matrix(8.0, 8.0, 16, 16, (16, 16), False)[None]
    b = crop_matrix(8.0 + 4 * shift[0], 8.0 + 4 * shift[1], 16, 16, (16, 16), False)[None]
    grid = Grid((16, 16), (4, 4))
    there, back = matched_cells(a, b, grid, grid)[0].flatten(), matched_cells(b, a, grid, grid)[0].flatten()
    for cell, match in enumerate(there.tolist()):
        assert match == -1 or back[match] == cell
    assert (there >= 0).sum() == (4 - abs(shift[0])) * (4 - abs(shift[1]))


def test_cells_follow_the_pixels_of_kornia_crops_and_flips():
    K = pytest.importorskip("kornia.augmentation")
    size = 48
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    positions = torch.stack([x, y])[None].repeat(16, 1, 1, 1)  # each pixel holds where it is
    augment = K.AugmentationSequential(
        K.RandomResizedCrop((size, size), scale=(0.3, 1.0), p=1.0), K.RandomHorizontalFlip(p=0.5)
    )
    view = augment(positions)
    grid = Grid((size, size), (size, size))
    cells = canonical_cells(augment.transform_matrix, grid, Grid((64, 64), (64, 64)))
    inside = cells >= 0
    row, column = cells // 64, cells % 64
    # A pixel of the view lies within half a pixel of the position that it shows.
    assert inside.float().mean() > 0.95
    assert (view[:, 0] - column).abs()[inside].max() < 0.51
    assert (view[:, 1] - row).abs()[inside].max() < 0.51


@pytest.mark.parametrize(
    ("error", "says", "call"),
    [
        (ValueError, r"must be \(B, 3, 3\)", lambda e, g: matched_cells(e[0], e, g, g)),
        (ValueError, "one matrix for each image", lambda e, g: matched_cells(e, e[:1], g, g)),
        (TypeError, "floating", lambda e, g: canonical_cells(e.long(), g, g)),
        (
            ValueError,
            "each size of target must be at least 1",
            lambda e, g: matched_cells(e, e, g, Grid((4, 4), (0, 1))),
        ),
    ],
)
def test_refusals_name_the_rule(error, says, call):
    with pytest.raises(error, match=says):
        call(torch.eye(3).repeat(2, 1, 1), Grid((4, 4), (2, 2)))
