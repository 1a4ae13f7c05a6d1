"""The labels of a folder of images: its `labels.csv`."""

from __future__ import annotations

import csv
import os
import unicodedata
from collections.abc import Iterable
from dataclasses import replace
from decimal import Decimal, InvalidOperation
from pathlib import Path

import numpy as np

from examples.pretrain.data.catalogue import Catalogue
from examples.pretrain.data.findings import findings_of
from examples.pretrain.data.imageset import number_classes
from examples.pretrain.data.reading import Reading


def table_of(folder: Path) -> Path | None:
    """Return the folder's `labels.csv`, also if it is written in capitals; None if there is none.

    Raises:
        ValueError: there are two, or it is a link that leads nowhere.
    """
    found = sorted(entry.name for entry in os.scandir(folder) if entry.name.lower() == "labels.csv")
    if not found:
        return None
    table = folder / found[0]
    if len(found) > 1:
        raise ValueError(f"{table}: a folder must hold one table of labels, got {' and '.join(found)}: take one out")
    if not table.is_file():
        raise ValueError(f"{table}: must be a file or a link to one: mend or remove it")
    return table


def with_labels(catalogue: Catalogue, table: Path, reading: Reading) -> Catalogue:
    """Return a catalogue with the labels and groups of a table beside its images.

    Raises:
        ValueError: the table does not fit the images; the message names the file and the line.
    """
    try:
        return _with_labels(catalogue, table, reading)
    except UnicodeDecodeError as error:
        raise ValueError(f"{table}: must be UTF-8 text, got {error}: save it as CSV UTF-8") from error
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{table}: {error}") from error


def same_spelling(name: str) -> str:
    """Return a path as it is compared: with slashes, and accents composed, as tables and file systems may not have."""
    return unicodedata.normalize("NFC", name.strip().replace("\\", "/"))


def by_spelling(names: Iterable[str]) -> dict[str, str]:
    """Return the names of files by their compared form.

    Raises:
        ValueError: two are the same but for how their letters are composed.
    """
    found: dict[str, str] = {}
    for name in names:
        other = found.setdefault(same_spelling(name), name)
        if other != name:
            raise ValueError(f"two images have the name {name!r}, with letters composed in two ways: rename one")
    return found


def _with_labels(catalogue: Catalogue, table: Path, reading: Reading) -> Catalogue:
    with table.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets write a byte order mark
        reader = csv.DictReader(file)
        header = list(reader.fieldnames or ())
        rows = [(reader.line_num, row) for row in reader]
    columns = [column for column in header if column not in ("name", "group")]
    if "name" not in header or header == ["name"] or len(set(header)) < len(header):
        raise ValueError(
            f"its header must be `name`, then `group`, one or more label columns, or both, all different, got {header}"
        )
    # A blank among findings has a message of its own.
    to_fill = set(header) if len(columns) < 2 else set(header) - set(columns)
    by_name: dict[str, dict[str, str]] = {}
    for line, row in rows:
        if "\0" in "".join(row[column] or "" for column in header):
            # numpy drops those at the end of a text, which would merge classes
            raise ValueError(f"line {line} must be text, got a NUL byte: save it as CSV UTF-8")
        short = None in row or any(row[column] is None for column in header)
        if short or any(not row[column].strip() for column in to_fill):
            raise ValueError(f"line {line} must fill each of the {len(header)} columns, got {row}")
        name = same_spelling(row["name"])
        if name in by_name:
            raise ValueError(f"line {line} names {name!r} a second time: keep one row an image")
        by_name[name] = {column: value.strip() for column, value in row.items()}
    files = by_spelling(catalogue.names)
    missing = [name for name in files if name not in by_name]
    if missing:
        raise ValueError(
            f"{len(missing)} images have no row, first {files[missing[0]]!r}: add a row for each, with the path "
            "relative to the folder as `name`"
        )
    surplus = sorted(set(by_name) - set(files))
    if surplus:
        raise ValueError(f"{len(surplus)} rows name no image, first {surplus[0]!r}: take them out")
    ordered = [by_name[name] for name in files]
    groups = np.array([row["group"] for row in ordered]) if "group" in header else None
    if not columns:
        return replace(catalogue, labels=None, label_names=(), groups=groups)
    if len(columns) == 1:
        labels, label_names = _classes(ordered, columns[0])
        return replace(catalogue, labels=labels, label_names=label_names, groups=groups)
    findings, keep = findings_of(ordered, columns, catalogue.names, reading)
    return replace(catalogue, labels=findings, label_names=tuple(columns), groups=groups).subset(keep)


def _classes(rows: list[dict[str, str]], column: str) -> tuple[np.ndarray, tuple[str, ...]]:
    values = [row[column] for row in rows]
    numbers = [_number(value) for value in values]
    whole = [int(number) for number in numbers if number is not None and _is_whole(number)]
    if len(whole) == len(values):
        if set(whole) == {-1, 0, 1}:
            raise ValueError(
                f"the classes -1, 0 and 1 in column {column!r} may mean uncertain, no and yes: write names if they are "
                "three classes, else 0 or 1 for each, or take the images out"
            )
        return number_classes(np.array(whole, np.int64))
    if any(number is not None and number.is_nan() for number in numbers):
        raise ValueError(
            f"the classes in column {column!r} must be all names or all whole numbers, got {sorted(set(values))[:5]}: "
            "NaN is no class, take its images out"
        )
    piped = next((value for value in values if "|" in value), None)
    if piped is not None:
        raise ValueError(
            f"each image must have one class in column {column!r}, got {piped!r}: write one column of 0 and 1 for each "
            "finding in its place"
        )
    if all(number is None for number in numbers):
        return number_classes(np.array(values))
    raise ValueError(
        f"the classes in column {column!r} must be all names or all whole numbers of at most 64 bits, got "
        f"{sorted(set(values))[:5]}"
    )


def _number(value: str) -> Decimal | None:
    """Return an exact number: a float would merge whole numbers above 2**53."""
    try:
        return None if "_" in value else Decimal(value)  # Python's numbers may be written 1_000, others' not
    except InvalidOperation:
        return None


def _is_whole(number: Decimal) -> bool:
    return number.is_finite() and -(2**63) <= number < 2**63 and number == number.to_integral_value()
