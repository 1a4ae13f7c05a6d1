"""Every variant of the sweep is what its name says, and an interrupted sweep continues."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from examples.pretrain import ablate
from examples.pretrain.augment import two_views, views_of
from examples.pretrain.encoder import Encoder
from examples.pretrain.methods import METHODS
from examples.pretrain.phantoms import make_phantoms
from examples.pretrain.presets import PRESETS
from examples.pretrain.reports import sweep
from examples.pretrain.variants import VARIANTS
from tests.examples.tiny import QUICK, pretraining
from tests.profiles import thorough

SMALL = PRESETS["small"][1]
SOME = ("byol", "no-momentum", "full", "no-mlp", "align", "detached", *list(VARIANTS)[::8])


def shrunk(config):
    """Return a variant at a tiny size."""
    options = config.options
    if config.method == "dissect":
        options = shrunk_codebooks(options)
    elif config.method != "byol":
        options = replace(options, dissect=shrunk_codebooks(options.dissect), hidden_dim=16)
    else:
        options = replace(options, dim=8, hidden_dim=16)
    return replace(config, options=options, encoder=replace(config.encoder, width=8))


def shrunk_codebooks(options):
    return replace(options, codebook_size=16, byol=replace(options.byol, dim=8, hidden_dim=16))


@pytest.mark.parametrize("name", [name if name in SOME else thorough(name) for name in VARIANTS])
def test_every_variant_takes_a_step(name):
    config = shrunk(VARIANTS[name](SMALL))
    method = METHODS[config.method](Encoder(1, config.encoder), config.options, total_steps=10, seed=0)
    draw = getattr(method, "views", two_views)
    for _ in range(2):
        step = method(draw(torch.randn(6, 1, 32, 32), views_of(32, config.augmentation)))
        step.loss.backward()
        method.after_step()
    assert torch.isfinite(step.loss)
    assert method.encoder.resnet.conv1.weight.grad.abs().sum() > 0
    byol = method if config.method == "byol" else method.byol
    if name == "no-momentum":
        student = byol.student.embedder.projector[0].weight
        torch.testing.assert_close(byol.teacher.module.projector[0].weight, student)
    if name in ("full", "no-mlp", "align"):
        assert method.fusion.alpha.grad.abs().sum() > 0
    if name == "detached":
        assert method.fusion.alpha.grad is None or method.fusion.alpha.grad.abs().sum() == 0


def test_the_sweep_has_53_different_variants():
    configs = {json.dumps(asdict(variant(SMALL)), sort_keys=True) for variant in VARIANTS.values()}
    assert len(configs) == len(VARIANTS) == 53


def test_a_result_is_not_computed_twice_and_is_reported(tmp_path, monkeypatch, capsys):
    quick = replace(QUICK, epochs=1, warmup_epochs=0)
    variants = {"byol": lambda _: pretraining("byol", quick), "full": lambda _: pretraining("dissect", quick)}
    monkeypatch.setattr(ablate, "VARIANTS", variants)
    monkeypatch.setattr(ablate, "SHARES", (0.1, 1.0))
    phantoms = make_phantoms(96, 32, seed=0)
    data = tmp_path / "phantoms.npz"
    np.savez(data, images=phantoms.images, labels=phantoms.labels[:, 0].astype(np.int64))
    config = ablate.Ablation(data, tmp_path / "runs", tmp_path / "results", ("byol", "full"), seeds=(0, 1), subsets=2)
    threads = torch.get_num_threads()
    try:
        ablate.sweep(replace(config, part="0/2"))
        assert len(list(config.results.glob("*.json"))) == 3
        before = {path: path.read_text() for path in config.results.glob("*.json")}
        ablate.main(replace(config, report=True))
    finally:
        torch.set_num_threads(threads)
    assert len(list(config.results.glob("*-seed*.json"))) == 6
    assert all(path.read_text() == text for path, text in before.items())
    record = json.loads((config.results / "full-seed1.json").read_text())
    assert list(record["auc"]) == ["0.1", "1"]
    assert record["steps"] == 72 // 16
    assert {"command", "date", "commit", "device", "cores", "versions"} <= record.keys()
    assert record["pretrained_on"] == [record["device"]]
    assert json.loads((config.results / "random-seed1.json").read_text())["pretrained_on"] == []
    assert record["command"] == "python -m examples.pretrain.ablate --data phantoms.npz"
    table = (config.results / "table.md").read_text()
    assert "| full |" in table
    assert f"Device model: {record['device']}." in table
    assert (config.results / "differences.png").stat().st_size > 5000
    assert {each["seed"] for each in sweep.load(config.results)} == {0, 1}
    with pytest.raises(ValueError, match="variants must be of byol, full, got nonsense"):
        ablate.sweep(replace(config, variants=("nonsense",)))


def test_results_go_to_runs_by_default():
    assert ablate.Ablation().results.parts[0] == "runs"
