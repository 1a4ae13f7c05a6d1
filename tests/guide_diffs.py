"""Write the differences that the guides show: run `python -m tests.guide_diffs` after changing a drop-in script."""

import difflib
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "examples" / "drop_in"
GUIDES = ROOT / "docs" / "guides"
BLOCK = re.compile(r"```diff\n.*?```\n", flags=re.DOTALL)


def diff_block(name: str) -> str:
    """Return the difference between the two scripts of a guide, as a block of Markdown."""
    paths = [SCRIPTS / "before" / f"{name}.py", SCRIPTS / f"{name}.py"]
    before, after = (path.read_text(encoding="utf-8").splitlines(keepends=True) for path in paths)
    changes = difflib.unified_diff(before, after, f"before/{name}.py", f"{name}.py", n=2)
    return "```diff\n" + "".join(changes) + "```\n"


def with_diff(page: str, name: str) -> str:
    """Return the text of a guide with the current difference in it."""
    updated, count = BLOCK.subn(lambda _: diff_block(name), page)
    assert count == 1, f"{name}: a guide shows one difference, found {count}"
    return updated


if __name__ == "__main__":
    for path in GUIDES.glob("*.md"):
        if path.stem != "index":
            path.write_text(with_diff(path.read_text(encoding="utf-8"), path.stem), encoding="utf-8")
