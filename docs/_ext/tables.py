"""Sphinx extension: write the tables and figures that pages include, from the records in ``benchmarks/results/``.

Everything goes to ``docs/_generated/``, which git ignores. To read the tables without building the pages::

    python3 .ci/environment.py docs docs/_ext/tables.py
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.records import Record, by_device, load  # noqa: E402
from examples.pretrain.reports import differences, evaluation, judged, sweep  # noqa: E402
from tests.reliability import report as reliability  # noqa: E402

FOLDER = "_generated"


def sweep_table(records: list[Record], picture: Path) -> str:
    """Return the table of a sweep, all columns folded; draw each variant's differences from BYOL."""
    found = sweep.by_variant(records)
    differences.draw(found, picture, choosing=sweep.FIRST if judged.parts_of(found, sweep.FIRST)[1]["byol"] else 0)
    return folded(sweep.short_table(found), sweep.table(found))


def codes_table(records: list[Record], picture: Path) -> str:
    """Return the table of codes as targets, by seeds that chose and that judge; draw differences from BYOL."""
    found = sweep.by_variant(records)
    differences.draw(found, picture, choosing=judged.CHOOSING)
    return folded(judged.table(found), sweep.table(found))


def folded(shown: str, whole: str) -> str:
    """Return a table, and a wider one that opens at a click."""
    return f"{shown.rstrip()}\n\n:::{{dropdown}} All columns\n{whole.rstrip()}\n:::\n"


def again_table(records: list[Record], picture: Path) -> str:
    """Return the table of variants that were run again with other seeds."""
    return sweep.again(sweep.by_variant(records))


def evaluation_tables(records: list[Record], picture: Path) -> str:
    """Return the tables of an evaluation, one a protocol; draw scores by share of labels and masks."""
    evaluation.draw_shares(records, picture)
    return evaluation.tables(records)


def cells_table(records: list[Record], picture: Path) -> str:
    """Return the table of the per-cell lesion probe, a row for each kind of lesion and map."""
    return evaluation.upright_table(evaluation.tables_of(records)["lesion-cells"], 1)


Maker = Callable[[list[Record], Path], str]
"""Return the markdown of runs of one CPU or GPU model, and may draw a picture."""
PAGES: dict[str, tuple[Maker, str, str]] = {
    "codes-phantoms-32": (codes_table, "sweep-phantoms-32", "AUC over BYOL with 1% and 5% of the labels, by seed"),
    "sweep-kermany-32": (sweep_table, "sweep-kermany-32", "AUC over BYOL with 1% and 5% of the labels, by seed"),
    "again-kermany-32": (again_table, "sweep-kermany-32", ""),
    "sweep-kermany-64": (sweep_table, "sweep-kermany-64", "AUC over BYOL with 1% and 5% of the labels, by seed"),
    "sweep-pneumoniamnist": (sweep_table, "sweep-pneumoniamnist", "AUC over BYOL with few labels, by seed"),
    "evaluation-kermany-32": (evaluation_tables, "evaluation-kermany-32", "AUC and Dice by share of labels and masks"),
    "evaluation-kermany-64": (evaluation_tables, "evaluation-kermany-64", "AUC by share of labels"),
    "lesion-cells-phantoms-32": (cells_table, "lesion-cells-phantoms-32", ""),
    "evaluation-phantoms": (evaluation_tables, "evaluation-phantoms", "AUC and Dice by share of labels and masks"),
}
"""By the name of what a page includes: how it is made, of which records, and what its picture shows."""


def part(name: str, records: list[Record], folder: Path) -> str:
    """Return one part of a page: a table for each CPU or GPU model, since runs are only compared within one model."""
    make, source, caption = PAGES[name]
    texts = []
    for number, runs in enumerate(by_device(records).values(), 1):
        picture = folder / (f"{name}.png" if number == 1 else f"{name}-{number}.png")
        picture.unlink(missing_ok=True)
        text = make(runs, picture)
        if text:
            texts += [text.rstrip("\n"), origin(source, runs)]
        if picture.exists():
            texts.append(f"![{caption}](/{FOLDER}/{picture.name})")
    return "\n\n".join(texts) + "\n"


def origin(source: str, runs: list[Record]) -> str:
    """Return a line that says of which records and versions a table is."""
    versions = " and ".join(sorted({record["versions"]["vqssl"] for record in runs}))
    return f"*{len(runs)} records of `benchmarks/results/{source}.jsonl`, made by vqssl {versions}.*"


def write(folder: Path) -> list[Path]:
    """Write all parts and pictures into `folder`, and return the parts."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {f"{name}.md": part(name, load(source), folder) for name, (_, source, _) in PAGES.items()}
    texts["synchronisation.md"] = reliability.synchronisation()
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in texts]


def setup(app: Any) -> dict[str, Any]:
    """Write the parts before Sphinx reads the pages."""
    app.connect("builder-inited", lambda app: write(Path(app.srcdir) / FOLDER), priority=100)
    return {"parallel_read_safe": True}


if __name__ == "__main__":
    for path in write(ROOT / "docs" / FOLDER):
        print(f"\n== {path.relative_to(ROOT)}\n\n{path.read_text(encoding='utf-8')}")
