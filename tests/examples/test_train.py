"""The trainer, which knows no method: resume to the bit, refusals, the schedule, and views of a method's own."""

import csv
import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import nn

from examples.pretrain import loader, train
from examples.pretrain.augment import Augmentation, Normalize, to_float, views_of
from examples.pretrain.data import train_test_split
from examples.pretrain.data.stored import StoredImages
from examples.pretrain.methods import METHODS, Step
from examples.pretrain.optimization import Optimization, make_optimizer, make_schedule
from examples.pretrain.phantoms import make_phantoms
from examples.pretrain.protocols.knn import knn_monitor
from examples.pretrain.train import Pretraining, Run
from tests.examples.tiny import ENCODER, QUICK, pretraining, tiny_method
from tests.laws import assert_same_bits
from tests.profiles import few


@pytest.fixture(scope="module")
def phantoms():
    return make_phantoms(48, 32, seed=0)


def state_of(run):
    return {key: value for key, value in run.method.state_dict().items() if isinstance(value, torch.Tensor)}


def rows_of(folder):
    with (folder / "metrics.csv").open() as file:
        return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]


# ---- resume ----

LARS = replace(QUICK, optimizer="lars", lr=0.3)


@pytest.mark.parametrize(
    ("method", "optimization"),
    few([("dissect", QUICK), *((method, QUICK) for method in METHODS if method != "dissect"), ("dissect", LARS)]),
    ids=["dissect", *(method for method in METHODS if method != "dissect"), "dissect-lars"],
)
def test_resume_continues_to_the_bit(tmp_path, phantoms, method, optimization):
    config = pretraining(method, optimization)
    unbroken = Run(phantoms, config, tmp_path / "unbroken")
    unbroken.train(quiet=True)

    Run(phantoms, config, tmp_path / "broken").train(until=1, quiet=True)
    (tmp_path / "broken" / "checkpoint.pt.partial").write_bytes(b"killed while writing")
    torch.manual_seed(99)  # a new process has another state of the global generator
    resumed = Run(phantoms, config, tmp_path / "broken")
    assert resumed.resume()
    assert resumed.epoch == 1
    resumed.train(quiet=True)

    assert_same_bits(state_of(unbroken), state_of(resumed))
    assert unbroken.method.figures() == resumed.method.figures()
    assert unbroken.devices == resumed.devices
    assert len(unbroken.devices) == 1
    # The log holds all epochs, as in the unbroken run; only the clock differs.
    assert rows_of(tmp_path / "unbroken") == rows_of(tmp_path / "broken")


@pytest.mark.parametrize("workers", few([2, 0]))
def test_images_in_a_file_train_to_the_same_bits_also_resumed(tmp_path, phantoms, monkeypatch, workers):
    monkeypatch.setattr(loader, "MOST_WORKERS", workers)
    np.save(tmp_path / "images.npy", phantoms.images)
    stored = replace(phantoms, images=StoredImages(tmp_path / "images.npy"))
    unbroken = Run(phantoms, pretraining(), tmp_path / "memory")
    unbroken.train(quiet=True)
    Run(stored, pretraining(), tmp_path / "file").train(until=1, quiet=True)
    resumed = Run(stored, pretraining(), tmp_path / "file")
    assert resumed.resume()
    resumed.train(quiet=True, monitor=knn_monitor(stored))
    assert_same_bits(state_of(unbroken), state_of(resumed))
    assert_same_bits(unbroken.encode(to_float(phantoms.images)), resumed.encode(to_float(stored.images)))
    some = (to_float(data.subset(slice(0, 9)).images) for data in (phantoms, stored))
    for ours, theirs in zip(
        *(run.codes(images).values() for run, images in zip((unbroken, resumed), some, strict=True)), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_resume_on_another_device_model_is_recorded(tmp_path, phantoms, monkeypatch):
    for until, model in ((1, "A"), (2, "B"), (2, "C"), (3, "B")):
        monkeypatch.setattr(train, "device_model", lambda device, model=model: model)
        run = Run(phantoms, pretraining(), tmp_path)
        run.resume()
        run.train(until=until, quiet=True)
    assert run.devices == ["A", "B"]  # nothing was trained on C


def test_another_configuration_is_refused_by_name(tmp_path, phantoms):
    Run(phantoms, pretraining(), tmp_path).train(until=1, quiet=True)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(ValueError, match=r"another configuration: options\.codebook_size was 16, is 32"):
        Run(phantoms, pretraining(codebook_size=32), tmp_path).resume()
    with pytest.raises(ValueError, match="the training images are others"):
        Run(make_phantoms(48, 32, seed=1), pretraining(), tmp_path).resume()
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_a_torn_checkpoint_is_refused(tmp_path, phantoms):
    config = pretraining("byol")
    run = Run(phantoms, config, tmp_path)
    run.save()
    whole = (tmp_path / "checkpoint.pt").read_bytes()
    (tmp_path / "checkpoint.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"checkpoint\.pt: not a readable checkpoint"):
        Run(phantoms, config, tmp_path).resume()


def test_a_checkpoint_of_another_format_is_refused_in_one_sentence(tmp_path, phantoms):
    run = Run(phantoms, pretraining("byol"), tmp_path)
    run.save()
    path = tmp_path / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    for found in (1, 4):
        state["format"] = found
        if found == 1:
            del state["format"]  # the first format had no number
        torch.save(state, path)
        with pytest.raises(
            ValueError, match=rf"checkpoint must have format 3, got {found} of another version"
        ) as error:
            run.resume()
        assert "\n" not in str(error.value)


# ---- what is trained on ----


def test_pretraining_sees_neither_labels_nor_test_images(phantoms, tmp_path):
    sides = train_images, test = [phantoms.subset(index) for index in train_test_split(phantoms)]
    unlabelled = replace(train_images, labels=None, masks=None, groups=None)
    states = []
    for number, data in enumerate((train_images, unlabelled)):
        run = Run(data, pretraining(), tmp_path / str(number))
        run.train(until=1, quiet=True)
        states.append(state_of(run))
    assert_same_bits(*states)
    assert not set.intersection(*({image.tobytes() for image in side.images} for side in sides))
    assert len(test)


def test_the_monitor_does_not_change_the_run(phantoms, tmp_path):
    plain, watched = (Run(phantoms, pretraining(), tmp_path / name) for name in ("plain", "watched"))
    plain.train(quiet=True)
    watched.train(quiet=True, monitor=knn_monitor(phantoms))
    assert all(0 <= row["knn_auc"] <= 1 for row in watched.rows)
    assert_same_bits(state_of(plain), state_of(watched))
    with pytest.raises(ValueError, match="needs labels"):
        knn_monitor(replace(phantoms, labels=None))


@dataclass(frozen=True)
class NoOptions:
    pass


class Crops(nn.Module):
    """A method with three views of its own, a part of the loss and a figure, and no projector."""

    Options = NoOptions

    def __init__(self, encoder, options, *, total_steps, seed):
        super().__init__()
        self.encoder = encoder
        self.steps = 0

    def views(self, images, augment):
        return [augment(images), images, images]

    def forward(self, views):
        assert len(views) == 3
        assert torch.equal(views[1], views[2])
        features = [self.encoder(view)[0] for view in views]
        loss = (features[0] - features[1]).square().mean()
        return Step(loss, {"apart": loss.sqrt()})

    def after_step(self):
        self.steps += 1

    def figures(self):
        return {"steps_so_far": self.steps}

    def exports(self):
        return {"encoder": self.encoder}


def test_a_method_of_ones_own_needs_a_class_and_a_name(phantoms, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(METHODS, "crops", Crops)
    run = Run(phantoms, Pretraining("crops", NoOptions(), ENCODER, optimization=QUICK), tmp_path)
    run.train()
    assert list(run.rows[0]) == ["epoch", "loss", "apart", "lr", "steps_so_far", "seconds"]
    assert run.rows[-1]["steps_so_far"] == 9
    assert "crops 3/3  loss" in capsys.readouterr().out
    assert run.codes(to_float(phantoms.images)) is None
    assert (tmp_path / "encoder.safetensors").exists()


# ---- optimisation ----


def test_the_schedule_is_linear_then_half_a_cosine():
    config = Optimization(lr=0.3, batch_size=512, epochs=10, warmup_epochs=2)
    optimizer = make_optimizer(tiny_method("byol"), config)
    schedule = make_schedule(optimizer, config, steps_per_epoch=10)
    seen = []
    for _ in range(100):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    peak = 0.3 * 512 / 256
    expected = [peak * (1 / 21 + (1 - 1 / 21) * t / 20) for t in range(20)]
    expected += [peak * (1 + math.cos(math.pi * t / 80)) / 2 for t in range(80)]
    np.testing.assert_allclose(seen, expected, rtol=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_biases_and_norms_do_not_decay(method):
    decayed, others = make_optimizer(tiny_method(method), Optimization()).param_groups
    assert decayed["weight_decay"] > 0
    assert others["weight_decay"] == 0
    assert {parameter.ndim for parameter in decayed["params"]} == {2, 4}
    assert {parameter.ndim for parameter in others["params"]} == {1}


# ---- images and views ----


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_images_become_normalised_floats(channels, dtype):
    rng = np.random.default_rng(0)
    shape = (8, 16, 16) if channels == 1 else (8, 16, 16, 3)
    images = rng.integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)
    x = Normalize(images)(to_float(images))
    assert x.shape == (8, channels, 16, 16)
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(channels), atol=1e-4, rtol=0)
    torch.testing.assert_close(x.std((0, 2, 3), correction=0), torch.ones(channels), atol=1e-4, rtol=0)


def test_views_differ_from_each_other_and_stay_in_range():
    x = torch.rand(4, 1, 32, 32)
    views = views_of(32, Augmentation(jitter=0.4))
    first, second = views(x), views(x)
    assert first.shape == x.shape
    assert not torch.equal(first, second)
    assert first.min() >= 0
    assert first.max() <= 1 + 1e-5
