"""The benchmark of the data path runs as a whole in its quick form; no figure of speed is judged."""

import json

import pytest

from benchmarks import data, published_sets
from benchmarks.lightly_loader import EPOCHS, lightly_rates
from tests.foreign_libraries import NEIGHBOURS, fetched


@pytest.mark.thorough
def test_quick_form_measures_speed_and_memory(tmp_path, capsys):
    out = tmp_path / "record.json"
    data.main(["--pictures", "20", "--counts", "80", "--out", str(out)])
    record = json.loads(out.read_text())
    assert list(record["peak in MB by images"]) == ["80"]
    assert all(rate > 0 for rate in record["images a second"].values())
    assert "epoch from the cache" in record["images a second"]
    assert "peak at 80 images" in capsys.readouterr().out


@pytest.mark.thorough
def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    """In float32 the 900 further images would take 181 MB."""
    few, many = (data.memory(tmp_path, count) for count in (100, 1000))
    assert many - few < 60


@pytest.mark.thorough
def test_loader_of_lightly_is_measured_beside(tmp_path, request):
    data.generate(tmp_path / "pictures", 6, side=64)
    rates = lightly_rates(fetched(request.config.cache, NEIGHBOURS), tmp_path / "pictures", 32, 2, 0)
    assert list(rates) == list(EPOCHS)
    assert all(rate > 0 for rate in rates.values())


def test_folder_without_lightly_is_refused(tmp_path):
    data.generate(tmp_path / "pictures", 1, side=16)
    with pytest.raises(ValueError, match="--libraries must hold lightly and a torchvision for torch"):
        lightly_rates(tmp_path, tmp_path / "pictures", 16, 1, 0)


@pytest.mark.thorough
@pytest.mark.parametrize("name", published_sets.WRITE)
def test_published_set_gives_the_same_from_decode_to_table_if_killed_twice(tmp_path, name):
    options = [
        "--methods",
        "dissect",
        "--optimization.epochs",
        "2",
        "--optimization.batch-size",
        "32",
        "--subsets",
        "1",
    ]
    options += ["--encoder.width", "8", "--device", "cpu"]
    found = published_sets.measure(name, tmp_path, 160, options)
    assert found["equal"]
    assert found["files in cache"] == ["fill.lock", "images.npy", "index.json", "kept.npy"]
    assert found["cache in bytes"] == pytest.approx(160 * 32 * 32, rel=0.1)
    assert set(found["auc"]) == {"random", "dissect"}
