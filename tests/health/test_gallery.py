"""Patches of each code: where they come from, at edges and for any grid; and the picture of them."""

import pytest
import torch

from vqssl.health import code_patches, draw_codes


def painted(batch=3, cells=(4, 5), pixels=6, channels=1):
    """Return images of which each cell has the value of its code, and the codes."""
    indices = torch.randint(0, 7, (batch, *cells), generator=torch.Generator().manual_seed(0))
    indices[0, 0, 0] = indices[2, 3, 4] = 6  # two corners
    images = indices[:, None].float().repeat_interleave(pixels, 2).repeat_interleave(pixels, 3)
    return images.expand(-1, channels, -1, -1), indices


@pytest.mark.parametrize("code", range(7))
@pytest.mark.parametrize("channels", [1, 3])
def test_patches_show_the_places_of_their_code_alone(code, channels):
    images, indices = painted(channels=channels)
    patches = code_patches(images, indices, code, count=100)
    assert patches.shape == ((indices == code).sum(), channels, 6, 6)
    assert (patches == code).all()


def test_patches_are_those_of_a_loop():
    """Of any size, also odd ones and beyond the edge, where the outermost pixels are repeated."""
    images, indices = torch.rand(2, 1, 12, 15), torch.randint(0, 3, (2, 3, 5))
    for size in (1, 4, 5, 11):
        found = code_patches(images, indices, 1, count=1000, size=size)
        expected = []
        for b, i, j in (indices == 1).nonzero().tolist():
            top, left = round((i + 0.5) * 4 - size / 2), round((j + 0.5) * 3 - size / 2)
            rows = [min(max(top + k, 0), 11) for k in range(size)]
            columns = [min(max(left + k, 0), 14) for k in range(size)]
            expected.append(images[b][:, rows][:, :, columns])
        assert found.equal(torch.stack(expected))


def test_patches_are_spread_over_all_places():
    images = torch.arange(10.0).reshape(10, 1, 1, 1).expand(-1, -1, 4, 4)
    indices = torch.zeros(10, 2, 2, dtype=torch.long)
    values = code_patches(images, indices, 0, count=4)[:, 0, 0, 0].tolist()
    assert values == [0, 3, 6, 9]
    assert code_patches(images, indices, 1).shape == (0, 1, 2, 2)


def test_masked_places_belong_to_no_code():
    images, indices = painted()
    indices[:] = -1
    assert len(code_patches(images, indices, 0)) == 0
    with pytest.raises(ValueError, match="indices must hold a code, got -1 alone"):
        draw_codes(images, indices, "codes.png")


def test_picture_has_a_row_for_each_code_most_used_first(tmp_path):
    images, indices = painted()
    drawn = draw_codes(images, indices, tmp_path / "codes.png", count=3)
    counts = torch.bincount(indices.flatten(), minlength=7)
    assert [counts[code].item() for code in drawn] == sorted(counts.tolist(), reverse=True)
    assert (tmp_path / "codes.png").stat().st_size > 1000
    assert draw_codes(images, indices, tmp_path / "some.svg", codes=[6, 40], size=9) == (6, 40)
    draw_codes(torch.zeros(3, 3, 24, 30), indices, tmp_path / "constant.pdf", title="100$ of $codes")


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"images": torch.rand(3, 2, 24, 30)}, ValueError, "one channel or three, got 2"),
        ({"images": torch.rand(2, 1, 24, 30)}, ValueError, "of the same images"),
        (
            {"indices": torch.zeros(3, 4, 5, 2, dtype=torch.long)},
            ValueError,
            r"give one level or group, indices\[\.\.\., 0\]",
        ),
        ({"indices": torch.rand(3, 4, 5)}, TypeError, "integer tensor"),
        ({"images": torch.rand(3, 1, 24, 30).numpy()}, TypeError, r"write torch\.as_tensor\(images\)"),
        ({"images": torch.rand(3, 24, 30)}, ValueError, r"give images\[:, None\] of grey images"),
        ({"images": torch.rand(24, 30)}, ValueError, r"give images\[None, None\]"),
        ({"indices": torch.zeros(3, 20, dtype=torch.long)}, ValueError, r"give indices\.unflatten\(1, \(h, w\)\)"),
        ({"indices": torch.zeros(3, 0, 5, dtype=torch.long)}, ValueError, "at least one place in each of the 3 images"),
        ({"codes": []}, ValueError, r"one or more numbers of codes, from 0, got \[\]"),
        ({"codes": [0, -1]}, ValueError, r"from 0, got \[0, -1\]: leave it out"),
        ({"codes": torch.tensor([1])}, TypeError, r"write codes\.tolist\(\)"),
        ({"codes": 3}, TypeError, r"got int: write codes=\[0, 1\]"),
        ({"path": "codes.unknown"}, ValueError, "must end in a format that matplotlib writes"),
        ({"count": 0}, ValueError, "count must be at least 1"),
        ({"size": 0}, ValueError, "size must be at least 1"),
    ],
)
def test_refusals_say_what_to_write(change, error, words, tmp_path):
    images, indices = painted()
    with pytest.raises(error, match=words):
        draw_codes(**{"images": images, "indices": indices, "path": tmp_path / "codes.png", **change})
