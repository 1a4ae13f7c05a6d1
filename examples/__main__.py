"""`python3 examples [OPTIONS]`: create the environment if needed, then run `examples.pretrain`.

It works from any folder; relative paths in the options are relative to that folder. `--help` lists the options.
"""

import importlib.util
import sys
from pathlib import Path


def main():
    """Replace this process by `python -m examples.pretrain` in the environment of the repository."""
    path = Path(__file__).resolve().parent.parent / ".ci" / "environment.py"
    spec = importlib.util.spec_from_file_location("environment", path)
    environment = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(environment)
    try:
        environment.run(["examples"], ["-m", "examples.pretrain", *sys.argv[1:]], cwd=None)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
