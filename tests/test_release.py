"""One version everywhere, and a changelog that says what is in it."""

import datetime
import re
import tomllib
from pathlib import Path

import pytest

import vqssl

ROOT = Path(__file__).parent.parent
KINDS = ("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security")


def number(version):
    """(0, 2, 0) of "0.2.0"."""
    return tuple(map(int, re.fullmatch(r"(\d+)\.(\d+)\.(\d+)", version).groups()))


def sections(changelog):
    """Return heading and text of each version, newest first."""
    parts = re.split(r"^## (.*)$", changelog, flags=re.MULTILINE)[1:]
    return list(zip(parts[::2], parts[1::2], strict=True))


def faults(changelog, version):
    """Return what is wrong with a changelog, for the version that the package has."""
    found, released = [], []
    (first, unreleased), *others = sections(changelog)
    if first != "[Unreleased]":
        found.append(f"the first section is {first}, not [Unreleased]")
    for heading, text in others:
        match = re.fullmatch(r"\[(\d+\.\d+\.\d+)\] - (\d{4}-\d\d-\d\d)", heading)
        if match is None:
            found.append(f"heading {heading!r}")
            continue
        released.append((number(match[1]), datetime.date.fromisoformat(match[2])))
        if not re.search(r"^- ", text, flags=re.MULTILINE):
            found.append(f"{heading} is empty")
    if released != sorted(released, reverse=True) or len({each for each, _ in released}) < len(released):
        found.append("versions or dates do not fall")
    kinds = re.findall(r"^### (.*)$", changelog, flags=re.MULTILINE)
    found += [f"kind {kind!r}" for kind in kinds if kind not in KINDS]
    newest = released[0][0] if released else (0, 0, 0)
    # Until the day of its release a version is that of [Unreleased].
    if number(version) != newest and not (number(version) > newest and "\n- " in unreleased):
        found.append(f"{version} has no section")
    return found


def test_version_stands_in_one_place_and_the_citation_repeats_it():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "version" not in project["project"]
    assert project["tool"]["hatch"]["version"]["path"] == "vqssl/__init__.py"
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.findall(r"^version: (.*)$", citation, flags=re.MULTILINE) == [vqssl.__version__]


def test_changelog_has_a_section_for_the_version():
    assert faults((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), vqssl.__version__) == []


UNRELEASED = "## [Unreleased]\n\n### Added\n\n- New.\n\n"
OLD = "## [0.1.0] - 2026-11-25\n\n### Added\n\n- First.\n"
EMPTY = "## [Unreleased]\n\n"
NEW = "## [0.2.0] - 2026-11-28\n\n### Fixed\n\n- A fault.\n\n"


@pytest.mark.parametrize(
    ("changelog", "version", "wrong"),
    [
        (UNRELEASED + OLD, "0.1.0", []),  # after a release, before the next
        (UNRELEASED + OLD, "0.2.0", []),  # before its release
        (EMPTY + NEW + OLD, "0.2.0", []),  # on the day
        (EMPTY + OLD, "0.2.0", ["0.2.0 has no section"]),
        (EMPTY + NEW + OLD, "0.1.0", ["0.1.0 has no section"]),
        (EMPTY + OLD + NEW, "0.1.0", ["versions or dates do not fall"]),
        (EMPTY + NEW + NEW + OLD, "0.2.0", ["versions or dates do not fall"]),
        (EMPTY + NEW.replace("- A fault.", "") + OLD, "0.2.0", ["[0.2.0] - 2026-11-28 is empty"]),
        (EMPTY + NEW.replace(" - 2026-11-28", "") + OLD, "0.1.0", ["heading '[0.2.0]'"]),
        (EMPTY + NEW.replace("Fixed", "Mended") + OLD, "0.2.0", ["kind 'Mended'"]),
        (NEW + OLD, "0.1.0", ["the first section is [0.2.0] - 2026-11-28, not [Unreleased]"]),
    ],
)
def test_a_changelog_that_lacks_something_is_seen(changelog, version, wrong):
    assert faults(changelog, version) == wrong
