"""The page of reliability is made from the records, and the records are of complete runs."""

import pytest

from tests.reliability import report


def test_page_equals_the_records():
    assert report.PAGE.read_text() == report.page(), "run python -m tests.reliability.report"


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("kills", {"kills": 50}),
        ("fuzz", {"inputs": 100_000}),
        ("long_run", {"steps": 20_000}),
        ("band", {"steps": 500}),
        ("attempts", {"attempts": 190}),
        ("attempts of full_disk", {"attempts": 33}),
        ("attempts of odd_options", {"attempts": 24}),
        ("attempts of signals", {"attempts": 13}),
    ],
)
def test_records_are_of_complete_runs(name, least):
    record = report.load(name)
    for key, value in least.items():
        assert record[key] >= value


def test_records_show_no_loss_and_no_failure():
    assert report.load("kills")["of them other than in the unbroken run"] == 0
    assert report.load("fuzz")["other errors, changed or unsound state"] == 0
    assert [one["lost"] for one in report.attempt_records().values()] == [0] * len(report.attempt_records())
    assert report.load("long_run")["numbers that are not finite"] == 0
    assert [run["of them that differ"] for run in report.load("ranks")["runs"]] == [0, 0]
    for counts in report.load("suite")["files"].values():
        assert set(counts) == {"passed"}
