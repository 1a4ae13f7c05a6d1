"""Run the reliability tests and record how many of each file passed, failed or were skipped.

`python -m tests.reliability.suite [--trial]`
"""

import collections
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path

from benchmarks.provenance import ROOT
from tests.reliability.record import write


def main() -> None:
    """Run the tests and write the record."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        # test_report.py is left out: it reads the page that these counts go into.
        places = ["tests/reliability", "tests/test_distributed.py", "--ignore=tests/reliability/test_report.py"]
        command = [sys.executable, "-m", "pytest", "-q", "--thorough", *places, f"--junitxml={report}"]
        done = subprocess.run(command, cwd=ROOT, check=False)
        cases = ET.parse(report).getroot().iter("testcase")
    found: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for case in cases:
        outcome = "failed" if any(part.tag in ("failure", "error") for part in case) else "passed"
        outcome = "skipped" if any(part.tag == "skipped" for part in case) else outcome
        found[case.attrib["classname"].split(".")[-1]][outcome] += 1
    files = {name: dict(counts) for name, counts in sorted(found.items())}
    if done.returncode:
        raise SystemExit(f"some tests failed, so nothing is recorded: {files}")
    write("suite", "python -m tests.reliability.suite", {"files": files}, trial="--trial" in sys.argv)


if __name__ == "__main__":
    main()
