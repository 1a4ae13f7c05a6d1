"""What would fail after training is refused before: whatever passes the first checks gets through the rest."""

import io
import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from examples.pretrain import __main__ as command
from examples.pretrain import ablate, evaluate
from examples.pretrain.data import ImageSet, load_images
from examples.pretrain.phantoms import make_phantoms
from examples.pretrain.presets import Experiment
from examples.pretrain.protocols.linear import FRACTIONS, linear_probe
from examples.pretrain.ranges import check_range, share_of
from examples.pretrain.reports import pictures
from examples.pretrain.reports.text import any_terminal, file_name, readable, table_cell, write_text
from examples.pretrain.train import Run
from tests.examples.tiny import ENCODER, OPTIONS, QUICK, pretraining

# ---- labels ----


@st.composite
def odd_labels(draw):
    """Labels with rare, missing and constant classes or findings, and groups that hold many images."""
    count = draw(st.integers(4, 60))
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    if draw(st.booleans()):
        weights = np.array(draw(st.lists(st.sampled_from([0.02, 0.2, 1.0]), min_size=1, max_size=5)))
        labels = rng.choice(len(weights), count, p=weights / weights.sum())
    else:
        rates = draw(st.lists(st.sampled_from([0.0, 0.05, 0.5, 1.0]), min_size=1, max_size=3))
        labels = (rng.random((count, len(rates))) < rates).astype(np.uint8)
    groups = rng.integers(0, draw(st.integers(1, count)), count) if draw(st.booleans()) else None
    images = rng.integers(0, 255, (count, 8, 8), dtype=np.uint8)
    return ImageSet(images, labels, groups)


class Encoded:
    """A run whose features are noise."""

    def encode(self, images):
        return torch.randn(len(images), 5, generator=torch.Generator().manual_seed(0))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=odd_labels(), subsets=st.integers(-1, 3), seed=st.integers(0, 3))
def test_labels_that_pass_the_checks_can_be_probed(data, subsets, seed):
    config = Experiment("t", subsets=subsets, seed=seed, options=OPTIONS, encoder=ENCODER, optimization=QUICK)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "images_of", lambda config: data)
        try:
            command.check(config)
            train, test = command.sides_of(config)
        except ValueError:
            return
    monitor = command.monitor_of(train, config)
    figures = [] if monitor is None else list(monitor(Encoded()).values())
    features = [Encoded().encode(side.images).numpy() for side in (train, test)]
    sides = (features[0], train.labels), (features[1], test.labels)
    scores = linear_probe(*sides, FRACTIONS, subsets, seed)
    figures += [score for values in scores.values() for score in values]
    assert all(0 <= figure <= 1 for figure in figures)
    table = {"random": {f"{share:g}": values for share, values in scores.items()}}
    assert "nan" not in command.markdown_of(table)


def experiment_with(tmp_path, labels, **options):
    images = make_phantoms(len(labels), 32, seed=0).images
    np.savez(tmp_path / "images.npz", images=images, labels=labels)
    return Experiment("t", tmp_path / "images.npz", tmp_path / "out", methods=("byol",), image_size=32,
                      encoder=ENCODER, options=OPTIONS, optimization=QUICK, **options)  # fmt: skip


def one_image_of_a_class():
    labels = np.arange(96) % 2
    labels[5] = 2
    return labels


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (one_image_of_a_class(), "got a single image: a class is too rare; give more images of it"),
        (np.zeros(96, int), "labels that tell images apart"),
        (np.ones((96, 2), np.uint8), "labels that tell images apart"),
    ],
)
def test_labels_that_cannot_be_probed_leave_no_trace(tmp_path, labels, message):
    with pytest.raises(ValueError, match=message):
        command.experiment(experiment_with(tmp_path, labels))
    assert not (tmp_path / "out").exists()


def test_labels_that_only_the_probe_after_each_epoch_cannot_use_are_said(tmp_path, capsys):
    """The second class is of one patient: the split inside the training images leaves it on one side."""
    data = make_phantoms(60, 16, seed=0)
    one = replace(data, labels=(np.arange(60) < 8).astype(int), groups=np.maximum(np.arange(60), 8), masks=None)
    assert command.monitor_of(one, Experiment("t")) is None
    assert "no kNN probe after each epoch: a kNN probe needs labels that tell images apart" in capsys.readouterr().out


# ---- options ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"subsets": 0}, "--subsets must be a number of at least 1, got 0"),
        ({"subsets": -3}, "--subsets must be a number of at least 1, got -3"),
        ({"methods": ("byol", "byol")}, "--methods must name each once, got byol twice"),
        ({"methods": ()}, "methods must be one or more of"),
        ({"seed": -1}, "--seed must be a number of at least 0"),
        ({"seed": 2**32}, "--seed must be a number of at least 0 and of at most 4.29497e"),
        ({"encoder": replace(ENCODER, width=4)}, "--encoder.width must be a number of at least 8, got 4"),
        ({"encoder": replace(ENCODER, scales=())}, "--encoder.scales must hold at least one"),
        ({"encoder": replace(ENCODER, scales=("layer2", "layer2"))}, "--encoder.scales must name each once"),
        ({"encoder": replace(ENCODER, scales=("layer9",))}, "--encoder.scales must be of layer1"),
        ({"optimization": replace(QUICK, epochs=0)}, "--optimization.epochs"),
        ({"resume": True}, "nothing to resume in"),
    ],
)
def test_options_that_cannot_work_leave_no_trace(tmp_path, options, message):
    config = Experiment("t", **{"out": tmp_path / "out", "phantoms": 48, "image_size": 32, "encoder": ENCODER,
                                "options": OPTIONS, "optimization": QUICK, **options})  # fmt: skip
    with pytest.raises(ValueError, match=message):
        command.experiment(config)
    assert not (tmp_path / "out").exists()


def test_checkpoint_of_the_last_method_is_read_before_the_first_trains(tmp_path):
    config = experiment_with(tmp_path, np.arange(96) % 2, resume=True)
    data = command.sides_of(config)[0]
    Run(data, pretraining("simsiam", replace(QUICK, lr=1.0)), tmp_path / "out" / "simsiam").save()
    with pytest.raises(ValueError, match=r"simsiam.* optimization\.lr was 1\.0, is 0\.001"):
        command.experiment(replace(config, methods=("byol", "simsiam")))
    assert not (tmp_path / "out" / "byol").exists()


def test_names_beside_the_numbered_folders_are_ignored(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("demo-3", "demo-old1", "demo-x-7", "demo-12.zip"):
        (tmp_path / "runs" / name / "byol").mkdir(parents=True)
        (tmp_path / "runs" / name / "byol" / "metrics.csv").touch()
    assert command.folder_of(Experiment("demo")).name == "demo-4"
    assert command.folder_of(Experiment("demo", resume=True)).name == "demo-3"


@pytest.mark.parametrize("part", ["2/2", "a/b", "1", "0/0", "-1/2", "1/2/3", ""])
def test_shares_of_the_work_are_checked(part, tmp_path):
    with pytest.raises(ValueError, match="--part must be I/N"):
        share_of(part)
    with pytest.raises(ValueError, match="--part must be I/N"):
        ablate.sweep(ablate.Ablation(tmp_path, part=part))


def test_sweep_needs_labels_before_its_first_run(tmp_path):
    np.savez(tmp_path / "images.npz", images=make_phantoms(48, 32, seed=0).images)
    config = ablate.Ablation(tmp_path / "images.npz", tmp_path / "runs", tmp_path / "results", image_size=32)
    threads = torch.get_num_threads()
    try:
        with pytest.raises(ValueError, match="must hold labels for the probes"):
            ablate.sweep(config)
    finally:
        torch.set_num_threads(threads)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images.npz"]
    for options in ({"subsets": 0}, {"seeds": (1, 1)}, {"variants": ()}):
        with pytest.raises(ValueError, match=f"^--{next(iter(options))} must"):
            ablate.sweep(replace(config, **options))


def test_evaluation_refuses_options_before_it_reads_a_run(tmp_path):
    config = evaluate.Evaluation(runs=(tmp_path / "nowhere",), out=tmp_path / "out")
    for options, message in (
        ({"settings": replace(config.settings, subsets=0)}, "--subsets"),
        ({"protocols": ("linear", "linear")}, "protocols must name each once"),
        ({"runs": (tmp_path, tmp_path)}, "--runs must name each once"),
        ({"phantoms": 0}, "--phantoms"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate.main(replace(config, **options))


@given(
    value=st.floats(allow_nan=True, allow_infinity=True),
    least=st.floats(-2, 2),
    width=st.floats(0, 2),
)
def test_range_is_what_it_says(value, least, width):
    inside = np.isfinite(value) and least <= value <= least + width
    try:
        check_range("--x", value, least=least, most=least + width)
    except ValueError:
        assert not inside
    else:
        assert inside


# ---- the folder ----


@pytest.mark.parametrize("what", ["folder", "log"])
def test_folder_that_is_removed_ends_the_run_with_an_error(tmp_path, what):
    run = Run(make_phantoms(48, 32, seed=0), pretraining("byol"), tmp_path / "run")

    def remove(run):
        if run.epoch == 2:
            for path in sorted(run.folder.glob("*" if what == "folder" else "metrics.csv")):
                path.unlink()
            if what == "folder":
                run.folder.rmdir()
        return {}

    with pytest.raises(FileNotFoundError, match=r"metrics\.csv is gone: it was removed while the run went on"):
        run.train(quiet=True, monitor=remove)
    assert run.folder.exists() == (what == "log")


def test_files_of_a_finished_method_that_are_removed_end_the_run_with_an_error(tmp_path, monkeypatch):
    config = experiment_with(tmp_path, np.arange(96) % 2, subsets=1)
    monkeypatch.setattr(command, "draw", lambda runs, test, out, outputs: [(out / "byol" / "checkpoint.pt").unlink()])
    with pytest.raises(FileNotFoundError, match=r"byol.checkpoint\.pt is gone"):
        command.experiment(config)


# ---- names ----

ODD = ["a$\\b", "$\\frac{$", "na|me\n\x1b[31m", "ros\udce9", "Größe", "x" * 500, "", "..", "a/b"]


@pytest.mark.parametrize("name", ODD)
def test_odd_names_are_drawn_and_written(name, tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (8, 16, 16), dtype=np.uint8)
    indices = {"layer2": rng.integers(0, 4, (8, 2, 2))}
    classes = ImageSet(images, np.arange(8) % 2, label_names=(name, "other"))
    findings = ImageSet(images, (np.arange(16) % 3 > 0).reshape(8, 2).astype(np.uint8), label_names=(name, "other"))
    for data in (classes, findings):
        pictures.code_maps(data, indices, tmp_path / "maps.png", count=2)
    assert min(np.asarray(Image.open(tmp_path / "maps.png")).shape[:2]) > 100
    write_text(tmp_path / "table.md", f"| {table_cell(name)} |")
    assert len((tmp_path / "table.md").read_text(encoding="utf-8").splitlines()) == 1
    (tmp_path / f"{file_name(name)}.png").touch()
    assert (tmp_path / f"{file_name(name)}.png").is_file()


@given(st.text())
def test_text_for_people_is_printable_and_cells_stay_cells(text):
    assert readable(text).isprintable()
    assert readable(readable(text)) == readable(text)
    assert "|" not in table_cell(text).replace(r"\|", "")
    assert set(file_name(text)) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-")
    assert file_name(text) not in ("", ".", "..")


def test_terminal_shows_as_escapes_what_it_cannot(monkeypatch):
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii", write_through=True))
    with pytest.raises(UnicodeEncodeError):
        print("±")
    any_terminal()
    print("± \udcff")
    assert shown.getvalue().split() == [b"\\xb1", b"\\udcff"]


def test_folders_named_oddly_are_read_and_their_names_kept(tmp_path):
    for number, name in enumerate(("a$\\b", "na|me")):
        (tmp_path / name).mkdir()
        Image.fromarray(np.full((8, 8), number, np.uint8)).save(tmp_path / name / "1.png")
    data = load_images(tmp_path, 8, progress=False)
    assert data.label_names == ("a$\\b", "na|me")
    assert json.dumps(data.label_names)
