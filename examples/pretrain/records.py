"""Records: what every run's JSON holds about its making, and how it is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.provenance import cpu_model, provenance
from examples.pretrain.checkpoint import differences, write_whole

__all__ = ["device_model", "kept_record", "provenance", "read_record", "rounded", "write_record"]


def device_model(device: str) -> str:
    """Return the model of the CPU or GPU that `device` names; the same seed on another model is another run."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else cpu_model()


def write_record(path: Path, record: dict[str, Any], *, allow_nan: bool = True) -> None:
    """Write a record as JSON, one line an entry.

    Raises:
        ValueError: ``allow_nan`` is False and a figure is not finite. Nothing is written then.
    """
    lines = ",\n".join(f' "{key}": {json.dumps(value, allow_nan=allow_nan)}' for key, value in record.items())
    write_whole(path, ("{\n" + lines + "\n}\n").encode())


def read_record(path: Path) -> dict[str, Any]:
    """Return the record in a file.

    Raises:
        ValueError: the file is damaged, or holds something else.
    """
    try:
        record = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: must hold a record as JSON, got {error}: remove it to measure again") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path}: must hold a record as JSON, got a {type(record).__name__}: remove it")
    return record


def kept_record(path: Path, basis: dict[str, Any]) -> dict[str, Any] | None:
    """Return the record in a file, which is not measured again; None if there is no file.

    Args:
        path: of the record.
        basis: what the record depends on, by the name of its entry.

    Raises:
        ValueError: the file is damaged, or holds a record of another basis.
    """
    if not path.exists():
        return None
    record = read_record(path)
    theirs = {name: record.get(name) for name in basis}
    changed = [f"{name} was {a}, is {b}" for name, a, b in differences(theirs, json.loads(json.dumps(basis)))]
    if changed:
        raise ValueError(f"{path} holds another result: {'; '.join(changed)}. Give another --out")
    return record


def rounded(value: Any, digits: int = 5) -> Any:
    """Return nested dicts and lists with their floats rounded."""
    if isinstance(value, dict):
        return {key: rounded(part, digits) for key, part in value.items()}
    if isinstance(value, list):
        return [rounded(part, digits) for part in value]
    return round(value, digits) if isinstance(value, float) else value
