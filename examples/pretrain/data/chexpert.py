"""CheXpert as it is published: 14 findings that may be unknown or uncertain, patients, and the official split.

Layout: `train.csv`, `valid.csv` (and `test.csv` where it is there), `train/patient00001/study1/view1_frontal.jpg`.
Source: Irvin et al., "CheXpert" (AAAI 2019), https://stanfordmlgroup.github.io/competitions/chexpert.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from examples.pretrain.data.catalogue import Catalogue
from examples.pretrain.data.files import image_names
from examples.pretrain.data.findings import findings_of
from examples.pretrain.data.published import read_rows, refuse_without_row
from examples.pretrain.data.reading import Reading

FINDINGS = (
    "No Finding",
    "Enlarged Cardiomediastinum",
    "Cardiomegaly",
    "Lung Opacity",
    "Lung Lesion",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Atelectasis",
    "Pneumothorax",
    "Pleural Effusion",
    "Pleural Other",
    "Fracture",
    "Support Devices",
)
IN_SET = re.compile(r"(?:^|/)((?:train|valid|test)/(patient\d+)/.+)")
"""Path in the set, which tables write with the name of the set before it, and the patient."""


def is_here(folder: Path) -> bool:
    """Return True if the tables of this set are in the folder."""
    table = folder / "train.csv"
    if not table.is_file():
        return False
    with table.open(encoding="utf-8-sig", errors="replace") as file:
        header = file.readline()
    return header.startswith("Path,") and "No Finding" in header


def catalogue_of(folder: Path, reading: Reading) -> Catalogue:
    """Return the images that are there, with findings, patients as groups and the split.

    Without `test.csv`, the images of `valid/` are the test side, as in the literature.

    Raises:
        ValueError: an image is in no row, or `reading` does not say what becomes of unknown or uncertain findings.
    """
    rows: dict[str, dict[str, str]] = {}
    parts = [part for part in ("train", "valid", "test") if (folder / f"{part}.csv").is_file()]
    for part in parts:
        for row in read_rows(folder / f"{part}.csv", ("Path", *FINDINGS)):
            found = IN_SET.search(row["Path"])
            if found is None:
                raise ValueError(
                    f"{folder / part}.csv: a path must be of the form train/patient00001/..., got {row['Path']!r}"
                )
            rows[found[1]] = row
    names = [name for name in image_names(folder) if name.partition("/")[0] in parts]
    refuse_without_row(set(names) - rows.keys(), folder, folder / f"{parts[0]}.csv")
    try:
        findings, keep = findings_of([rows[name] for name in names], FINDINGS, names, reading)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    test = "test" if any(name.startswith("test/") for name in names) else "valid"
    sides = {"train": "train", "valid": "val", test: "test"}
    split = np.array([sides[name.partition("/")[0]] for name in names])
    groups = np.array([name.split("/")[1] for name in names])
    return Catalogue(names, findings, FINDINGS, groups, split).subset(keep)
