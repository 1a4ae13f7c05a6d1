"""The committed table is the one that the committed results make, and the gauges measure what they say."""

import json

import torch

from benchmarks import harness, memory, report, search


def test_the_table_is_made_of_the_results():
    assert report.PAGE.read_text() == report.page(), "run python -m benchmarks.report and commit what it writes"


def test_every_result_says_where_it_comes_from():
    paths = sorted(report.RESULTS.glob("c*.json"))
    assert paths
    for path in paths:
        result = json.loads(path.read_text())
        assert result["command"].startswith("python -m benchmarks."), path
        assert result["device"], path
        assert result["versions"]["torch"], path
        assert result["commit"], path


def test_the_search_was_exact_when_it_was_timed():
    for _, result in report.load("search"):
        assert all(case["rows differing"]["vqssl"] == 0 for case in result["cases"])
        assert all(row["percent differing"]["vqssl"] == 0 for row in result["exactness"])


def test_the_gauge_of_memory():
    memory.try_gauge("cpu")
    assert memory.peak(lambda: torch.zeros(2**20).double(), "cpu") == 3 * 2**22


def test_rounding_to_tf32():
    x = torch.tensor([1.0, 1 + 2**-10, 1 + 2**-11, 1 + 3 * 2**-11, -1.1])
    assert search.to_tf32(x).tolist()[:4] == [1.0, 1 + 2**-10, 1.0, 1 + 2**-9]
    assert abs(search.to_tf32(x)[4] + 1.1) < 2**-11


def test_every_runner_takes_its_turn():
    calls = []
    times = harness.race({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 4)
    assert calls.count("a") == calls.count("b") == 6
    assert times["a"]["rounds"] == 4
    harness.ratios(times, "a")
    assert times["a"]["ratio"] == 1
