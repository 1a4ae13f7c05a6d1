"""Each command of README, Makefile and get-started is run by `.ci/run commands`, or left out there with a reason."""

import importlib.util
from pathlib import Path

import pytest

PATH = Path(__file__).parent.parent / ".ci" / "documented.py"


@pytest.fixture(scope="module")
def documented():
    spec = importlib.util.spec_from_file_location("documented", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_command_is_forgotten_or_stale(documented):
    assert documented.disagreements() == []
    assert len(documented.documented()) >= 20  # the pages were read


@pytest.mark.parametrize(
    ("markdown", "commands"),
    [
        ("```sh\nmake a  # why\n\n# a comment\npip install x \\\n  y\n```", ["make a", "pip install x y"]),
        ("- a list:\n\n  ```bash\n  .ci/run\n  ```", [".ci/run"]),
        ("Write `python -m vqssl.health\nFILE`.", ["python -m vqssl.health FILE"]),
        ("```{image} x\n```\nthen `.ci/run` and\n`make docs`.", [".ci/run", "make docs"]),
        ("`EMACodebook`, `python`, `pip`, `--help`, `make`; `runs/demo-1`", []),
        ("```python\nimport make\n```\n`codebook.usage()`", []),
    ],
)
def test_commands_are_found_in_blocks_and_sentences(documented, markdown, commands):
    assert list(documented.commands_of(markdown)) == commands


def with_pages(documented, monkeypatch, tmp_path, old, new):
    """Let the pages be those of the repository, with one change."""
    texts = {page: (documented.ROOT / page).read_text(encoding="utf-8") for page in (*documented.PAGES, "Makefile")}
    assert any(old in text for text in texts.values())
    for page, text in texts.items():
        (tmp_path / page).parent.mkdir(exist_ok=True)
        (tmp_path / page).write_text(text.replace(old, new), encoding="utf-8")
    monkeypatch.setattr(documented, "ROOT", tmp_path)
    return documented.disagreements()


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("pip install .  #", "pip install . --new  #", "`pip install . --new` is neither run nor left out"),
        ("`make docs`", "`make docs` or `make more`", "README.md: `make more` is neither run"),
        ("bench:\n", "later:\n\tpython3 later\n\nbench:\n", "Makefile: `make later` is neither run"),
        ("demo:\n\tpython3 examples", "demo:\n\tpython3 examples small", "`make demo`: its recipe is another one"),
        ("lint:\n\t.ci/run lint\n", "", "`make lint` stands on no page"),
    ],
)
def test_a_changed_page_is_seen(documented, monkeypatch, tmp_path, old, new, says):
    found = with_pages(documented, monkeypatch, tmp_path, old, new)
    assert any(says in each for each in found), found


def test_a_change_without_a_word_is_seen(documented, monkeypatch):
    command = documented.Command("make docs", "make docs --dry-run")
    monkeypatch.setitem(documented.PLACES, "docs", documented.Place("README", (command,)))
    assert "`make docs` is changed without a word" in documented.disagreements()
