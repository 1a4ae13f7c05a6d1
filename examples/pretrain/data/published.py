"""What readers of published sets share: their tables, and images by name."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from examples.pretrain.data.files import image_names


def read_rows(table: Path, columns: Iterable[str]) -> list[dict[str, str]]:
    """Return the rows of a CSV table, with blanks around names and values taken off.

    Raises:
        ValueError: it is not UTF-8, lacks one of the `columns` or fields of a row; the message names the file.
    """
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            header = [name.strip() for name in next(reader, [])]
            rows = [(reader.line_num, row) for row in reader if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{table}: must be a CSV table in UTF-8, got {error}: download it again") from error
    missing = [name for name in columns if name not in header]
    if missing:
        raise ValueError(f"{table}: must have the column {missing[0]!r}, got {header}: download it again")
    for line, row in rows:
        if len(row) != len(header):
            raise ValueError(f"{table}: line {line} must fill {len(header)} columns, got {len(row)}: download it again")
    return [{name: value.strip() for name, value in zip(header, row, strict=True)} for _, row in rows]


def images_by_stem(folder: Path, under: str = "") -> dict[str, str]:
    """Return the paths of a folder's images relative to it, by their names without folders and suffix.

    Raises:
        ValueError: there are no images, or two have the same name.
    """
    if not (folder / under).is_dir():
        raise ValueError(f"{folder}: must hold the folder {under} of this set: unpack its images there")
    prefix = f"{under}/" if under else ""
    found: dict[str, str] = {}
    for name in image_names(folder / under):
        path = prefix + name
        other = found.setdefault(PurePosixPath(name).stem, path)
        if other != path:
            raise ValueError(f"{folder}: two images have one name, {other!r} and {path!r}: take one out")
    return found


def refuse_without_row(missing: Iterable[str], folder: Path, table: Path) -> None:
    """Raise ValueError if images have no row in the table of their set."""
    alone = sorted(missing)
    if alone:
        raise ValueError(
            f"{folder}: {len(alone)} images have no row in {table.name}, first {alone[0]!r}: take them out"
        )
