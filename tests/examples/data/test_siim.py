"""SIIM-ACR Pneumothorax on a generated copy of its published layout."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.pretrain.data.siim import runs_to_mask
from tests.examples.data.loading import grey, read
from tests.examples.data.test_dicom import write_dicom

TABLE = "ImageId, EncodedPixels\n1.2.3, -1\n1.2.4, 1 2 6 2\n1.2.4, 20 1\n"


@pytest.fixture
def folder(tmp_path, rng):
    for part, names in (("train", ("1.2.4", "1.2.3")), ("test", ("1.2.9",))):
        for name in names:
            path = tmp_path / f"dicom-images-{part}" / f"{name}.0" / f"{name}.1" / f"{name}.dcm"
            path.parent.mkdir(parents=True)
            write_dicom(path, grey(rng, (8, 8)))
    (tmp_path / "train-rle.csv").write_text(TABLE)
    return tmp_path


def test_published_layout_is_read_with_runs_as_masks(folder):
    data = read(folder, 8)
    assert [name.rpartition("/")[2] for name in data.names] == ["1.2.3.dcm", "1.2.4.dcm"]
    assert data.labels.tolist() == [0, 1]
    assert data.label_names == ("no pneumothorax", "pneumothorax")
    right = np.zeros((8, 8))
    right[1:3, 0] = right[1:3, 1] = right[4, 2] = 1  # down each column; 6 pixels lie between the first two runs
    np.testing.assert_array_equal(data.masks, [np.zeros((8, 8)), right])


def encoded(mask):
    """Return a mask as the published runs, by walking its pixels down each column."""
    runs, gap, length = [], 0, 0
    for pixel in mask.T.ravel().tolist():
        if pixel:
            length += 1
        elif length:
            runs += [gap, length]
            gap, length = 1, 0
        else:
            gap += 1
    return [*runs, gap, length] if length else runs


@given(st.data())
def test_runs_of_any_mask_give_it_back(data):
    shape = data.draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))
    pixels = data.draw(st.lists(st.integers(0, 1), min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]))
    mask = np.array(pixels, np.uint8).reshape(shape)
    np.testing.assert_array_equal(runs_to_mask(encoded(mask), shape), mask)


def test_images_without_a_row_are_left_out_and_said(folder):
    (folder / "train-rle.csv").write_text(TABLE.replace("1.2.3, -1\n", ""))
    with pytest.warns(UserWarning, match=r"1 images have no row in train-rle\.csv and are left out"):
        assert len(read(folder, 8)) == 1
    (folder / "train-rle.csv").write_text("ImageId, EncodedPixels\n")
    with pytest.raises(ValueError, match="none of 2 has one"):
        read(folder, 8)


@pytest.mark.parametrize(
    ("runs", "said"),
    [
        ("1 2 6", "pairs of numbers, got '1 2 6' for 1.2.4"),
        ("", "pairs of numbers, got ''"),
        ("60 9", "within 64 pixels"),
    ],
)
def test_runs_that_are_none_are_refused(folder, runs, said):
    (folder / "train-rle.csv").write_text(TABLE.replace("20 1", runs))
    with pytest.raises(ValueError, match=said):
        read(folder, 8)
