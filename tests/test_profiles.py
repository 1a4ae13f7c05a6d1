"""Thorough tests are left out by default, and the run says so."""

from pathlib import Path

import hypothesis
import pytest

pytest_plugins = "pytester"
CONFTEST = Path(__file__).parent / "conftest.py"
TESTS = """
import hypothesis, pytest

def test_short():
    assert hypothesis.settings().max_examples == EXAMPLES

@pytest.mark.thorough
def test_long():
    pass

@pytest.mark.thorough
def test_long_too():
    pass
"""


@pytest.fixture
def run(pytester, monkeypatch):
    """Run three tests, two of them thorough, with this project's conftest.py."""
    profile = hypothesis.settings.get_current_profile_name()
    monkeypatch.delenv("CI", raising=False)
    pytester.makeconftest(CONFTEST.read_text(encoding="utf-8"))
    pytester.makeini("[pytest]\nmarkers = thorough")

    def run(*options, examples):
        pytester.makepyfile(TESTS.replace("EXAMPLES", str(examples)))
        return pytester.runpytest_inprocess("-q", *options)

    yield run
    hypothesis.settings.load_profile(profile)


def test_thorough_tests_are_left_out_in_one_visible_line(run):
    result = run(examples=10)
    result.assert_outcomes(passed=1, deselected=2)
    result.stdout.fnmatch_lines(["2 thorough tests were not run: `python3 tests --thorough` and `.ci/run` run them"])


def test_option_runs_thorough_tests(run):
    result = run("--thorough", examples=150)
    result.assert_outcomes(passed=3)
    result.stdout.no_fnmatch_line("*thorough*")


def test_ci_runs_thorough_tests(run, monkeypatch):
    monkeypatch.setenv("CI", "true")
    run(examples=150).assert_outcomes(passed=3)
