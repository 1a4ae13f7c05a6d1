"""Half precision, accumulation, channels last, compilation: each equals what it stands for, and resumes to the bit."""

import copy
import json
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

import vqssl
from examples.pretrain import precision
from examples.pretrain.__main__ import main
from examples.pretrain.checkpoint import differences
from examples.pretrain.methods import METHODS, Step
from examples.pretrain.optimization import Optimization, check_optimization
from examples.pretrain.phantoms import make_phantoms
from examples.pretrain.train import Pretraining, Run
from tests.examples.tiny import ENCODER, QUICK, pretraining
from tests.laws import assert_differs, assert_same_bits
from tests.profiles import few

SLOW = pytest.mark.thorough


@pytest.fixture(scope="module")
def phantoms():
    return make_phantoms(48, 32, seed=0)


def tensors_of(run):
    return {name: value.clone() for name, value in run.method.state_dict().items() if isinstance(value, torch.Tensor)}


def everything_of(run):
    return copy.deepcopy(
        {"model": tensors_of(run), "optimizer": run.optimizer.state_dict(), "schedule": run.scheduler.state_dict()}
    )


def one_epoch(phantoms, folder, method="dissect", options=None, **changes):
    run = Run(phantoms, pretraining(method, replace(QUICK, **changes), **(options or {})), folder)
    run.train(until=1, quiet=True)
    return run


def make_exact(run):
    """Compute in float64, on views that do not depend on the size of a batch, and without BatchNorm."""
    for module in list(run.method.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
                setattr(module, name, nn.Identity())
    run.method.double()
    run.normalize.double()
    run.views = lambda images, augment: [images.double(), images.flip(3).double()]
    return run


# ---- the default ----


def test_a_step_without_options_is_the_plain_loop(tmp_path, phantoms):
    """The oracle draws, computes and updates as the loop of every tutorial does."""
    run, other = (Run(phantoms, pretraining(), tmp_path / name) for name in "ab")
    for each in (run, other):
        each.method.train()
    images = torch.rand(16, 1, 32, 32)
    for step in range(3):
        torch.manual_seed(step)
        found = run._step(run.method, images)
        torch.manual_seed(step)
        with torch.no_grad():
            views = [other.normalize(view) for view in other.views(images, other.augment)]
        expected = other.method(views)
        other.optimizer.zero_grad(set_to_none=True)
        expected.loss.backward()
        other.optimizer.step()
        other.scheduler.step()
        other.method.after_step()
        assert_same_bits([found.loss, found.parts], [expected.loss, expected.parts])
    assert_same_bits(everything_of(run), everything_of(other))


def test_checkpoints_and_records_from_before_the_options_continue(tmp_path, phantoms):
    run = one_epoch(phantoms, tmp_path)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    config = json.loads(state["config"])
    for name in ("precision", "accumulate", "channels_last", "compile"):
        del config["optimization"][name]
    torch.save(state | {"config": json.dumps(config, sort_keys=True)}, tmp_path / "checkpoint.pt")
    resumed = Run(phantoms, run.config, tmp_path)
    assert resumed.resume()
    assert_same_bits(tensors_of(resumed), tensors_of(run))
    half = replace(run.config, optimization=replace(QUICK, precision="bf16"))
    with pytest.raises(ValueError, match=r"another configuration: optimization\.precision was float32, is bf16\."):
        Run(phantoms, half, tmp_path).resume()
    record = {"pretraining": config, "seed": 0}
    assert differences(record, {"pretraining": json.loads(json.dumps(config)), "seed": 0}) == []
    now = {"pretraining": config | {"optimization": config["optimization"] | {"accumulate": 2}}, "seed": 0}
    assert differences(record, now) == [("pretraining.optimization.accumulate", 1, 2)]


# ---- resume ----


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("dissect", {"accumulate": 2}),
        pytest.param("dissect", {"channels_last": True, "optimizer": "lars", "lr": 0.3}, marks=SLOW),
        pytest.param("dissect", {"precision": "bf16"}, marks=SLOW),
        pytest.param("dissect", {"precision": "fp16"}, marks=SLOW),
        pytest.param("dira", {"precision": "fp16"}, marks=SLOW),
        pytest.param("dissect_codes", {"precision": "fp16", "accumulate": 2, "channels_last": True}, marks=SLOW),
    ],
    ids=str,
)
def test_each_option_resumes_to_the_bit(tmp_path, phantoms, method, changes):
    config = pretraining(method, replace(QUICK, epochs=2, **changes))
    unbroken = Run(phantoms, config, tmp_path / "unbroken")
    unbroken.train(quiet=True)
    Run(phantoms, config, tmp_path / "broken").train(until=1, quiet=True)
    torch.manual_seed(99)
    resumed = Run(phantoms, config, tmp_path / "broken")
    assert resumed.resume()
    resumed.train(quiet=True)
    assert_same_bits(everything_of(unbroken), everything_of(resumed))
    assert unbroken.optimizer_step.state_dict() == resumed.optimizer_step.state_dict()
    assert [row | {"seconds": 0} for row in unbroken.rows] == [row | {"seconds": 0} for row in resumed.rows]


# ---- half precision ----


@pytest.mark.parametrize("method", ["dissect", *(pytest.param(name, marks=SLOW) for name in METHODS)])
def test_every_method_trains_in_bf16_with_weights_in_float32(tmp_path, phantoms, method):
    run = one_epoch(phantoms, tmp_path, method, precision="bf16")
    floats = {tensor.dtype for tensor in tensors_of(run).values() if tensor.is_floating_point()}
    assert floats == {torch.float32}
    exact = one_epoch(phantoms, tmp_path / "exact", method)
    assert run.rows[0]["loss"] == pytest.approx(exact.rows[0]["loss"], rel=0.1, abs=0.1)
    assert run.rows[0]["loss"] != exact.rows[0]["loss"]


@pytest.mark.thorough
@pytest.mark.parametrize("method", METHODS)
def test_first_step_of_every_method_fits_into_fp16(tmp_path, phantoms, method):
    assert one_epoch(phantoms, tmp_path, method, precision="fp16").rows[0]["skipped_steps"] == 0


def fp16_run(phantoms, folder, accumulate=1):
    run = Run(phantoms, pretraining(optimization=replace(QUICK, precision="fp16", accumulate=accumulate)), folder)
    run.method.train()
    return run


def take(run, images, seed, scale=None):
    """Take a step, with another scale of the loss if one is given."""
    if scale is not None:
        scaler = run.optimizer_step.scaler
        scaler.load_state_dict(scaler.state_dict() | {"scale": scale})
    torch.manual_seed(seed)
    return run._step(run.method, images)


def test_first_step_that_overflows_leaves_no_trace(tmp_path, phantoms):
    """Its batch would have given the codes. The steps after it are those of a run without it."""
    run, other = (fp16_run(phantoms, tmp_path / name) for name in "ab")
    images = torch.rand(2, 16, 1, 32, 32)
    start = everything_of(run)
    assert take(run, images[0], 0, 2.0**40) is None
    assert_same_bits(everything_of(run), start)
    assert not any(book.initialized for book in run.method.quantizer.codebooks)
    for each in (run, other):
        assert take(each, images[1], 1, 1024.0) is not None
    assert_same_bits(everything_of(run), everything_of(other))


@pytest.mark.parametrize("accumulate", few([2, 1]))
def test_step_that_overflows_in_fp16_leaves_everything_as_it_was(tmp_path, phantoms, accumulate):
    run = fp16_run(phantoms, tmp_path, accumulate)
    images = torch.rand(2, 16, 1, 32, 32)
    assert take(run, images[0], 0) is not None
    before = everything_of(run)
    assert take(run, images[1], 1, 2.0**40) is None
    assert_same_bits(everything_of(run), before)
    assert run.optimizer_step.skipped == 1
    assert run.scheduler.last_epoch == run.method.byol.teacher.step == 1
    assert [book.num_updates.item() for book in run.method.quantizer.codebooks] == [1, 1, 1]


@pytest.mark.thorough
def test_run_that_skipped_steps_resumes_and_impossible_scales_are_refused(tmp_path, phantoms):
    run = fp16_run(phantoms, tmp_path)
    images = torch.rand(2, 16, 1, 32, 32)
    assert take(run, images[0], 0, 2.0**40) is None
    for seed in (1, 2):
        assert take(run, images[1], seed, 1024.0) is not None
    run.epoch, run.rows = 1, [{"epoch": 1}]
    run.save()
    resumed = Run(phantoms, run.config, tmp_path)
    assert resumed.resume()
    assert resumed.optimizer_step.state_dict() == run.optimizer_step.state_dict()
    assert resumed.optimizer_step.skipped == 1
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    for change, words in (
        ({"skipped": 4}, "scaler.skipped must be from 0 to 3, the steps so far, got 4"),
        ({"skipped": 0}, "scheduler.last_epoch must be 3"),
        ({"scale": 0.0}, "scaler.scale must be a number above 0"),
        ({"scale": float("inf")}, "scaler.scale must hold finite numbers"),
    ):
        torch.save(state | {"scaler": state["scaler"] | change}, tmp_path / "checkpoint.pt")
        with pytest.raises(ValueError, match=words):
            Run(phantoms, run.config, tmp_path).resume()
    del state["scaler"]
    torch.save(state, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="the entry scaler must hold the scale of the loss"):
        Run(phantoms, run.config, tmp_path).resume()


# ---- accumulation ----


@pytest.mark.parametrize(
    ("method", "options"), few([("dissect", {}), ("byol", {}), ("dissect", {"shared_codebook": True}), ("coboom", {})])
)
def test_parts_without_batchnorm_equal_the_whole_batch(tmp_path, phantoms, method, options):
    runs = []
    for accumulate in (1, 4):
        config = pretraining(method, replace(QUICK, accumulate=accumulate), **options)
        run = make_exact(Run(phantoms, config, tmp_path / str(accumulate)))
        generator = torch.Generator().manual_seed(0)
        for book in run.method.modules():
            if isinstance(book, vqssl.EMACodebook):
                book.set_codes_(torch.randn(book.embed.shape, generator=generator, dtype=torch.float64))
        run.method.train()
        start = tensors_of(run)
        for seed in range(3):
            torch.manual_seed(seed)
            run._step(run.method, torch.rand(16, 1, 32, 32))
        assert_differs(tensors_of(run), start)
        runs.append(run)
    whole, parts = map(everything_of, runs)
    for name in ("model", "optimizer", "schedule"):
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-9, atol=1e-10)


@dataclass(frozen=True)
class NoOptions:
    pass


class OneToken(nn.Module):
    """A method with one token an image, a codebook that keeps its codes, and BatchNorm's statistics."""

    Options = NoOptions

    def __init__(self, encoder, options, *, total_steps, seed):
        super().__init__()
        self.encoder = encoder
        self.codebook = vqssl.EMACodebook(codebook_size=16, dim=encoder.dim, decay=1.0, revival=None)
        self.seen = []

    def views(self, images, augment):
        return [images + torch.rand(())]

    def forward(self, views):
        tokens = views[0].mean((2, 3)).expand(-1, self.codebook.dim)
        self.seen.append(tokens)
        found = self.codebook(tokens)
        return Step(found.commitment_loss + self.encoder(views[0])[0].square().mean(), {})

    def after_step(self):
        pass


def test_first_codes_come_from_all_parts_and_nothing_else_knows(tmp_path, phantoms, monkeypatch):
    """With as many codes as tokens the codes are the tokens, in some order."""
    monkeypatch.setitem(METHODS, "one", OneToken)
    config = Pretraining("one", NoOptions(), ENCODER, optimization=replace(QUICK, accumulate=4))
    run = Run(phantoms, config, tmp_path)
    run.method.train()
    images = torch.rand(16, 1, 32, 32)
    torch.manual_seed(0)
    run._step(run.method, images)
    before, after = torch.cat(run.method.seen[:4]), torch.cat(run.method.seen[4:])
    assert_same_bits(before, after)  # the same draws: drawing codes does not move torch's generator
    assert_same_bits(run.method.codebook.embed.sort(0).values, after.sort(0).values)
    assert run.method.codebook.num_updates.item() == 1
    assert run.method.encoder.resnet.bn1.num_batches_tracked.item() == 4
    assert not run.method.codebook.frozen
    run._step(run.method, images)
    assert len(run.method.seen) == 12  # known codes need no such pass
    run.method.codebook.freeze()
    run._step(run.method, images)
    assert run.method.codebook.frozen  # by the method: it stays so
    assert run.method.codebook.num_updates.item() == 2


def test_views_are_drawn_outside_of_autocast(tmp_path, phantoms, monkeypatch):
    monkeypatch.setitem(METHODS, "one", OneToken)
    optimization = replace(QUICK, accumulate=2, precision="bf16")
    run = Run(phantoms, Pretraining("one", NoOptions(), ENCODER, optimization=optimization), tmp_path)
    seen = []
    draw = run.views
    run.views = lambda images, augment: seen.append(torch.is_autocast_enabled("cpu")) or draw(images, augment)
    run.method.train()
    run._step(run.method, torch.rand(16, 1, 32, 32))
    assert seen == [False] * 4  # for the first codes, and for the step
    assert run.method.seen[-1].dtype == torch.float32


def test_batches_that_do_not_divide_and_other_quantisers_are_refused(tmp_path, phantoms, monkeypatch):
    for size, parts in ((16, 3), (16, 16), (4, 8)):
        with pytest.raises(ValueError, match=rf"of 2 images a part at least, got {size} for {parts} parts"):
            check_optimization(Optimization(batch_size=size, accumulate=parts))
    with pytest.raises(ValueError, match="accumulate must be a number of at least 1, got 0"):
        check_optimization(Optimization(accumulate=0))

    class Residual(OneToken):
        def __init__(self, encoder, options, *, total_steps, seed):
            super().__init__(encoder, options, total_steps=total_steps, seed=seed)
            self.levels = vqssl.ResidualQuantizer(num_levels=2, codebook_size=4, dim=encoder.dim)

    monkeypatch.setitem(METHODS, "residual", Residual)
    config = Pretraining("residual", NoOptions(), ENCODER, optimization=replace(QUICK, accumulate=2))
    with pytest.raises(ValueError, match=r"got a ResidualQuantizer at levels: give --optimization\.accumulate 1"):
        Run(phantoms, config, tmp_path / "run")
    assert not any(tmp_path.iterdir())


# ---- channels last ----


@pytest.mark.parametrize("method", ["dissect", *(pytest.param(name, marks=SLOW) for name in METHODS)])
def test_channels_last_changes_the_rounding_alone(tmp_path, phantoms, method):
    runs = []
    for channels_last in (False, True):
        run = Run(phantoms, pretraining(method, replace(QUICK, channels_last=channels_last)), tmp_path / "run")
        run.method.double()
        run.normalize.double()
        draw = run.views
        run.views = lambda images, augment, draw=draw: [view.double() for view in draw(images, augment)]
        getattr(run.method, "prepare", lambda images: None)(torch.rand(48, 1, 32, 32))
        run.method.train()
        for seed in range(2):
            torch.manual_seed(seed)
            images = torch.rand(16, 1, 32, 32)
            run._step(run.method, images)
        runs.append(run)
    plain, last = runs
    weight = last.method.encoder.resnet.layer1[0].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()
    torch.testing.assert_close(tensors_of(last), tensors_of(plain), rtol=1e-6, atol=1e-7)
    for run in runs:
        run.method.float()
        run.normalize.float()
    torch.testing.assert_close(last.encode(images), plain.encode(images), rtol=1e-4, atol=1e-5)


# ---- compilation ----


class Small(nn.Module):
    """A method that is quickly compiled: a convolution with BatchNorm, a teacher and a codebook on its maps."""

    Options = NoOptions

    def __init__(self, encoder, options, *, total_steps, seed):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(1, 8, 3, stride=4), nn.BatchNorm2d(8), nn.ReLU())
        self.teacher = vqssl.MomentumTeacher(self.encoder, momentum=0.9)
        self.quantizer = vqssl.MultiScaleQuantizer([8], codebook_size=8, dim=8)

    def forward(self, views):
        found = self.quantizer([self.teacher(views[0])])
        loss = (self.encoder(views[1]) - found.quantized[0]).square().mean()
        return Step(loss, {"commitment": found.commitment_loss})

    def after_step(self):
        self.teacher.update_(self.encoder)

    def figures(self):
        return {}

    def exports(self):
        return {"encoder": self.encoder}


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # of what the compiler itself imports
@pytest.mark.parametrize("changes", [{}, {"accumulate": 2, "precision": "fp16"}], ids=str)
def test_compiled_steps_change_the_rounding_alone_and_resume_to_the_bit(tmp_path, phantoms, changes, monkeypatch):
    monkeypatch.setitem(METHODS, "small", Small)
    plain, fast = (
        Pretraining("small", NoOptions(), optimization=replace(QUICK, epochs=2, compile=compiled, **changes))
        for compiled in (False, True)
    )
    runs = [Run(phantoms, config, tmp_path / str(number)) for number, config in enumerate((plain, fast))]
    for run in runs:
        run.train(quiet=True)
    assert [run.optimizer_step.is_compiled for run in runs] == [False, True]
    for name, value in runs[0].rows[-1].items():
        if name != "seconds":
            assert runs[1].rows[-1][name] == pytest.approx(value, rel=1e-2, abs=1e-3), name
    Run(phantoms, fast, tmp_path / "broken").train(until=1, quiet=True)
    resumed = Run(phantoms, fast, tmp_path / "broken")
    assert resumed.resume()
    resumed.train(quiet=True)
    assert resumed.optimizer_step.is_compiled
    assert_same_bits(everything_of(runs[1]), everything_of(resumed))


# ---- what a device cannot do ----


@pytest.mark.parametrize(
    ("option", "name", "error", "words"),
    [
        (
            ("precision", "fp16"),
            "F.conv2d",
            RuntimeError("not for 'Half'\nsecond line"),
            r"got fp16.*\(not for 'Half'\)",
        ),
        (("compile",), "torch.compile", OSError("no g++"), r"needs a compiler for cpu.*\(no g\+\+\)"),
    ],
)
def test_what_the_device_cannot_do_is_refused_before_anything_is_drawn(
    tmp_path, monkeypatch, capsys, option, name, error, words
):
    def fail(*arguments, **keywords):
        raise error

    owner, attribute = name.split(".")
    monkeypatch.setattr(getattr(precision, owner), attribute, fail)
    first, *value = option
    command = ["demo", "--device", "cpu", "--out", str(tmp_path / "run"), f"--optimization.{first}", *value]
    with pytest.raises(SystemExit, match=words):
        main(command)
    assert "drawing" not in capsys.readouterr().out
    assert not any(tmp_path.iterdir())


def test_autocast_that_stays_in_float32_is_refused(monkeypatch):
    monkeypatch.setitem(precision.DTYPES, "bf16", torch.float64)
    with (
        pytest.warns(UserWarning, match="autocast"),
        pytest.raises(ValueError, match=r"autocast gives torch\.float32"),
    ):
        precision.check_device_can(Optimization(precision="bf16"), "cpu")


def test_help_says_what_a_batch_is(capsys):
    with pytest.raises(SystemExit):
        main(["demo", "--help"])
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "Images a step, of all ranks and all parts together: with 4 ranks, each takes a quarter." in said
    assert "Each part is a batch of its own to BatchNorm" in said
