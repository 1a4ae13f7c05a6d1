"""The page of results equals the kept records, and the benchmarks measure what they say."""

import json

import pytest
import torch

from benchmarks import harness, memory, records, report, search


def test_page_equals_the_records():
    assert report.PAGE.read_text(encoding="utf-8") == report.page(), "run python -m benchmarks.report and commit it"


@pytest.mark.parametrize("name", report.SECTIONS)
def test_every_benchmark_record_is_complete(name):
    for record in records.load(name):
        records.check(record)
        assert record["kind"] == name
        assert record["command"].startswith("python -m benchmarks.")
        assert record["versions"]["torch"]


def test_each_model_has_a_section_of_its_own(monkeypatch):
    one = records.load("memory")[0]
    several = [one, one | {"device": "another CPU"}, one | {"device": "a GPU", "cores": None}]
    monkeypatch.setattr(report, "load", lambda name: several)
    assert list(report.places("memory")) == ["cpu", "cpu-2", "gpu"]


def test_search_was_exact_when_it_was_timed():
    for record in records.load("search"):
        assert all(case["rows differing"]["vqssl"] == 0 for case in record["cases"])
        assert all(row["percent differing"]["vqssl"] == 0 for row in record["exactness"])


def test_peak_memory_of_known_allocations():
    memory.check_peak("cpu")
    assert memory.peak(lambda: torch.zeros(2**20).double(), "cpu") == 3 * 2**22


def test_rounding_to_tf32():
    x = torch.tensor([1.0, 1 + 2**-10, 1 + 2**-11, 1 + 3 * 2**-11, -1.1])
    assert search.to_tf32(x).tolist()[:4] == [1.0, 1 + 2**-10, 1.0, 1 + 2**-9]
    assert abs(search.to_tf32(x)[4] + 1.1) < 2**-11


def test_every_runner_is_timed_equally_often():
    calls = []
    times = harness.race({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 4)
    assert calls.count("a") == calls.count("b") == 6
    assert times["a"]["rounds"] == 4
    harness.ratios(times, "a")
    assert times["a"]["ratio"] == 1


def test_a_written_run_can_be_added(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "RUNS", tmp_path)
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    for arguments, extent in (["--quick"], "quick"), (["--dry"], "dry"), ([], ""):
        harness.write("memory", harness.options_of(None).parse_args(arguments), {"MiB": 3.0})
        assert harness.run_file("memory", "cpu", extent).exists()
    records.main(["add", "memory", str(harness.run_file("memory", "cpu"))])
    (record,) = records.load("memory")
    assert (record["kind"], record["MiB"]) == ("memory", 3.0)


def test_a_run_that_goes_on_keeps_what_it_has(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "RUNS", tmp_path)
    options = harness.options_of(None).parse_args([])
    harness.write("search", options, {"cases": [1]}, part=True)
    (part,) = (tmp_path / "benchmarks").iterdir()
    assert json.loads(part.read_text())["cases"] == [1]
    harness.write("search", options, {"cases": [1, 2]})
    assert [path.name for path in (tmp_path / "benchmarks").iterdir()] == ["cpu.search.json"]
