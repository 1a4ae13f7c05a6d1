"""The labels of a folder of images: its `labels.csv`, else the names of its sub-folders."""

from __future__ import annotations

import csv
import os
from decimal import Decimal, InvalidOperation
from pathlib import Path

import numpy as np

from examples.pretrain.data.imageset import number_classes

Labels = tuple[np.ndarray | None, tuple[str, ...], np.ndarray | None]
"""Labels, label names and groups; None where unknown."""


def labels_of(folder: Path, names: list[str]) -> Labels:
    """Return labels, label names and groups of the images ``names`` (paths relative to ``folder``).

    Raises:
        ValueError: ``labels.csv`` does not fit the images; the message names the file and the line.
    """
    table = folder / "labels.csv"
    if os.path.lexists(table):
        if not table.is_file():
            raise ValueError(f"{table}: must be a file or a link to one: mend or remove it")
        try:
            return _table_labels(table, names)
        except UnicodeDecodeError as error:
            raise ValueError(f"{table}: must be UTF-8 text, got {error}: save it as CSV UTF-8") from error
        except (ValueError, csv.Error) as error:
            raise ValueError(f"{table}: {error}") from error
    tops = [name.split("/")[0] for name in names]
    if all("/" in name for name in names) and len(set(tops)) > 1:
        classes, class_names = number_classes(np.array(tops))
        return classes, class_names, None
    return None, (), None


def _table_labels(table: Path, names: list[str]) -> Labels:
    with table.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets write a byte order mark
        reader = csv.DictReader(file)
        header = list(reader.fieldnames or ())
        rows = [(reader.line_num, row) for row in reader]
    columns = [column for column in header if column not in ("name", "group")]
    if "name" not in header or not columns or len(set(header)) < len(header):
        raise ValueError(
            "its header must be `name`, optionally `group`, then one or more label columns, all different, "
            f"got {header}"
        )
    by_name: dict[str, dict[str, str]] = {}
    for line, row in rows:
        if "\0" in "".join(row[column] or "" for column in header):
            # numpy drops those at the end of a text, which would merge classes
            raise ValueError(f"line {line} must be text, got a NUL byte: save it as CSV UTF-8")
        if None in row or any(value is None or not value.strip() for value in row.values()):
            raise ValueError(f"line {line} must fill each of the {len(header)} columns, got {row}")
        name = row["name"].strip().replace("\\", "/")
        if name in by_name:
            raise ValueError(f"line {line} names {name!r} a second time: keep one row an image")
        by_name[name] = {column: value.strip() for column, value in row.items()}
    missing = [name for name in names if name not in by_name]
    if missing:
        raise ValueError(
            f"{len(missing)} images have no row, first {missing[0]!r}: add a row for each, with the path "
            "relative to the folder as `name`"
        )
    surplus = sorted(set(by_name) - set(names))
    if surplus:
        raise ValueError(f"{len(surplus)} rows name no image, first {surplus[0]!r}: take them out")
    ordered = [by_name[name] for name in names]
    labels, label_names = _column_labels(ordered, columns)
    groups = np.array([row["group"] for row in ordered]) if "group" in header else None
    return labels, label_names, groups


def _column_labels(rows: list[dict[str, str]], columns: list[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    if len(columns) > 1:
        wrong = [(column, row[column]) for row in rows for column in columns if row[column] not in ("0", "1")]
        if wrong:
            raise ValueError(
                f"several label columns are findings and must hold 0 or 1, got {wrong[0][1]!r} in column "
                f"{wrong[0][0]!r}: keep a single column for classes"
            )
        return np.array([[row[column] for column in columns] for row in rows]).astype(np.uint8), tuple(columns)
    values = [row[columns[0]] for row in rows]
    numbers = [_number(value) for value in values]
    whole = [int(number) for number in numbers if number is not None and _is_whole(number)]
    if len(whole) == len(values):
        return number_classes(np.array(whole, np.int64))
    if all(number is None for number in numbers):
        return number_classes(np.array(values))
    raise ValueError(
        f"the classes in column {columns[0]!r} must be all names or all whole numbers of at most 64 bits, got "
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
