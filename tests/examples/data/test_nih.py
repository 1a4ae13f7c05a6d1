"""NIH ChestX-ray14 on a generated copy of its published layout."""

import numpy as np
import pytest

from examples.pretrain.data import train_test_split
from examples.pretrain.data.nih import FINDINGS
from tests.examples.data.loading import grey, read, refuses, save

HEADER = "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
HEADER += "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],\n"


def row(name, findings, patient):
    return f"{name},{findings},000,{patient},58,M,PA,2682,2749,0.143,0.143,\n"


IMAGES = {
    "00000001_000.png": ("Cardiomegaly", 1, "images_001/images"),
    "00000001_001.png": ("Cardiomegaly|Emphysema", 1, "images_001/images"),
    "00000002_000.png": ("No Finding", 2, "images_002/images"),
    "00000003_000.png": ("Hernia|Pleural_Thickening", 3, "images_002/images"),
}


@pytest.fixture
def folder(tmp_path, rng):
    place = tmp_path / "nih"
    place.mkdir()
    for name, (_, _, where) in IMAGES.items():
        save(place, f"{where}/{name}", grey(rng))
    rows = [row(name, findings, patient) for name, (findings, patient, _) in IMAGES.items()]
    rows.append(row("00000009_000.png", "Mass", 9))  # of an archive that is not unpacked
    (place / "Data_Entry_2017_v2020.csv").write_text(HEADER + "".join(rows))
    (place / "train_val_list.txt").write_text("00000001_000.png\r\n00000001_001.png\n00000009_000.png\n")
    (place / "test_list.txt").write_text("00000002_000.png\n00000003_000.png")
    (place / "README_CHESTXRAY.pdf").write_bytes(b"%PDF")
    return place


def test_published_layout_is_read_with_findings_patients_and_split(folder):
    data = read(folder)
    assert data.names.tolist() == [f"{where}/{name}" for name, (_, _, where) in IMAGES.items()]
    assert data.label_names == FINDINGS
    assert len(FINDINGS) == 14
    for labels, (findings, _, _) in zip(data.labels, IMAGES.values(), strict=True):
        assert {FINDINGS[index] for index in np.flatnonzero(labels)} == set(findings.split("|")) - {"No Finding"}
    assert data.groups.tolist() == ["1", "1", "2", "3"]
    assert data.split.tolist() == ["train", "train", "test", "test"]
    assert train_test_split(data)[1].tolist() == [2, 3]


def test_pictures_with_transparency_become_grey(folder, rng):
    flat = grey(rng)
    save(folder, "images_002/images/00000002_000.png", np.stack([flat, flat, flat, np.full_like(flat, 255)], -1))
    np.testing.assert_array_equal(read(folder).images[2], flat)


def test_without_lists_the_split_is_drawn_by_patient(folder):
    for name in ("train_val_list.txt", "test_list.txt"):
        (folder / name).unlink()
    data = read(folder)
    assert data.split is None
    train, test = train_test_split(data)
    assert not set(data.groups[train]) & set(data.groups[test])


def test_what_does_not_fit_is_refused(folder, rng):
    table = folder / "Data_Entry_2017_v2020.csv"
    whole = table.read_text()
    table.write_text(whole.replace("Hernia", "Flu"))
    refuses_folder(folder, "must be of .*No Finding, got 'Flu' for 00000003_000")
    table.write_text(whole.replace(",Patient ID", ",Patient"))
    refuses_folder(folder, "must have the column 'Patient ID'")
    table.write_text(whole)
    (folder / "test_list.txt").write_text("00000002_000.png\n")
    refuses_folder(folder, "got '00000003_000' in neither")
    (folder / "test_list.txt").write_text("00000001_000.png\n")
    refuses_folder(folder, "in one list of the split")
    (folder / "test_list.txt").unlink()
    refuses_folder(folder, "needs both")
    save(folder, "images_002/images/00000004_000.png", grey(rng))
    refuses_folder(folder, "1 images have no row in Data_Entry_2017_v2020.csv, first '00000004_000'")


def refuses_folder(folder, said):
    with pytest.raises(ValueError, match=said):
        read(folder)


def test_folder_above_a_set_is_refused_with_the_right_one(folder):
    refuses(folder.parent, "published set must be given itself", f"give {folder}")
