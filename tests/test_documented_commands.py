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


needs_git = pytest.mark.skipif(not (PATH.parent.parent / ".git").exists(), reason="what is cloned is a git repository")


@needs_git
def test_a_place_is_a_clean_clone_and_ends_with_the_command_that_fails(documented, monkeypatch, tmp_path, capfd):
    commands = (
        documented.Command("test -f README.md && test -z $(git status --porcelain) && test ! -e .venv"),
        documented.Command("seen by the next", "echo kept > here", "a file"),
        documented.Command("grep kept here && echo why it failed && false"),
        documented.Command("touch ../../never"),
    )
    monkeypatch.setitem(documented.PLACES, "own", documented.Place("a test", commands))
    assert documented.run_place("own", tmp_path) == [f"own: {commands[2].text}"]
    printed = capfd.readouterr().out
    assert "seen by the next  [a file]" in printed
    assert "why it failed" in printed
    assert not any(tmp_path.iterdir())  # the clone is gone, and the last command did not run


@needs_git
def test_a_command_sees_a_readers_shell(documented, monkeypatch, tmp_path, capfd):
    """The variables of this process, such as the place of its environment, would hide what a clean clone lacks."""
    for name in ("VQSSL_VENV", "PYTHONPATH", "CI", "VIRTUAL_ENV"):
        monkeypatch.setenv(name, str(tmp_path))
    line = 'echo "[$VQSSL_VENV$PYTHONPATH$CI$VIRTUAL_ENV]" | grep -x "\\[\\]" && python3 -c "import sys"'
    # -u of the shell would refuse what is not set.
    monkeypatch.setitem(documented.PLACES, "own", documented.Place("a test", (documented.Command(f"set +u; {line}"),)))
    assert documented.run_place("own", tmp_path / "") == []
    capfd.readouterr()
