"""RSNA Pneumonia on a generated copy of its published layout."""

import numpy as np
import pytest

from tests.examples.data.loading import grey, read
from tests.examples.data.test_dicom import write_dicom

TABLE = """patientId,x,y,width,height,Target
a1,,,,,0
b2,1.0,2.0,3.0,4.0,1
b2,6.0,0.0,4.0,2.0,1
c3,,,,,0
"""


@pytest.fixture
def folder(tmp_path, rng):
    for part, names in (("train", ("c3", "a1", "b2")), ("test", ("d4",))):
        (tmp_path / f"stage_2_{part}_images").mkdir()
        for name in names:
            write_dicom(tmp_path / f"stage_2_{part}_images" / f"{name}.dcm", grey(rng, (8, 8)))
    (tmp_path / "stage_2_train_labels.csv").write_text(TABLE)
    (tmp_path / "stage_2_detailed_class_info.csv").write_text("patientId,class\n")
    return tmp_path


def test_published_layout_is_read_with_boxes_as_masks(folder):
    data = read(folder, 8)
    assert data.names.tolist() == [f"stage_2_train_images/{name}.dcm" for name in ("a1", "b2", "c3")]
    assert data.labels.tolist() == [0, 1, 0]
    assert data.label_names == ("no opacity", "opacity")
    assert data.groups.tolist() == ["a1", "b2", "c3"]
    right = np.zeros((8, 8))
    right[2:6, 1:4] = right[0:2, 6:8] = 1  # the second box ends outside of the image
    np.testing.assert_array_equal(data.masks[1], right)
    assert not data.masks[[0, 2]].any()


def test_boxes_follow_the_size_of_the_images(folder):
    np.testing.assert_array_equal(read(folder, 4).masks[1, 1:3, 1], [1, 1])


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("c3,,,,,0\n", "", "1 images have no row in stage_2_train_labels.csv, first 'c3'"),
        (",0\nb2", ",2\nb2", "Target must be 0 or 1, got '2' for a1"),
        ("3.0,4.0", "3.0,", r"a box must be four numbers, got \['1.0', '2.0', '3.0', ''\] for b2"),
        ("3.0,4.0", "nan,4.0", "a box must be four numbers"),
        ("c3,,,,,0", "c3,,,0", "line 5 must fill 6 columns, got 4"),
    ],
)
def test_table_that_does_not_fit_is_refused(folder, old, new, said):
    (folder / "stage_2_train_labels.csv").write_text(TABLE.replace(old, new))
    with pytest.raises(ValueError, match=said):
        read(folder)


def test_set_without_its_images_is_refused(tmp_path):
    (tmp_path / "stage_2_train_labels.csv").write_text(TABLE)
    with pytest.raises(ValueError, match="must hold the folder stage_2_train_images"):
        read(tmp_path)
