"""Kept records: one run is one JSON object on one line of ``benchmarks/results/NAME.jsonl``.

Programs write their records below ``runs/``. A run worth keeping is added by hand, and tables and figures are made
from the lines::

    python -m benchmarks.records list
    python -m benchmarks.records add NAME runs/.../*.json [--replace]
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]

RESULTS = Path(__file__).resolve().parent / "results"
RUNS = Path(__file__).resolve().parent.parent / "runs"

PROVENANCE = {
    "command": "the command that makes the record again",
    "date": "the day of the run",
    "commit": "what `git describe` prints",
    "device": "the model of the CPU or GPU",
    "cores": "the number of threads, null on a GPU",
    "versions": "the versions of Python and of the packages",
}
"""What every record says about its making; see :func:`benchmarks.provenance.provenance`."""
NULLABLE = ("commit", "cores")
IDENTITY = ("kind", "variant", "protocol", "encoder", "seed", "device", "command", "images")
"""Two records that agree in all of these are the same run twice."""
FIRST_KEYS = ("kind", "variant", "protocol", "encoder", "seed", *PROVENANCE)


def names() -> list[str]:
    """Return the names of all kept record files."""
    return sorted(path.stem for path in RESULTS.glob("*.jsonl"))


def load(name: str) -> list[Record]:
    """Return the records of ``benchmarks/results/NAME.jsonl``.

    Raises:
        ValueError: there is no such file, or a line of it is not JSON.
    """
    path = _path(name)
    if not path.exists():
        raise ValueError(f"no records are named {name!r}: choose one of {', '.join(names())}")
    return list(_lines(path))


def add(name: str, records: Iterable[Record], *, replace: bool = False) -> None:
    """Add records to ``benchmarks/results/NAME.jsonl``, which is made where it does not exist.

    The file is written whole or not at all, one line a record, in an order that does not depend on that of adding.

    Args:
        name: the name of the file without its suffix.
        records: new records; each has a ``kind``, the keys of :data:`PROVENANCE` and at least one figure.
        replace: replace records of the same identity instead of refusing the new ones.

    Raises:
        ValueError: a record lacks a key or has a wrong value, or two records have the same identity.
    """
    path, new = _path(name), list(records)
    for record in new:
        check(record)
    kept = list(_lines(path)) if path.exists() else []
    added = {identity(record): record for record in new}
    if len(added) < len(new):
        raise ValueError(f"each new record needs an identity of its own ({', '.join(IDENTITY)}): two are the same run")
    known = [record for record in kept if identity(record) in added]
    if known and not replace:
        more = f" and {len(known) - 1} more" if len(known) > 1 else ""
        raise ValueError(f"{name} already has {describe(known[0])}{more}: give --replace to replace, or leave it out")
    merged = {identity(record): record for record in kept} | added
    lines = [_line(merged[key]) for key in sorted(merged, key=_rank)]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "".join(lines))


def check(record: Record) -> None:
    """Raise a ValueError where a record does not say what it is, how it was made, or what came out."""
    kind = record.get("kind")
    if not isinstance(kind, str) or not kind:
        raise ValueError(f"a record names its kind, as in 'sweep' or 'search': got {kind!r}; write it under 'kind'")
    cure = "write what benchmarks.provenance.provenance returns"
    for key, meaning in PROVENANCE.items():
        value = record.get(key)
        right = dict if key == "versions" else int if key == "cores" else str
        if not (value is None and key in record and key in NULLABLE) and not (isinstance(value, right) and value):
            received = repr(value) if key in record else "no such key"
            raise ValueError(f"a record of kind {kind!r} has {key!r}, {meaning}: got {received}; {cure}")
    seed = record.get("seed")
    if seed is not None and type(seed) is not int:
        raise ValueError(f"a record's seed is a whole number: got {seed!r}; write it as an int or leave it out")
    if set(record) <= {*IDENTITY, *PROVENANCE}:
        raise ValueError(
            f"a record holds figures beside its provenance: got {', '.join(record)}; add what was measured"
        )
    try:
        json.dumps(record, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"a record is JSON of finite numbers: got one of kind {kind!r} ({error}); convert it"
        ) from None


def identity(record: Record) -> tuple[Any, ...]:
    """Return what tells a record from all others: its values of :data:`IDENTITY`, images as text."""
    values = [record.get(key) for key in IDENTITY]
    return (*values[:-1], json.dumps(values[-1], sort_keys=True))


def describe(record: Record) -> str:
    """Return a record's identity in words."""
    parts = [f"{key} {record[key]}" for key in IDENTITY[:5] if record.get(key) is not None]
    return f"{', '.join(parts)} on {record.get('device') or 'a model not recorded'} by `{record['command']}`"


def by_device(records: Iterable[Record]) -> dict[str | None, list[Record]]:
    """Return the records of each CPU or GPU model; None holds those whose model was not recorded.

    The same seed on another model is another run, so runs are only compared within one of these groups.
    """
    found: dict[str | None, list[Record]] = {}
    for record in records:
        found.setdefault(record["device"], []).append(record)
    return found


def on_gpu(record: Record) -> bool:
    """Return True if the record is of a GPU: its model is known, and it has no number of CPU threads."""
    return record["device"] is not None and record["cores"] is None


def write_run(path: Path, record: Record) -> None:
    """Write a record of this run to a file of its own, below ``runs/``, from where it can be added."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(record, indent=1) + "\n")
    print(f"written: {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it holds all of `text` or what it held before, whenever the process dies."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def listing() -> str:
    """Return a line for each file: records, size, kinds, days and devices."""
    lines = []
    for name in names():
        records = load(name)
        kinds = ", ".join(sorted({record["kind"] for record in records}))
        days = sorted({record["date"] or "no date" for record in records})
        devices = ", ".join(sorted(str(device or "model not recorded") for device in by_device(records)))
        size = _path(name).stat().st_size / 1024
        between = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
        lines.append(f"{name}: {len(records)} records, {size:.0f} KiB ({kinds}); {between}; {devices}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.records", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    adding = commands.add_parser("add", help="add the records of JSON files")
    adding.add_argument("name", help="name of the file of records, without its suffix")
    adding.add_argument("files", nargs="+", type=Path, help="JSON files of one record each")
    adding.add_argument("--replace", action="store_true", help="replace records of the same identity")
    commands.add_parser("list", help="print what is kept")
    options = parser.parse_args(arguments)
    if options.command == "list":
        print(listing())
        return
    try:
        add(
            options.name,
            [json.loads(path.read_text(encoding="utf-8")) for path in options.files],
            replace=options.replace,
        )
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
    print(f"{len(options.files)} added to {_path(options.name).name}, which has {len(load(options.name))}")


def _path(name: str) -> Path:
    if not re.fullmatch(r"[a-z0-9_-]+", name):
        raise ValueError(f"a name of records has lower-case letters, digits, '-' and '_': got {name!r}")
    return RESULTS / f"{name}.jsonl"


def _lines(path: Path) -> Iterator[Record]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            yield json.loads(line)
        except ValueError as error:
            raise ValueError(f"every line of {path.name} is a JSON object: line {number} is not ({error})") from None


def _line(record: Record) -> str:
    ordered = {key: record[key] for key in FIRST_KEYS if key in record} | record
    return json.dumps(ordered, ensure_ascii=False) + "\n"


def _rank(key: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return a sort key of an identity in which None comes first."""
    return tuple((value is not None, value) if value is not None else (False,) for value in key)


if __name__ == "__main__":
    main()
