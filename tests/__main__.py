"""`python3 tests [OPTIONS]`: make the environment if needed, then run pytest in the root of the repository.

Works from any folder. Every option of pytest may follow, for example `-k codebook`, `-m "not slow"` or `--cov`.
`--thorough` also runs the long tests, as `.ci/run` does. Files of tests are shared out between the cores; `-n 0` runs
all in one process.
"""

import importlib.util
import os
import sys
from pathlib import Path


def main():
    path = Path(__file__).resolve().parent.parent / ".ci" / "environment.py"
    spec = importlib.util.spec_from_file_location("environment", path)
    environment = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(environment)
    environment.run(["examples", "test"], ["-m", "pytest", *shared_out(sys.argv[1:]), *sys.argv[1:]])


def shared_out(options):
    """Return pytest's options for a process a core, unless the user says otherwise or debugs."""
    own = ("-n", "--numprocesses", "--dist", "--pdb", "--trace", "-s", "--capture=no")
    cores = min(os.cpu_count() or 1, 8)
    if cores == 1 or any(option.startswith(own) for option in options):
        return []
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # a process a core: more threads would only wait for each other
    return ["-n", str(cores), "--dist", "loadfile"]


if __name__ == "__main__":
    main()
