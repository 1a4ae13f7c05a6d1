"""The comparison: equal conditions for all methods, nothing run twice, and refusals before anything is trained."""

import json
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import records as kept
from examples.pretrain import compare, tuning
from examples.pretrain.compare import Comparison
from examples.pretrain.data import train_test_split
from examples.pretrain.divergence import Diverged
from examples.pretrain.encoder import EncoderOptions
from examples.pretrain.methods import METHODS, title_of
from examples.pretrain.passes import forward_passes
from examples.pretrain.phantoms import make_phantoms
from examples.pretrain.presets import PRESETS, Experiment
from examples.pretrain.train import Run
from examples.pretrain.untrained import random_encoder
from tests.examples.tiny import ENCODER, OPTIONS, QUICK, pretraining

ONE_EPOCH = replace(QUICK, epochs=1, warmup_epochs=0)
TINY = Experiment("small", image_size=32, phantoms=96, encoder=ENCODER, options=OPTIONS, optimization=ONE_EPOCH)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    monkeypatch.setitem(PRESETS, "small", ("tiny", TINY))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    phantoms = make_phantoms(112, 32, seed=0)
    path = tmp_path_factory.mktemp("images") / "images.npz"
    np.savez(path, images=phantoms.images, labels=phantoms.labels, groups=phantoms.groups)
    return path


def tiny(images: Path, out: Path, *methods: str, **changes) -> Comparison:
    config = Comparison(methods or ("byol", "simsiam"), data=images, out=out, seeds=(0, 1), trials=2)
    return replace(config, shares=(0.3, 0.6), subsets=2, steps=2, **changes)


def lines_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "runs.jsonl").read_text().splitlines()]


def no_training(*arguments, **options):
    raise AssertionError("a finished run was run again")


@pytest.mark.thorough
def test_one_command_tunes_pretrains_and_evaluates(images, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    config = tiny(images, out)
    text = compare.main(config)
    assert text in capsys.readouterr().out
    lines = lines_of(out)
    assert [(line["variant"], line["seed"]) for line in lines] == [
        ("byol", 0), ("byol", 1), ("simsiam", 0), ("simsiam", 1), ("random", 0), ("random", 1)
    ]  # fmt: skip
    for line in lines:
        kept.check(line)  # it can be added to the records as it is
        assert list(line["scores"]) == ["finetune", "linear"]
        assert {share: len(values) for share, values in line["scores"]["linear"].items()} == {"30%": 2, "60%": 2}
        assert line["device"]
        assert str(tmp_path) not in json.dumps(line)
    runs = [line for line in lines if line["variant"] != "random"]
    assert len({json.dumps([run["images"], run["steps"], run["trials"]]) for run in runs}) == 1
    assert len({json.dumps([run["config"][part] for part in ("encoder", "augmentation")]) for run in runs}) == 1
    # One choice of settings a method, for all of its seeds.
    for name in ("byol", "simsiam"):
        assert len({json.dumps(run["chosen"]) for run in runs if run["variant"] == name}) == 1
        trials = [json.loads((out / "trials" / f"{name}-{trial}" / "trial.json").read_text()) for trial in (0, 1)]
        best = max(trials, key=lambda trial: trial["auc"])
        assert runs[0 if name == "byol" else 2]["chosen"] == best["chosen_among"]
    assert [run["forward_passes"] for run in runs] == [4, 4, 2, 2]
    assert "| system | runs | 30%, FT | 30%, LP | 30%, LP-FT | 60%, FT | 60%, LP | 60%, LP-FT |" in text
    assert "| BYOL | 2 |" in text
    assert "| untrained | 2 |" in text
    for name in ("gap.png", "shares.png"):
        assert (out / name).stat().st_size > 5000
    # Nothing is run twice, and the report alone is the same.
    before = {path: path.read_bytes() for path in out.rglob("*.json")}
    monkeypatch.setattr(Run, "_epoch", no_training)
    assert compare.main(config) == text
    assert compare.main(Comparison(out=out, report=True)) == text
    assert {path: path.read_bytes() for path in out.rglob("*.json")} == before
    with pytest.raises(ValueError, match=r"holds another result: .*optimization\.epochs was 1, is 2.* another --out"):
        compare.main(replace(config, epochs=2))


@pytest.mark.thorough
def test_interrupted_comparison_gives_what_a_whole_one_gives(images, tmp_path, monkeypatch):
    """Two epochs, killed after the first of the second run; other methods may be added later."""
    config = tiny(images, tmp_path / "whole", trials=1, epochs=2)
    config = replace(config, seeds=(0,), protocols=("linear",))
    compare.main(config)
    killed = replace(config, out=tmp_path / "killed")
    epochs, whole = [], Run._epoch

    def kill(run, *arguments):
        epochs.append(run.config.method)
        if len(epochs) == 4:
            raise KeyboardInterrupt
        return whole(run, *arguments)

    monkeypatch.setattr(Run, "_epoch", kill)
    with pytest.raises(KeyboardInterrupt):
        compare.main(killed)
    epochs.clear()
    compare.main(killed)
    assert epochs == ["simsiam"]  # the one epoch that was missing
    ours, theirs = (
        {(line["variant"], line["seed"]): line["scores"] for line in lines_of(folder)}
        for folder in (config.out, killed.out)
    )
    assert ours == theirs
    epochs.clear()
    compare.main(replace(killed, methods=("byol", "simsiam", "mlvicx")))
    assert set(epochs) == {"mlvicx"}


@pytest.mark.thorough
def test_all_methods_on_phantoms_with_lesion_cells(tmp_path):
    config = tiny(tmp_path, tmp_path / "out", "all", protocols=("linear", "finetune", "lesion-cells"))
    config = replace(config, data=None, seeds=(0,))
    text = compare.main(config)
    for name in METHODS:
        assert f"| {title_of(name)} | 1 |" in text
    assert "Per-cell lesion probe" in text
    lines = lines_of(config.out)
    assert [line["variant"] for line in lines] == [*sorted(METHODS), "random"]
    assert len({line["steps"] for line in lines[:-1]}) == 1


@pytest.mark.thorough
def test_imagenet_joins_the_table(images, tmp_path, monkeypatch):
    usual = EncoderOptions()
    monkeypatch.setitem(PRESETS, "small", ("usual", replace(TINY, encoder=usual)))
    weights = tmp_path / "resnet18.pth"
    torch.save(random_encoder(3, usual, seed=7).resnet.state_dict(), weights)
    config = replace(tiny(images, tmp_path / "out", "simsiam"), trials=1, seeds=(0,), weights=weights)
    assert "| ImageNet | 1 |" in compare.main(config)
    assert [line["variant"] for line in lines_of(config.out)] == ["simsiam", "imagenet", "random"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ("byol", "simclr")}, "--methods must be all, or some of byol, .*, got simclr"),
        ({"methods": ("all", "byol")}, "--methods must be all, or some of .*, got all"),
        ({"methods": ("byol", "byol")}, "--methods must name each once"),
        ({"methods": ()}, "--methods must hold at least one"),
        ({"seeds": (0, 0)}, "--seeds must name each once"),
        ({"seeds": (-1,)}, "each of --seeds must be a number of at least 0"),
        ({"trials": 0}, "--trials must be a number of at least 1"),
        ({"epochs": 0}, "--epochs must be a number of at least 1"),
        ({"shares": (0.1, 40.0)}, "--shares must be a number of at most 1 and above 0"),
        ({"steps": 0}, "--steps must be"),
        ({"protocols": ()}, "--protocols must hold at least one"),
        ({"weights": Path("x.pth")}, "--weights needs an encoder of the file's shape"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(images, tmp_path, changes, message):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=f"^{message}"):
        compare.main(replace(tiny(images, out), **changes))
    assert not out.exists()


def test_images_and_methods_that_do_not_suit_are_refused_before_training(images, tmp_path, monkeypatch):
    monkeypatch.setattr(Run, "_epoch", no_training)
    config = tiny(images, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="no file or folder at"):
        compare.main(replace(config, data=tmp_path / "nothing.npz"))
    with pytest.raises(ValueError, match="no finished runs in"):
        compare.main(replace(config, report=True))
    arrays = dict(np.load(images))
    np.savez(tmp_path / "bare.npz", images=arrays["images"], groups=arrays["groups"])
    with pytest.raises(ValueError, match="must hold labels for the probes"):
        compare.main(replace(config, data=tmp_path / "bare.npz"))
    # Words that a batch cannot hold are known before the first method is trained.
    options = OPTIONS | {"transvw": replace(OPTIONS["transvw"], words=17)}
    monkeypatch.setitem(PRESETS, "small", ("tiny", replace(TINY, options=options)))
    with pytest.raises(ValueError, match=r"--transvw\.words must be at most the batch"):
        compare.main(replace(config, methods=("byol", "transvw")))
    assert not (tmp_path / "out").exists()


# ---- tuning ----


def test_validation_is_a_part_of_the_training_images_and_of_other_patients():
    data = make_phantoms(80, 32, seed=0)
    named = replace(data, split=np.where(np.arange(80) < 60, np.where(np.arange(80) < 50, "train", "val"), "test"))
    groups = np.arange(80)
    for whole in (data, replace(named, groups=groups)):
        train = whole.subset(train_test_split(whole)[0])
        parts = tuning.validation_parts(train)
        assert len(parts.fit) + len(parts.validation) == len(train)
        assert not set(parts.fit.groups) & set(parts.validation.groups)
        known = {image.tobytes() for image in train.images}
        assert all(image.tobytes() in known for side in (parts.fit, parts.validation) for image in side.images)


@pytest.mark.parametrize("name", METHODS)
def test_trials_change_learning_rate_and_tuned_weights_only(name):
    plan = pretraining(name)
    assert tuning.varied(plan, 0) == plan
    names = getattr(plan.options, "tuned", ())
    assert set(names) <= {field.name for field in fields(plan.options)}
    for trial in range(1, 6):
        other = tuning.varied(plan, trial)
        lr, weight = tuning.factors(trial)
        assert other.optimization == replace(plan.optimization, lr=lr * plan.optimization.lr)
        was, now = asdict(plan.options), asdict(other.options)
        assert {key for key in was if was[key] != now[key]} == set(names)
        for key in names:
            first = [np.atleast_1d(part[key]) for part in (was, now)]
            assert first[1][0] == pytest.approx(weight * first[0][0])
            assert (first[1][1:] == first[0][1:]).all()


def test_factors_spread_between_a_quarter_and_four():
    found = np.array([tuning.factors(trial) for trial in range(1, 33)])
    assert found.min() >= 1 / 4
    assert found.max() <= 4
    for column in np.log(found).T / np.log(4):
        assert np.histogram(column, 4, (-1, 1))[0].min() >= 6


def test_trial_that_diverges_is_kept_and_not_chosen(tmp_path, monkeypatch):
    data = make_phantoms(64, 32, seed=0)
    parts = tuning.validation_parts(data)
    plan = pretraining("simsiam", ONE_EPOCH)

    def diverges(*arguments, **options):
        raise Diverged("too large a step")

    monkeypatch.setattr(Run, "train", diverges)
    options = {"shares": (1.0,), "command": "python"}
    first = tuning.try_out(parts, plan, 0, tmp_path / "0", **options)
    assert first["auc"] is None
    monkeypatch.undo()
    second = tuning.try_out(parts, plan, 1, tmp_path / "1", **options)
    assert tuning.best([first, second]) == 1
    monkeypatch.setattr(Run, "train", no_training)
    assert tuning.try_out(parts, plan, 0, tmp_path / "0", **options) == first
    with pytest.raises(ValueError, match="all 1 trials of simsiam diverged"):
        tuning.best([first])
    with pytest.raises(ValueError, match="holds another result"):
        tuning.try_out(parts, plan, 1, tmp_path / "0", **options)


# ---- forward passes ----

PASSES = {
    "byol": 4, "simsiam": 2, "dissect": 4, "dissect_codes": 4, "dissect_places": 4, "coboom": 4,
    "dino": 4.5, "pcrlv2": 2.5, "dira": 2,
    "transvw": 1, "mlvicx": 2, "adamv2": 8.5, "otcxr": 2,
}  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_forward_passes_count_views_by_their_pixels(name, tmp_path):
    data = make_phantoms(32, 32, seed=0)
    folder = tmp_path / "run"
    assert forward_passes(data, pretraining(name), folder) == PASSES[name]
    assert not folder.exists()


def test_help_says_how_many_runs_there_are_and_how_long_recorded_ones_took():
    told, default = " ".join(Comparison.__doc__.split()), Comparison()
    runs = len(METHODS) * (default.trials + len(default.seeds))
    counts = f"{default.trials} trials and {len(default.seeds)} seeds of {len(METHODS)} methods"
    assert f"make {runs} pretraining runs, {counts}" in told
    assert f"evaluate {len(METHODS) * len(default.seeds)} of them" in told
    variants = ("byol", "full", "anchors")
    recorded = [r for r in kept.load("sweep-phantoms-32") if r["variant"] in variants and r["seed"] < 12]
    assert f"In the records {len(recorded)} runs of 812 steps" in told
    seconds = [record["last_epoch"]["seconds"] for record in recorded]
    assert {record["steps"] for record in recorded} == {812}
    assert {record["cores"] for record in recorded} == {1}
    assert {record["device"].split(" (")[0] for record in recorded} == {"AMD EPYC"}
    assert f"{min(seconds):.0f} to {max(seconds):.0f} seconds" in told
    assert (int(runs * min(seconds) / 3600), -int(-runs * max(seconds) // 3600)) == (3, 8)
