"""CheXpert on a generated copy of its published layout."""

import numpy as np
import pytest

from examples.pretrain.data import Reading, load_images, train_test_split
from examples.pretrain.data.chexpert import FINDINGS
from tests.examples.data.loading import grey, save

HEADER = "Path,Sex,Age,Frontal/Lateral,AP/PA," + ",".join(FINDINGS) + "\n"


def row(path, **findings):
    values = [findings.get(name.replace(" ", "_"), "") for name in FINDINGS]
    return f"CheXpert-v1.0-small/{path},Female,68,Frontal,AP,{','.join(values)}\n"


TRAIN = {
    "train/patient00001/study1/view1_frontal.jpg": {"No_Finding": "1.0"},
    "train/patient00002/study1/view1_frontal.jpg": {"Edema": "-1.0", "Fracture": "1.0", "Pneumonia": "0.0"},
    "train/patient00002/study1/view2_lateral.jpg": {"Edema": "1.0"},
}
VALID = {"valid/patient64541/study1/view1_frontal.jpg": {name.replace(" ", "_"): "0.0" for name in FINDINGS}}
PARTS = {"train": TRAIN, "valid": VALID}


@pytest.fixture
def folder(tmp_path, rng):
    write(tmp_path, rng, PARTS)
    return tmp_path


def write(folder, rng, parts):
    for part, rows in parts.items():
        (folder / f"{part}.csv").write_text(HEADER + "".join(row(path, **found) for path, found in rows.items()))
        for path in rows:
            save(folder, path, grey(rng))


def load(folder, **choices):
    return load_images(folder, 6, reading=Reading(**choices), progress=False)


MEANS = {"zeros": 0, "ones": 1, "ignore": -1}


@pytest.mark.parametrize("unknown", MEANS)
@pytest.mark.parametrize("uncertain", MEANS)
def test_published_layout_is_read_by_the_named_policies(folder, unknown, uncertain):
    data = load(folder, unknown=unknown, uncertain=uncertain)
    assert data.names.tolist() == [*TRAIN, *VALID]
    assert data.label_names == FINDINGS
    assert len(FINDINGS) == 14
    values = {"1.0": 1, "0.0": 0, "-1.0": MEANS[uncertain], "": MEANS[unknown]}
    assert data.labels.dtype == (np.int8 if "ignore" in (unknown, uncertain) else np.uint8)
    for labels, found in zip(data.labels, [*TRAIN.values(), *VALID.values()], strict=True):
        assert labels.tolist() == [values[found.get(name.replace(" ", "_"), "")] for name in FINDINGS]
    assert data.groups.tolist() == ["patient00001", "patient00002", "patient00002", "patient64541"]
    assert data.split.tolist() == ["train", "train", "train", "test"]
    assert train_test_split(data)[1].tolist() == [3]


def test_images_with_uncertain_findings_can_be_left_out(folder):
    data = load(folder, unknown="zeros", uncertain="leave-out")
    assert data.names.tolist() == [name for name in (*TRAIN, *VALID) if "view1" not in name or "00002" not in name]
    assert len(data.split) == len(data.groups) == len(data.labels) == len(data) == 3
    with pytest.raises(ValueError, match=r"'test'\]"):  # of this copy, the validation image alone is known
        train_test_split(load(folder, unknown="leave-out", uncertain="leave-out"))


def test_test_images_make_validation_a_part_of_training(folder, rng):
    write(folder, rng, {"test": {"test/patient64741/study1/view1_frontal.jpg": {"Edema": "0.0"}}})
    data = load(folder, unknown="zeros", uncertain="zeros")
    assert data.split.tolist() == ["test", "train", "train", "train", "val"]


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        (
            {},
            "got a blank in column 'Enlarged Cardiomediastinum' for 'train/patient00001.* zeros, ones, ignore or",
        ),
        ({"unknown": "zeros"}, r"got -1 in column 'Edema' for 'train/patient00002.* \(and 0 more\): give --uncertain"),
    ],
)
def test_unknown_and_uncertain_findings_need_a_policy(folder, choices, said):
    with pytest.raises(ValueError, match=said):
        load(folder, **choices)


def test_images_without_a_row_are_refused(folder, rng):
    save(folder, "train/patient00003/study1/view1_frontal.jpg", grey(rng))
    with pytest.raises(ValueError, match=r"1 images have no row in train\.csv, first 'train/patient00003"):
        load(folder, unknown="zeros", uncertain="zeros")
