"""Records of reliability runs: written to runs/reliability/, kept by `python -m benchmarks.records add reliability`."""

import json

from benchmarks import records
from benchmarks.provenance import provenance


def write(kind, command, figures, *, device="cpu", trial=False):
    """Print the figures, and write them with their provenance to a file unless the run is a trial."""
    print(json.dumps(figures, indent=1))
    if not trial:
        record = {"kind": kind, **provenance(command, device), **figures}
        records.write_run(records.RUNS / "reliability" / f"{device}.{kind}.json", record)
