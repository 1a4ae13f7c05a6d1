"""NIH ChestX-ray14 as it is published: findings, patients and the official split.

Layout: `Data_Entry_2017*.csv`, `images_001/images/*.png` to `images_012/` (or fewer), `train_val_list.txt` and
`test_list.txt`. Source: Wang et al., "ChestX-ray8" (CVPR 2017), https://nihcc.app.box.com/v/ChestXray-NIHCC.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from examples.pretrain.data.catalogue import Catalogue
from examples.pretrain.data.published import images_by_stem, read_rows, refuse_without_row
from examples.pretrain.data.reading import Reading

FINDINGS = (
    "Atelectasis",
    "Cardiomegaly",
    "Consolidation",
    "Edema",
    "Effusion",
    "Emphysema",
    "Fibrosis",
    "Hernia",
    "Infiltration",
    "Mass",
    "Nodule",
    "Pleural_Thickening",
    "Pneumonia",
    "Pneumothorax",
)
LISTS = {"train_val_list.txt": "train", "test_list.txt": "test"}


def is_here(folder: Path) -> bool:
    """Return True if the table of this set is in the folder."""
    return any(folder.glob("Data_Entry_2017*.csv"))


def catalogue_of(folder: Path, reading: Reading) -> Catalogue:
    """Return the images that are there, with 14 findings, patients as groups, and the split if its lists are there.

    Raises:
        ValueError: an image is in no row or in no list of the split, or a row names another finding.
    """
    table = min(folder.glob("Data_Entry_2017*.csv"))
    columns = ("Image Index", "Finding Labels", "Patient ID")
    rows = {Path(row["Image Index"]).stem: row for row in read_rows(table, columns)}
    images = images_by_stem(folder)
    refuse_without_row(images.keys() - rows.keys(), folder, table)
    stems = sorted(images, key=images.__getitem__)
    findings = np.zeros((len(stems), len(FINDINGS)), np.uint8)
    for number, stem in enumerate(stems):
        for finding in rows[stem]["Finding Labels"].split("|"):
            if finding in FINDINGS:
                findings[number, FINDINGS.index(finding)] = 1
            elif finding != "No Finding":
                raise ValueError(
                    f"{table}: findings must be of {', '.join(FINDINGS)} or No Finding, got {finding!r} for {stem}: "
                    "download the table again"
                )
    groups = np.array([rows[stem]["Patient ID"] for stem in stems])
    return Catalogue([images[stem] for stem in stems], findings, FINDINGS, groups, _split(folder, stems))


def _split(folder: Path, stems: list[str]) -> np.ndarray | None:
    there = [name for name in LISTS if (folder / name).is_file()]
    if not there:
        return None
    if len(there) < len(LISTS):
        raise ValueError(f"{folder}: the split needs both {' and '.join(LISTS)}, got {there[0]}: add the other")
    sides: dict[str, str] = {}
    for name, side in LISTS.items():
        for line in (folder / name).read_text(encoding="utf-8").split():
            if sides.setdefault(Path(line).stem, side) != side:
                raise ValueError(f"{folder}: an image must be in one list of the split, got {line} in both")
    outside = [stem for stem in stems if stem not in sides]
    if outside:
        raise ValueError(
            f"{folder}: each image must be in {' or '.join(LISTS)}, got {outside[0]!r} in neither (and "
            f"{len(outside) - 1} more): take both lists out to have a split drawn"
        )
    return np.array([sides[stem] for stem in stems])
