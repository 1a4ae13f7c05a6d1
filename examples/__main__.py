"""`python3 examples [OPTIONS]`: make the environment if needed, then run `examples.pretrain`.

Works from any folder; relative paths among the options are the user's own. `--help` lists them.
"""

import importlib.util
import sys
from pathlib import Path


def main():
    path = Path(__file__).resolve().parent.parent / ".ci" / "environment.py"
    spec = importlib.util.spec_from_file_location("environment", path)
    environment = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(environment)
    environment.run(["examples"], ["-m", "examples.pretrain", *sys.argv[1:]], cwd=None)


if __name__ == "__main__":
    main()
