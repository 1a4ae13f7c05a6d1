"""The code on the pages runs, and the files, modules and tests that the pages name exist."""

import functools
import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch
import torch._dynamo

import vqssl
from examples.pretrain.demonstration import Demonstration, main
from tests.profiles import thorough

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
BUILT = {"_build", "_generated", "generated", "gallery"}  # folders that the docs build writes
MARKDOWN = [path.relative_to(ROOT) for path in (ROOT / "README.md", *sorted(DOCS.rglob("*.md")))]
TEXTS = {path.as_posix(): (ROOT / path).read_text(encoding="utf-8") for path in MARKDOWN if not BUILT & {*path.parts}}

PAGES = {
    "code-prediction.md": 2,
    "training.md": 5,
    "get-started.md": 6,
    "health.md": 1,
    "saving.md": 2,
    "migration.md": 1,
    "upgrading.md": 2,
    "faq.md": 2,
    "resume.md": 1,
}
"""Page to its least number of blocks: without it, a page that lost its code would pass."""
SLOW = {"get-started.md", "health.md", "training.md"}
"""Pages with a thousand steps, or a compiled step."""
EXAMPLE_NAMES = {"test_tie_goes_to_lowest_index"}
"""Tests that a page names as an example of a good name."""


@pytest.fixture(scope="module")
def demonstration(tmp_path_factory):
    """Return a folder with the files that a command on get-started makes, of a tiny run."""
    folder = tmp_path_factory.mktemp("clone")
    out = folder / "runs" / "demonstration"
    main(Demonstration(out=out, phantoms=100, epochs=1))
    return folder


@pytest.mark.parametrize("page", [thorough(page) if page in SLOW else page for page in PAGES])
def test_code_of_page_runs(page, request, monkeypatch):
    if page == "get-started.md":
        monkeypatch.chdir(request.getfixturevalue("demonstration"))
    blocks = re.findall(r"```python\n(.*?)```", TEXTS[f"docs/{page}"], flags=re.DOTALL)
    assert len(blocks) >= PAGES[page]
    torch._dynamo.reset()
    names = {}
    for block in blocks:
        exec(compile(block, page, "exec"), names)
    for codebook in (value for value in names.values() if isinstance(value, vqssl.EMACodebook)):
        assert codebook.initialized
        assert torch.isfinite(codebook.embed).all()


@pytest.mark.parametrize("page", TEXTS)
def test_modules_of_commands_exist(page):
    """`python -m examples.pretrain.ablate` on a page names a module of this repository."""
    modules = re.findall(r"python -m ((?:benchmarks|examples|tests|vqssl)(?:\.[a-z_0-9]+)*)", TEXTS[page])
    paths = {module: ROOT.joinpath(*module.split(".")) for module in modules}
    missing = [name for name, path in paths.items() if not (path.with_suffix(".py").is_file() or path.is_dir())]
    assert missing == []


@pytest.mark.parametrize("page", TEXTS)
def test_tests_on_page_exist(page):
    """`test_only_the_classifier_is_missing` on a page is a test or a file of tests."""
    named = set(re.findall(r"(?<![\w.-])test_\w+", TEXTS[page]))
    assert named <= names_of_tests() | EXAMPLE_NAMES


@functools.cache
def names_of_tests():
    """Return the names of all tests and of their files."""
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py")]
    defined = {name for source in sources for name in re.findall(r"^def (test_\w+)", source, flags=re.MULTILINE)}
    return defined | {path.stem for path in (ROOT / "tests").rglob("test_*.py")}


@pytest.mark.parametrize("page", TEXTS)
def test_links_to_files_exist(page):
    """Links work on GitHub too, where nothing is built."""
    links = re.findall(r"\]\(([^)#\s]+)", TEXTS[page])
    local = [link for link in links if not re.match(r"[a-z]+:|/", link)]
    if (ROOT / "PKG-INFO").exists():  # an unpacked sdist, which leaves pictures out
        local = [link for link in local if not link.endswith(".png")]
    assert [link for link in local if not (ROOT / page).parent.joinpath(link).exists()] == []


def public_names():
    """Return each name of a summary table on the page of the API, with its module."""
    module, found = "vqssl", []
    for line in TEXTS["docs/api/index.md"].splitlines():
        if line.startswith(".. currentmodule:: "):
            module = line.split()[-1]
        elif re.fullmatch(r" {3}[A-Za-z_]\w*", line):
            found.append(f"{module}.{line.strip()}")
    return found


@pytest.mark.parametrize("name", public_names())
def test_first_sentence_stands_alone_in_the_summary(name):
    """Summary tables cut a docstring at the first full stop before a space: "see Eq. 6" becomes "see Eq."."""
    module, _, attribute = name.rpartition(".")
    paragraph = inspect.getdoc(getattr(importlib.import_module(module), attribute)).split("\n\n")[0]
    first = re.split(r"(?<=\.)\s", paragraph.replace("\n", " "))[0]
    assert first.endswith(".")
    assert not re.search(r"\b(Eqs?|Sec|Fig|No|cf|vs|e\.g|i\.e|etc)\.$", first)
