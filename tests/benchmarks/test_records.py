"""Kept records: what is added comes back, what is wrong is refused, and a file is whole at every moment."""

import json
import os

import pytest

from benchmarks import records
from benchmarks.provenance import provenance


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    return tmp_path


def run(**changes):
    made = {"kind": "sweep", "variant": "byol", "seed": 0, **provenance("python -m x"), "auc": {"0.01": [0.8, 0.7]}}
    return made | changes


def test_added_records_come_back_one_a_line(folder):
    added = [run(), run(seed=1), run(variant="full", text="φ", nothing=None)]
    records.add("some-name", added)
    assert records.load("some-name") == added
    assert records.names() == ["some-name"]
    lines = (folder / "some-name.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == added


def test_order_does_not_depend_on_that_of_adding(folder):
    several = [
        run(seed=seed, variant=name, device=device) for seed in (10, 2) for name in "ba" for device in ("Y", "X")
    ]
    records.add("one", several)
    for record in reversed(several):
        records.add("two", [record])
    assert (folder / "one.jsonl").read_bytes() == (folder / "two.jsonl").read_bytes()
    assert [(r["variant"], r["seed"], r["device"]) for r in records.load("one")][:3] == [
        ("a", 2, "X"), ("a", 2, "Y"), ("a", 10, "X"),
    ]  # fmt: skip


def test_same_run_twice_is_refused_unless_replaced():
    records.add("name", [run(), run(seed=1)])
    again = run(auc={"0.01": [0.9]})
    with pytest.raises(ValueError, match=r"name already has kind sweep, variant byol, seed 0 on .*--replace"):
        records.add("name", [again, run(seed=2)])
    assert len(records.load("name")) == 2
    records.add("name", [again], replace=True)
    assert [record["auc"] for record in records.load("name")] == [{"0.01": [0.9]}, {"0.01": [0.8, 0.7]}]
    with pytest.raises(ValueError, match="two are the same run"):
        records.add("name", [run(seed=5), run(seed=5)], replace=True)


@pytest.mark.parametrize(
    "other", [{"device": "another"}, {"seed": 1}, {"images": [3, 4]}, {"command": "python -m y"}, {"encoder": "random"}]
)
def test_another_identity_is_another_run(other):
    records.add("name", [run()])
    records.add("name", [run(**other)])
    assert len(records.load("name")) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": None}, "names its kind, .* got None; write it under 'kind'"),
        ({"device": None}, "has 'device', the model of the CPU or GPU: got None; write what .*provenance returns"),
        ({"command": ""}, "has 'command', .*: got ''"),
        ({"cores": 2.0}, "has 'cores', .*: got 2.0"),
        ({"versions": "2.8"}, "has 'versions', .*: got '2.8'"),
        ({"seed": "0"}, "seed is a whole number: got '0'; write it as an int"),
        ({"auc": float("nan")}, "JSON of finite numbers: got one of kind 'sweep'"),
        ({"auc": {1, 2}}, "JSON of finite numbers"),
    ],
)
def test_bad_record_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        records.add("name", [run(), run(seed=7) | change])
    assert records.names() == []


def test_record_without_key_or_figures_is_refused():
    for key in records.PROVENANCE:
        with pytest.raises(ValueError, match=f"has '{key}', .*: got no such key"):
            records.check({name: value for name, value in run().items() if name != key})
    with pytest.raises(ValueError, match=r"holds figures beside its provenance: .* add what was measured"):
        records.check({name: value for name, value in run().items() if name != "auc"})
    records.check(run(cores=None, commit=None))


def test_interrupted_write_leaves_the_file_as_it_was(folder, monkeypatch):
    records.add("name", [run()])

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", fail)
    for name in ("name", "new"):
        with pytest.raises(OSError, match="no space left"):
            records.add(name, [run(seed=1)])
    assert records.load("name") == [run()]
    assert records.names() == ["name"]


def test_unknown_name_and_broken_line_are_named(folder):
    records.add("name", [run()])
    with pytest.raises(ValueError, match="no records are named 'other': choose one of name"):
        records.load("other")
    with pytest.raises(ValueError, match=r"lower-case letters.* got '\.\./x'"):
        records.add("../x", [run()])
    with (folder / "name.jsonl").open("a") as file:
        file.write('{"kind": \n')
    with pytest.raises(ValueError, match=r"name\.jsonl is a JSON object: line 2 is not"):
        records.load("name")


def test_groups_by_device_keep_models_apart():
    groups = records.by_device([run(device="A"), run(device=None), run(device="A", seed=1)])
    assert {device: len(runs) for device, runs in groups.items()} == {"A": 2, None: 1}
    assert records.on_gpu(run(device="A GPU", cores=None))
    assert not records.on_gpu(run(device=None, cores=None))
    assert not records.on_gpu(run())


def test_command_line_adds_and_lists(tmp_path, capsys):
    file = tmp_path / "runs" / "cpu.search.json"
    records.write_run(file, run())
    records.main(["add", "name", str(file)])
    assert "1 added to name.jsonl, which has 1" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="error: name already has"):
        records.main(["add", "name", str(file)])
    records.main(["add", "name", str(file), "--replace"])
    with pytest.raises(SystemExit, match=r"error: .*missing\.json"):
        records.main(["add", "name", str(tmp_path / "missing.json")])
    records.main(["list"])
    assert "name: 1 records" in capsys.readouterr().out
