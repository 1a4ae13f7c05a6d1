"""The log of a run: `metrics.csv`, TensorBoard events where it is installed, and one line an epoch on the terminal."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

Row = dict[str, float]
"""The figures of an epoch by column."""


class Log:
    """`metrics.csv` and TensorBoard events in a folder, begun with the rows of the epochs so far.

    TensorBoard is used where it is installed.

    Args:
        folder: created if needed.
        rows: of a resumed run; the file is written again from its first epoch.
    """

    def __init__(self, folder: Path, rows: list[Row]) -> None:
        self.folder = folder
        self.rows = list(rows)
        self.board: Any = None

    def __enter__(self) -> Log:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file = (self.folder / "metrics.csv").open("w", newline="")
        self.writer: csv.DictWriter[str] | None = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            pass
        else:
            self.board = SummaryWriter(str(self.folder), purge_step=len(self.rows) + 1)
        for row in self.rows:
            self._to_csv(row)
        return self

    def write(self, row: Row) -> None:
        """Add the figures of an epoch."""
        self._to_csv(row)
        if self.board is not None:
            for name, value in row.items():
                self.board.add_scalar(name, value, int(row["epoch"]))

    def _to_csv(self, row: Row) -> None:
        if self.writer is None:
            # The last row has the most columns: a run may have been started without a monitor.
            self.writer = csv.DictWriter(self.file, list(self.rows[-1] if self.rows else row), extrasaction="ignore")
            self.writer.writeheader()
        self.writer.writerow({name: f"{value:.6g}" for name, value in row.items()})
        self.file.flush()

    def __exit__(self, *error: object) -> None:
        self.file.close()
        if self.board is not None:
            self.board.close()


def line_of(method: str, row: Row, epochs: int) -> str:
    """Return the figures of an epoch in one line; columns that share a first word stand together.

    >>> line_of("x", {"epoch": 2, "loss": 0.51, "dead_layer2": 0, "dead_layer3": 7, "lr": 0.1, "seconds": 61.2}, 9)
    'x 2/9  loss 0.51  dead 0 / 7  61 s'
    """
    groups: dict[str, list[str]] = {}
    for name in row:
        if name not in ("epoch", "lr", "seconds"):
            groups.setdefault(name.partition("_")[0], []).append(name)
    parts = [
        f"{names[0] if len(names) == 1 else word} {' / '.join(f'{row[name]:.3g}' for name in names)}"
        for word, names in groups.items()
    ]
    return "  ".join([f"{method} {row['epoch']:.0f}/{epochs}", *parts, f"{row['seconds']:.0f} s"])
