"""Every variant of the sweep is what its name says, and the sweep goes on where it stopped."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from examples.pretrain import ablate, ablation_report
from examples.pretrain.model import SelfSupervised
from examples.pretrain.phantoms import make_phantoms

TINY = {"width": 4, "codebook_size": 16, "dim": 8, "hidden_dim": 16}


@pytest.mark.parametrize("name", ablate.VARIANTS)
def test_every_variant_takes_a_step(name):
    method, model = ablate.VARIANTS[name]
    torch.manual_seed(0)
    net = SelfSupervised(method, 1, replace(model, **TINY), total_steps=10)
    views = [torch.randn(6, 1, 32, 32) for _ in range(2)]
    for _ in range(2):
        step = net(views)
        step.loss.total.backward()
        net.teacher.update_(net.student)
    assert torch.isfinite(step.loss.total)
    trained = {name: parameter.grad for name, parameter in net.named_parameters() if parameter.requires_grad}
    assert trained["student.encoder.resnet.conv1.weight"].abs().sum() > 0
    if name == "no-momentum":
        torch.testing.assert_close(net.teacher.module.projector[0].weight, net.student.projector[0].weight)
    if name in ("full", "no-mlp", "align"):
        assert trained["fusion.alpha"].abs().sum() > 0
    if name == "detached":
        assert trained["fusion.alpha"] is None or trained["fusion.alpha"].abs().sum() == 0


def test_variants_differ():
    configs = [json.dumps([method, model.__dict__], sort_keys=True) for method, model in ablate.VARIANTS.values()]
    assert len(set(configs)) == len(configs)


def test_the_sweep_keeps_what_it_did_and_reports_it(tmp_path, monkeypatch, capsys):
    small = replace(ablate.FULL, **TINY, stem_stride=2)
    monkeypatch.setattr(ablate, "VARIANTS", {"byol": ("byol", small), "full": ("dissect", small)})
    optimization = replace(ablate.SMALL.optimization, epochs=1, batch_size=16, warmup_epochs=0)
    monkeypatch.setattr(ablate, "SMALL", replace(ablate.SMALL, optimization=optimization))
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
    assert "| full |" in (config.results / "table.md").read_text()
    assert (config.results / "auc.png").stat().st_size > 5000
    with pytest.raises(SystemExit, match="variants must be of byol, full, got nonsense"):
        ablate.sweep(replace(config, variants=("nonsense",)))
    assert ablation_report.load(config.results)["full"][1]["seed"] == 1


def test_seeds_that_chose_and_others_are_told_apart():
    """Gains over BYOL of 1, 2, 3 in the first seeds, of -1 and -2 in the others; one variant has the first only."""
    gains = {"byol": [0] * 5, "full": [0] * 5, "cosine": [1, 2, 3, -1, -2], "shared": [5, 5, 5]}
    records = {
        name: {seed: {"auc": {"0.01": [0.5 + gain / 100], "0.05": [0.5]}} for seed, gain in enumerate(values)}
        for name, values in gains.items()
    }
    *_, full, cosine = [
        [cell.strip().replace("\N{NO-BREAK SPACE}", " ") for cell in line.split("|")[1:-1]]
        for line in ablation_report.again(records).splitlines()
    ]
    assert full == ["full", "0.0 ± 0.0", "0.0 ± 0.0", "0.0 ± 0.0", "0.0 ± 0.0", "–", "–", "–", "–"]
    first, other = "2.0 ± 2.5", "-1.5 ± 6.4"  # t(0.975) of 4.303 and 12.706, times 1 / sqrt(3) and 0.7071 / sqrt(2)
    assert cosine == ["cosine", first, other, "0.0 ± 0.0", "0.0 ± 0.0", first, other, "0.0 ± 0.0", "0.0 ± 0.0"]
    assert ablation_report.again({"byol": records["byol"], "shared": records["shared"]}) == ""
