"""Differences from BYOL of a sweep whose variants were chosen on some seeds and are judged on others.

A variant that looks best among many owes part of it to chance, and that part does not come back with new seeds. So the
seeds that chose and those that judge stand in columns of their own.
"""

from __future__ import annotations

import numpy as np

from examples.pretrain.reports.evaluation import interval, markdown
from examples.pretrain.reports.pairing import device_note
from examples.pretrain.reports.sweep import Records, auc, gains, ordered, shares_of
from examples.pretrain.reports.text import table_cell

CHOOSING = 6
"""Seeds below it chose; those from it on judge."""
SHOWN = ("0.01", "0.05", "1")
"""Shares of the labels in the table."""


def parts_of(records: Records, choosing: int = CHOOSING) -> tuple[Records, Records]:
    """Return the records of the seeds that chose, below `choosing`, and of those that judge."""
    chose, judge = (
        {
            name: {key: run for key, run in runs.items() if (key.seed < choosing) == first}
            for name, runs in records.items()
        }
        for first in (True, False)
    )
    return chose, judge


def cell(values: list[float]) -> str:
    r"""Return mean and 95% interval with a sign, and the number of values; a dash where there is none.

    >>> cell([1.0, 3.0])
    '+2.0\xa0±\xa012.7 (2)'
    """
    if not values:
        return "–"
    mean, half = interval([[value] for value in values])
    spread = "" if half is None else f"\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}{half:.1f}"
    return f"{mean:+.1f}{spread} ({len(values)})"


def table(records: Records) -> str:
    """Return the table as markdown: AUC of all seeds, then differences from BYOL, seed by seed."""
    shares = [share for share in SHOWN if share in shares_of(records)]
    chose, judge = parts_of(records)
    percent = [f"{100 * float(share):g}%" for share in shares]
    header = ["variant", "seeds", *percent]
    header += [f"over BYOL, {share}, seeds that {which}" for which in ("chose", "judge") for share in percent]
    rows = []
    for name in ordered(records):
        own = list(records[name].values())
        cells = [f"{np.mean([auc(record, share) for record in own]):.1f}" for share in shares]
        for part in (chose, judge):
            compared = name not in ("byol", "random")
            cells += [cell(gains(part, name, share)) if compared else "–" for share in shares]
        rows.append([table_cell(name), str(len(own)), *cells])
    keys = [key for runs in records.values() for key in runs]
    return f"{markdown(header, rows)}\n\n{device_note(keys)}\n"
