"""Findings of tables as 0 and 1: how yes, no, unknown and uncertain are written, and what becomes of the last two."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal, InvalidOperation

import numpy as np

from examples.pretrain.data.reading import Reading

TRUTH = {"true": "1", "false": "0"}
UNKNOWN = {"": "a blank", "nan": "NaN"}
READ = {"0", "1", "-1", *UNKNOWN}


def findings_of(
    rows: Sequence[dict[str, str]], columns: Sequence[str], names: Sequence[str], reading: Reading
) -> tuple[np.ndarray, np.ndarray]:
    """Return findings ``(N, L)``, and ``(N,)`` booleans that are False for images to leave out.

    Findings are uint8 of 0 and 1; or int8, with -1 for what is to be ignored, if there is such a finding.

    Args:
        rows: the values of each image by column.
        columns: of the findings.
        names: of the images, for messages.
        reading: what becomes of unknown (blank, NaN) and uncertain (-1) findings.

    Raises:
        ValueError: a value is no finding, or it is not said what becomes of an unknown or uncertain one.
    """
    values = np.array([[_finding(row[column]) for column in columns] for row in rows], dtype=str)
    values = values.reshape(len(rows), len(columns))
    others = [column for column, found in zip(columns, values.T, strict=True) if not set(found.tolist()) <= READ]
    if others:
        odd = next(row[others[0]] for row in rows if _finding(row[others[0]]) not in READ)
        raise ValueError(
            f"several label columns are findings and must hold 0 or 1, got {odd!r} in column {others[0]!r}: take out "
            f"columns that are no findings ({', '.join(others[:5])}), or keep a single column for classes"
        )
    keep = np.ones(len(rows), bool)
    ignored = np.zeros(values.shape, bool)
    for option, policy, kinds in (
        ("unknown", reading.unknown, list(UNKNOWN)),
        ("uncertain", reading.uncertain, ["-1"]),
    ):
        there = np.isin(values, kinds)
        if there.any() and policy is None:
            row, column = np.argwhere(there)[0]
            kind = UNKNOWN.get(str(values[row, column]), "-1")
            raise ValueError(
                f"findings must be known, 0 or 1, got {kind} in column {columns[column]!r} for {names[row]!r} (and "
                f"{there.sum() - 1} more): give --{option} zeros, ones, ignore or leave-out, or write 0 or 1 for each"
            )
        values[there] = "1" if policy == "ones" else "0"
        if policy == "ignore":
            ignored |= there
        if policy == "leave-out":
            keep &= ~there.any(1)
    if not keep.any():
        raise ValueError("no image has findings that are all known: give --unknown zeros, or --uncertain zeros")
    findings = values.astype(np.uint8)
    return np.where(ignored, np.int8(-1), findings.astype(np.int8)) if ignored.any() else findings, keep


def _finding(value: str) -> str:
    """Return "0", "1", "-1", "nan" or a blank for every way to write them; other values as they are."""
    value = value.strip()
    try:
        number = Decimal(value)
    except InvalidOperation:
        return TRUTH.get(value.lower(), value)
    if number.is_nan():
        return "nan"
    return str(int(number)) if number in (-1, 0, 1) else value
