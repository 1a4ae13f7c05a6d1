"""``python -m vqssl.health CHECKPOINT``: print a table, JSON or a picture of the codebooks in a file."""

import argparse
import contextlib
import io
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from vqssl.health import draw, examine, read_checkpoint, show
from vqssl.health.sources import printable
from vqssl.health.verdict import worst

EPILOGUE = """exit codes: 0 a report was made; 1 with --strict, if a finding says act; 2 there is no report (no such
file, no codebook in it, a missing package) or no picture (the report is printed first); 130 after Ctrl-C."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m vqssl.health", description=__doc__, epilog=EPILOGUE)
    add = parser.add_argument
    add("checkpoint", type=Path, help="a file of torch.save (state dicts, nested or not), or a .safetensors")
    add("--since", type=Path, metavar="OLD", help="an earlier checkpoint: adds drift and turnover")
    add("--json", action="store_true", help="print JSON and nothing else; does not need rich")
    add("--picture", type=Path, metavar="FILE", help="also draw a page (.png, .pdf, .svg)")
    add("--strict", action="store_true", help="exit with 1 if a finding says act")
    add("--decay", type=float, default=0.99, help="decay of the codebooks, which a state does not hold (0.99)")
    add("--dead-below", type=float, default=0.1, metavar="TAU", help="dead below this fraction of the fair share (0.1)")
    options = parser.parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what a terminal's encoding lacks is shown as an escape
            stream.reconfigure(errors="backslashreplace")
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
        sys.stdout.flush()  # what cannot be written is said here, not when Python ends
        if options.picture is not None:  # last, so that the report is printed even if drawing fails
            draw(reports, options.picture, title=printable(f"Codebook health of {options.checkpoint.name}"))
            print(printable(f"wrote {options.picture}"), file=sys.stderr)
    except Exception as error:  # with any other the process would end with 1, which means "act"
        expected = isinstance(error, ValueError | TypeError | ImportError | OSError)
        reason = str(error) if expected else f"no report of this file: {type(error).__name__}: {error}"
        print(f"{parser.prog}: {printable(reason)}", file=sys.stderr)
        _forget_unwritten()
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    return int(options.strict and level == "act")


def _forget_unwritten() -> None:
    """Drop what the standard output could not take: Python would complain of it once more at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError, ValueError):  # replaced by something that is no file
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
