"""A run that leaves the finite numbers stops, says where, and keeps its last finite checkpoint."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from examples.pretrain.divergence import Diverged, check_losses, check_state, finite, not_finite
from examples.pretrain.optimization import Optimization, check_optimization
from examples.pretrain.phantoms import make_phantoms
from examples.pretrain.protocols.knn import knn_monitor
from examples.pretrain.train import Run
from tests.examples.tiny import QUICK, pretraining
from tests.profiles import few

NAN, INFINITY = float("nan"), float("inf")


@pytest.fixture(scope="module")
def phantoms():
    return make_phantoms(48, 32, seed=0)


def poison_weight(run):
    run.method.encoder.resnet.conv1.weight[0] = NAN


def poison_teacher(run):
    run.method.byol.teacher.module.projector[3].bias[0] = INFINITY


def poison_running_statistics(run):
    run.method.encoder.resnet.bn1.running_mean[0] = NAN


def poison_codebook(run):
    run.method.quantizer.codebook(0).embed_avg[0] = NAN


def poison_optimizer(run):
    next(iter(run.optimizer.state.values()))["exp_avg_sq"].fill_(INFINITY)


@pytest.mark.parametrize(
    "poison", few([poison_codebook, poison_weight, poison_teacher, poison_running_statistics, poison_optimizer])
)
def test_diverged_run_keeps_its_last_finite_checkpoint(tmp_path, phantoms, poison):
    run = Run(phantoms, pretraining(), tmp_path)
    run.train(until=1, quiet=True)
    files = {path.name: path.read_bytes() for path in tmp_path.glob("*.*") if not path.name.startswith("events")}
    with torch.no_grad():
        poison(run)
    with pytest.raises(Diverged, match=r"dissect, epoch 2.* The checkpoint of epoch 1 is kept.*--optimization\.lr"):
        run.train(until=2, quiet=True, monitor=knn_monitor(phantoms))
    assert {name: (tmp_path / name).read_bytes() for name in files} == files
    assert Run(phantoms, pretraining(), tmp_path).resume()


def test_sentence_names_step_and_part(tmp_path, phantoms, monkeypatch):
    run = Run(phantoms, pretraining("simsiam"), tmp_path)
    step = run._step
    seen = []

    def third_is_infinite(*arguments):
        seen.append(1)
        found = step(*arguments)
        return found._replace(loss=found.loss * math.inf) if len(seen) == 3 else found

    monkeypatch.setattr(run, "_step", third_is_infinite)
    with pytest.raises(Diverged, match=r"got loss -?(inf|nan) in simsiam, epoch 1, step 3\. Train again") as error:
        run.train(quiet=True)
    assert "\n" not in str(error.value)
    assert "kept" not in str(error.value)  # there is none yet
    assert not (tmp_path / "checkpoint.pt").exists()


def test_figure_beside_a_finite_loss_may_be_undefined():
    losses = torch.tensor([[1.0, NAN], [2.0, 0.0]])
    check_losses(losses, ["loss", "figure"], of="x", advice="y")
    losses[1, 0] = -INFINITY
    with pytest.raises(Diverged, match=r"got loss -inf in x, step 2\. y"):
        check_losses(losses, ["loss", "figure"], of="x", advice="y")


def test_every_kind_of_state_is_looked_at():
    module = nn.BatchNorm1d(2)
    module.register_buffer("counts", torch.tensor([2**62]))
    module.register_buffer("phase", torch.zeros(2, dtype=torch.complex64))
    parts = {"method": module}
    check_state(parts, of="x", advice="y")
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    for name in ("weight", "running_var", "phase"):
        before = tensors[name].detach().clone()
        with torch.no_grad():
            tensors[name][1] = INFINITY
        with pytest.raises(Diverged, match=name):
            check_state(parts, of="x", advice="y")
        with torch.no_grad():
            tensors[name].copy_(before)
    check_state(parts, of="x", advice="y")


def test_not_finite_names_them_all():
    tensors = {"a": torch.ones(2), "b": torch.tensor([NAN]), "c": torch.tensor([1]), "d": torch.tensor([INFINITY])}
    assert not_finite(tensors.items()) == ["b", "d"]
    assert not_finite([]) == []


def test_features_that_are_not_finite_are_not_scored(tmp_path, phantoms):
    run = Run(phantoms, pretraining("byol"), tmp_path)
    with torch.no_grad():
        run.method.encoder.resnet.bn1.weight.fill_(NAN)
    images = torch.rand(4, 1, 32, 32)
    with pytest.raises(Diverged, match=r"features of the encoder of .* must be finite, got NaN or infinity in 100"):
        run.encode(images)
    with pytest.raises(Diverged, match="feature maps"):
        run.maps(images, run.method.encoder)
    assert finite(images, of="x") is images


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", NAN),
        ("lr", INFINITY),
        ("lr", 0.0),
        ("lr", -1.0),
        ("momentum", 1.0),
        ("momentum", NAN),
        ("weight_decay", -1.0),
        ("weight_decay", INFINITY),
        ("epochs", 0),
        ("batch_size", 1),
        ("warmup_epochs", -1),
    ],
)
def test_options_out_of_range_are_refused_by_name(tmp_path, phantoms, name, value):
    optimization = replace(QUICK, **{name: value})
    with pytest.raises(ValueError, match=rf"--optimization\.{name.replace('_', '-')} must be a number"):
        Run(phantoms, pretraining(optimization=optimization), tmp_path)
    check_optimization(Optimization())
