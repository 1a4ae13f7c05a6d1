"""`python3 tests [OPTIONS]`: make the environment if needed, then run pytest in the root of the repository.

Works from any folder. Every option of pytest may follow, for example `-k codebook`, `-m "not slow"` or `--cov`.
`--thorough` also runs the long tests, as `.ci/run` does.
"""

import importlib.util
import sys
from pathlib import Path


def main():
    path = Path(__file__).resolve().parent.parent / ".ci" / "environment.py"
    spec = importlib.util.spec_from_file_location("environment", path)
    environment = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(environment)
    environment.run(["examples", "test"], ["-m", "pytest", *sys.argv[1:]])


if __name__ == "__main__":
    main()
