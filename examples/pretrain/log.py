"""The log of a run: `metrics.csv`, TensorBoard events where it is installed, and one line an epoch on the terminal."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from examples.pretrain.checkpoint import write_whole
from examples.pretrain.lock import hold

Row = dict[str, float]
"""The figures of an epoch by column."""


class Log:
    """`metrics.csv` and TensorBoard events in a folder, begun with the rows of the epochs so far.

    TensorBoard is used where it is installed.

    Args:
        folder: created if needed, and held against other processes.
        rows: of a resumed run; the file is written again from its first epoch.
    """

    def __init__(self, folder: Path, rows: list[Row]) -> None:
        self.folder = folder
        self.rows = list(rows)
        self.board: Any = None

    def __enter__(self) -> Log:
        hold(self.folder)
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            pass
        else:
            self.board = SummaryWriter(str(self.folder), purge_step=len(self.rows) + 1)
        self._to_csv()
        return self

    def write(self, row: Row) -> None:
        """Add the figures of an epoch."""
        self.rows.append(row)
        self._to_csv()
        if self.board is not None:
            for name, value in row.items():
                self.board.add_scalar(name, value, int(row["epoch"]))

    def _to_csv(self) -> None:
        text = io.StringIO(newline="")
        # The last row has the most columns: a run may have been started without a monitor.
        writer = csv.DictWriter(text, list(self.rows[-1] if self.rows else ()), extrasaction="ignore")
        if self.rows:
            writer.writeheader()
        writer.writerows({name: f"{value:.6g}" for name, value in row.items()} for row in self.rows)
        write_whole(self.folder / "metrics.csv", text.getvalue().encode())

    def __exit__(self, *error: object) -> None:
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
