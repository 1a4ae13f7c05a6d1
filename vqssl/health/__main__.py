"""``python -m vqssl.health CHECKPOINT``: a table, JSON or a picture of the codebooks in a file."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from vqssl.health import draw, examine, read_checkpoint, show
from vqssl.health.finding import worst

EPILOGUE = """exit codes: 0 a report was made; 1 with --strict, where a finding says act; 2 there is no report (no such
file, no codebook in it, a missing package) or no picture (the report is printed first)."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m vqssl.health", description=__doc__, epilog=EPILOGUE)
    parser.add_argument(
        "checkpoint", type=Path, help="what torch.save wrote (state dicts, nested or not), or .safetensors"
    )
    parser.add_argument("--since", type=Path, metavar="OLD", help="an earlier checkpoint: adds drift and turnover")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else; needs no rich")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="also draw a page (.png, .pdf, .svg)")
    parser.add_argument("--strict", action="store_true", help="exit with 1 where a finding says act")
    parser.add_argument(
        "--decay", type=float, default=0.99, help="of the codebooks, which a state does not hold (0.99)"
    )
    parser.add_argument(
        "--dead-below",
        type=float,
        default=0.1,
        metavar="TAU",
        help="a code is dead below this fraction of the fair share (0.1)",
    )
    options = parser.parse_args(arguments)
    try:
        reports = examine(
            read_checkpoint(options.checkpoint),
            since=None if options.since is None else read_checkpoint(options.since),
            decay=options.decay,
            dead_below=options.dead_below,
        )
        level = worst(finding for report in reports.values() for finding in report.findings)
        if options.json:
            codebooks = {name: report.as_dict() for name, report in reports.items()}
            print(json.dumps({"level": level, "codebooks": codebooks}, indent=2, allow_nan=False))
        else:
            show(reports)
        if options.picture is not None:  # last: where drawing fails, the report is out
            draw(reports, options.picture, title=f"Codebook health of {options.checkpoint.name}")
            print(f"wrote {options.picture}", file=sys.stderr)
    except (ValueError, TypeError, ImportError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return int(options.strict and level == "act")


if __name__ == "__main__":
    sys.exit(main())
