"""The command as a user runs it: the whole path on phantoms, refusals, and a short run on real radiographs."""

import csv
import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import tyro
from PIL import Image

import vqssl
from examples.pretrain.__main__ import experiment, main
from examples.pretrain.augment import to_float
from examples.pretrain.data import Reading, load_images, train_test_split
from examples.pretrain.methods import METHODS
from examples.pretrain.phantoms import make_phantoms
from examples.pretrain.presets import PRESETS, Experiment
from examples.pretrain.protocols.linear import linear_probe
from examples.pretrain.train import Run
from tests.examples.tiny import ENCODER, OPTIONS, QUICK


@pytest.fixture(scope="module")
def phantoms():
    return make_phantoms(48, 32, seed=0)


def tiny_experiment(out, **options):
    return Experiment("t", out=out, **{"image_size": 32, "phantoms": 96, "subsets": 2, "encoder": ENCODER,
                                       "options": OPTIONS, "optimization": QUICK, **options})  # fmt: skip


def rows_of(folder):
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


FIRST = ("byol", "simsiam", "dissect")


@pytest.mark.parametrize("methods", [FIRST, pytest.param(tuple(METHODS), marks=pytest.mark.thorough)])
def test_every_method_goes_the_whole_path(methods, tmp_path, capsys):
    result = experiment(tiny_experiment(tmp_path, methods=methods))

    assert list(result["auc"]) == ["random", *methods]
    for shares in result["auc"].values():
        assert list(shares) == ["0.01", "0.05", "1"]
        assert all(0 <= score <= 1 for scores in shares.values() for score in scores)
    printed = capsys.readouterr().out
    for title in ("BYOL", "DiSSECT", "SimSiam"):
        assert f"| {title} |" in printed
    kept = json.loads((tmp_path / "table.json").read_text())
    assert kept["auc"] == result["auc"]
    assert {"command", "date", "commit", "device", "cores", "versions", "seed"} <= kept.keys()
    assert kept["device"]
    assert str(tmp_path) not in (tmp_path / "table.json").read_text()

    columns = {}
    for method in methods:
        rows = rows_of(tmp_path / method)
        assert [row["epoch"] for row in rows] == ["1", "2", "3"]
        assert all(math.isfinite(float(value)) for row in rows for value in row.values())
        torch.load(tmp_path / method / "checkpoint.pt", weights_only=True)
        columns[method] = list(rows[0])
    # The columns are what each method returns, and nothing of another one.
    shared = ["lr", "seconds", "knn_auc"]
    assert columns["byol"] == [
        "epoch",
        "loss",
        "alignment_global",
        "target_spread",
        "lr",
        "teacher_momentum",
        *shared[1:],
    ]
    assert columns["simsiam"] == ["epoch", "loss", "target_spread", *shared]
    assert {"alignment_refined", "perplexity_layer2", "dead_layer4"} <= set(columns["dissect"])

    for name in ("curves.png", "dissect/code_maps.png", "dissect/codes.png"):
        pixels = np.asarray(Image.open(tmp_path / name).convert("L"))
        assert min(pixels.shape) > 100
        assert pixels.std() > 5  # the picture is not empty
    assert not (tmp_path / "byol" / "codes.png").exists()


def test_images_without_labels_give_pictures_only(tmp_path, phantoms, capsys):
    np.savez(tmp_path / "images.npz", images=phantoms.images)
    config = tiny_experiment(tmp_path / "out", data=tmp_path / "images.npz", methods=("dissect",),
                             optimization=replace(QUICK, epochs=1))  # fmt: skip
    assert experiment(config)["auc"] == {}
    assert "no labels, no probes" in capsys.readouterr().out
    assert (tmp_path / "out" / "dissect" / "codes.png").exists()


@pytest.mark.thorough
def test_cached_images_give_the_same_table_and_what_is_left_out_is_listed(tmp_path, phantoms, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    labels = phantoms.labels.any(1).astype(int)
    for number, image in enumerate(phantoms.images):
        Image.fromarray(image).save(folder / f"{number:02}.png")
    (folder / "broken.png").write_bytes(b"broken")
    rows = [f"{number:02}.png,{phantoms.groups[number]},{labels[number]}\n" for number in range(len(labels))]
    (folder / "labels.csv").write_text("name,group,label\n" + "".join(rows) + "broken.png,new,0\n")
    tables = []
    for name, cache in (("memory", None), ("file", tmp_path / "cache"), ("again", tmp_path / "cache")):
        config = tiny_experiment(tmp_path / name, data=folder, methods=("byol",), optimization=replace(QUICK, epochs=1),
                                 reading=Reading(skip_bad=True, cache=cache))  # fmt: skip
        result = experiment(config)
        tables.append((result["auc"], result["runs"]["byol"]["loss"], result["reading"]))
        printed = capsys.readouterr().out
        assert f"left out 1 of 49 images:\n  {folder}/broken.png: cannot be read" in printed
        assert ("decoded images: " in printed) == (cache is not None)
    assert tables[0] == tables[1] == tables[2]
    assert tables[0][2] == {"skip_bad": True, "mask_kind": None, "unknown": None, "uncertain": None}
    assert str(tmp_path) not in (tmp_path / "file" / "table.json").read_text()


@pytest.mark.thorough
def test_a_finished_run_is_not_overwritten(tmp_path):
    arguments = ["--phantoms", "48", "--encoder.width", "8", "--optimization.epochs", "1", "--optimization.batch-size",
                 "16", "--methods", "byol", "--subsets", "1", "--out", str(tmp_path)]  # fmt: skip
    main(arguments)
    with pytest.raises(SystemExit, match="already holds a run: continue it with --resume"):
        main(arguments)
    main([*arguments, "--resume"])
    # A method may be added to a finished folder.
    shutil.rmtree(tmp_path / "byol")
    main([*arguments, "--methods", "byol", "simsiam", "--simsiam.dim", "16", "--resume"])
    assert (tmp_path / "simsiam" / "encoder.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "simclr"], f"methods must be one or more of {', '.join(METHODS)}, got simclr"),
        (["--data", "no/such/place.npz"], r"no file or folder at no/such/place\.npz"),
        (["--optimization.batch-size", "4096"], "batch_size must not exceed the number of training images"),
    ],
)
def test_refusals_name_the_rule(arguments, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        main(["--phantoms", "48", "--out", str(tmp_path), *arguments])


def test_every_method_has_flags_of_its_own():
    arguments = ["small", "--dissect.operator", "channel", "--byol.momentum", "0.5", "--dissect.byol.dim", "32"]
    config = tyro.extras.overridable_config_cli(PRESETS, args=[*arguments, "--simsiam.bottleneck", "7"])
    assert config.options["byol"].momentum == 0.5
    assert config.options["dissect"].operator == "channel"
    assert config.options["dissect"].byol.dim == 32
    assert config.options["dissect"].byol.momentum == 0.99  # each has its own copy
    assert config.options["simsiam"].bottleneck == 7
    assert config.pretraining("byol").options == config.options["byol"]


@pytest.mark.thorough
def test_a_short_run_on_real_radiographs_learns(real_data, tmp_path):
    """The loss falls, no codebook collapses, and the probe on 1% and 5% of labels beats the random encoder's.

    Half the preset's epochs. The probe gained 7.8 points here when this was written; rounding differs between machines,
    so the bound is three points.
    """
    small = PRESETS["small"][1]
    data = load_images(real_data / "kermany_cxr_64.npz", 32)
    train_index, test_index = train_test_split(data)
    assert not set(data.groups[train_index]) & set(data.groups[test_index])
    train, test = data.subset(train_index), data.subset(test_index)
    config = small.pretraining("dissect")
    run = Run(train, replace(config, optimization=replace(small.optimization, epochs=6)), tmp_path)
    sides = train, test

    def mean_auc():
        encoded = [(run.encode(to_float(side.images)).numpy(), side.labels) for side in sides]
        scores = linear_probe(*encoded, fractions=(0.01, 0.05), subsets=10)
        return np.mean([*scores[0.01], *scores[0.05]])

    before = mean_auc()
    run.train(quiet=True)
    losses = [row["alignment_global"] + row["alignment_refined"] for row in run.rows]
    assert losses[-1] < 0.65 * losses[0]
    least = config.options.codebook_size / 4
    assert all(run.rows[-1][f"perplexity_{scale}"] > least for scale in config.encoder.scales)
    assert run.rows[-1]["target_spread"] > 0.3
    assert mean_auc() > before + 0.03
    assert vqssl.functional.target_spread(run.encode(to_float(test.images))) > 0
