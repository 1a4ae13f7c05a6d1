"""Run short versions of the CPU benchmarks, about three minutes, and print their tables: `python -m benchmarks`.

With `--dry` tiny sizes try the programs in seconds; their figures mean nothing.
"""

import argparse
import json
import runpy
import sys

from benchmarks.harness import run_file
from benchmarks.report import memory_section, table


def main() -> None:
    """Run the benchmarks one after the other and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="try the programs in seconds; measure nothing")
    extent = "dry" if parser.parse_args().dry else "quick"
    found = {}
    for name in ("search", "train_step", "memory"):
        sys.argv = [f"benchmarks/{name}.py", f"--{extent}"]
        runpy.run_module(f"benchmarks.{name}", run_name="__main__")
        found[name] = json.loads(run_file(name, "cpu", extent).read_text())
    rows = [
        [case["shape"], case["threads"], *(f"{name} {entry['ratio']:.2f}" for name, entry in case["times"].items())]
        for case in found["search"]["cases"]
    ]
    print(table(["search", "threads", *("" for _ in rows[0][2:])], rows))
    cases = found["train_step"]["cases"]
    rows = [
        [case["shape"], case["threads"], *(f"{name} {entry['ratio']:.2f}" for name, entry in case["times"].items())]
        for case in cases
    ]
    print(table(["training step", "threads", *("" for _ in rows[0][2:])], rows))
    print(memory_section("CPU", found["memory"]))


if __name__ == "__main__":
    main()
