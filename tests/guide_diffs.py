"""The differences that the guides show, written into them: `python -m tests.guide_diffs` after a change of a script."""

import difflib
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STORIES = ROOT / "examples" / "drop_in"
GUIDES = ROOT / "docs" / "guides"
BLOCK = re.compile(r"```diff\n.*?```\n", flags=re.DOTALL)


def block_of(name: str) -> str:
    """What a story changes, as a block of its page."""
    paths = [STORIES / "before" / f"{name}.py", STORIES / f"{name}.py"]
    before, after = (path.read_text(encoding="utf-8").splitlines(keepends=True) for path in paths)
    changes = difflib.unified_diff(before, after, f"before/{name}.py", f"{name}.py", n=2)
    return "```diff\n" + "".join(changes) + "```\n"


def with_diff(page: str, name: str) -> str:
    """The page with the block as it should be."""
    found, count = BLOCK.subn(lambda _: block_of(name), page)
    assert count == 1, f"{name}: a guide shows one difference, found {count}"
    return found


if __name__ == "__main__":
    for path in GUIDES.glob("*.md"):
        if path.stem != "index":
            path.write_text(with_diff(path.read_text(encoding="utf-8"), path.stem), encoding="utf-8")
