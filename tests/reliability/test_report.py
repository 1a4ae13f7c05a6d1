"""The pages are what the kept results say, and those were kept from whole runs."""

import pytest

from tests.reliability import report


def test_the_pages_are_made_of_the_results():
    assert report.PAGE.read_text() == report.page(), "run python -m tests.reliability.report"
    assert report.SYNC.read_text() == report.sync(), "run python -m tests.reliability.report"


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("kills", {"kills": 50}),
        ("fuzz", {"inputs": 100_000}),
        ("long_run", {"steps": 20_000}),
        ("band", {"steps": 500}),
    ],
)
def test_results_are_of_whole_runs(name, least):
    record = report.load(name)
    for key, value in least.items():
        assert record[key] >= value


def test_nothing_was_lost():
    assert report.load("kills")["of them other than in the unbroken run"] == 0
    assert report.load("fuzz")["other errors, changed or unsound state"] == 0
    assert report.load("long_run")["numbers that are not finite"] == 0
    assert [run["of them that differ"] for run in report.load("ranks")["runs"]] == [0, 0]
    for counts in report.load("suite")["files"].values():
        assert set(counts) == {"passed"}
