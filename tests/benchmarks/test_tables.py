"""The tables and figures that pages include are made from the kept records, one table a CPU or GPU model."""

import importlib.util
import re

import pytest

from benchmarks import records
from benchmarks.provenance import ROOT

DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def tables():
    spec = importlib.util.spec_from_file_location("tables", DOCS / "_ext" / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.thorough
def test_pages_include_what_is_made_and_nothing_else(tables, tmp_path):
    made = {path.name for path in tables.write(tmp_path)}
    text = "".join(path.read_text(encoding="utf-8") for path in DOCS.rglob("*.md") if "_generated" not in path.parts)
    assert set(re.findall(r"\{include\} (?:\.\./)*_generated/(\S+)", text)) == made
    for name in made:
        part = (tmp_path / name).read_text(encoding="utf-8")
        assert "\n|---|---|" in part
        for picture in re.findall(r"\(/_generated/(\S+)\)", part):
            assert (tmp_path / picture).stat().st_size > 1000


def test_runs_of_two_models_are_two_tables(tables, tmp_path):
    kept = records.load("sweep-kermany-64")
    other = [{**record, "device": "another CPU"} for record in kept if record["seed"] < 2]
    part = tables.part("sweep-kermany-64", kept + other, tmp_path)
    assert part.count("| variant | runs |") == 2
    assert "| byol | 3 |" in part
    assert "| byol | 2 |" in part
    assert "Device model: unknown (15 runs), so that differences may mix models." in part
    assert "Device model: another CPU." in part
    assert len(list(tmp_path.glob("*.png"))) == 2


@pytest.mark.parametrize("name", [name for name in records.names() if name.startswith("sweep")])
def test_one_model_has_one_run_of_each_variant_and_seed(name):
    runs = [(record["device"], record["variant"], record["seed"]) for record in records.load(name)]
    assert len(set(runs)) == len(runs)


@pytest.mark.parametrize("name", [name for name in records.names() if name.startswith("evaluation")])
def test_one_model_has_one_run_of_each_protocol_encoder_and_seed(name):
    runs = [(record["device"], record["protocol"], record["encoder"], record["seed"]) for record in records.load(name)]
    assert len(set(runs)) == len(runs)
