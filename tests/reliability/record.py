"""Results of the reliability runs: JSON files that docs/reliability.md is made of."""

import json
import platform
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

import vqssl

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "reliability"


def keep(name, command, figures, keep_it=True):
    """Print the figures, and write them to docs/reliability/NAME.json unless it is only a trial."""
    print(json.dumps(figures, indent=1))
    if not keep_it:
        return
    RESULTS.mkdir(exist_ok=True)
    record = {
        "command": command,
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {
            "vqssl": vqssl.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        **figures,
    }
    path = RESULTS / f"{name}.json"
    lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in record.items()]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"written: docs/reliability/{path.name}")
