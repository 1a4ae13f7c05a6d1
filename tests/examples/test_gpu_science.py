"""The GPU script: its commands parse, and on a few generated images it stops, continues and packs its results."""

import csv
import json
import os
import stat
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
import tyro

from examples.pretrain.data.labelled_folder import labelled_folder
from examples.pretrain.evaluate import Evaluation
from examples.pretrain.presets import PRESETS

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu_science.sh"

# Records its arguments, and leaves a checkpoint where pretraining would.
FAKE_PYTHON = """#!/bin/sh
printf "%s\\t" "$@" >> "$LOG"; echo >> "$LOG"
[ "$2" = examples.pretrain ] || exit 0
while [ "$1" != --out ]; do shift; done
mkdir -p "$2/byol" && touch "$2/byol/checkpoint.pt"
"""


def commands(tmp_path, *options, **environment):
    python = tmp_path / "python"
    python.write_text(FAKE_PYTHON)
    python.chmod(python.stat().st_mode | stat.S_IEXEC)
    (tmp_path / "log").unlink(missing_ok=True)
    environment |= {"PYTHON": str(python), "LOG": str(tmp_path / "log")}
    # From another folder: relative paths belong to the user.
    subprocess.run(
        [SCRIPT, "images.zip", "about.npz", *options], cwd=tmp_path, env=os.environ | environment, check=True
    )
    return [line.rstrip("\t").split("\t") for line in (tmp_path / "log").read_text().splitlines()]


def parsed(command):
    """Return the settings of a command of the example."""
    dash_m, module, *arguments = command
    assert (dash_m, module) == ("-m", "examples.pretrain")
    return tyro.extras.overridable_config_cli(PRESETS, args=arguments)


def test_every_command_of_the_script_parses(tmp_path):
    unpack, *runs, evaluation = commands(
        tmp_path, "out", "--optimization.epochs", "7", SEEDS="3 4", MASKS="lungs.npz", DEVICE="cuda:1"
    )
    out = tmp_path / "out"
    assert unpack[:2] == ["-m", labelled_folder.__module__]
    assert [Path(part) for part in unpack[2:]] == [tmp_path / "images.zip", tmp_path / "about.npz", out / "images"]
    for seed, command in zip((3, 4), runs, strict=True):
        config = parsed(command)
        assert (config.name, config.seed, config.optimization.epochs) == ("paper", seed, 7)
        assert config.methods == ("byol", "dissect", "dissect_codes")
        assert (config.data, config.out, config.resume) == (out / "images", out / f"seed{seed}", False)
        assert (config.device, config.seconds) == ("cuda:1", None)
    assert evaluation[:2] == ["-m", "examples.pretrain.evaluate"]
    config = tyro.cli(Evaluation, args=evaluation[2:])
    assert config.runs == (out / "seed3", out / "seed4")
    assert (config.data, config.masks, config.out) == (out / "images", tmp_path / "lungs.npz", out / "evaluation")
    assert set(config.protocols) == {"linear", "finetune", "anatomy", "codes", "segment-frozen", "segment-tuned"}
    assert (config.device, config.unfinished) == ("cuda:1", True)
    assert config.settings.clusters == PRESETS["paper"][1].options["dissect"].codebook_size


def test_defaults_are_one_run_without_masks(tmp_path):
    _, run, evaluation = commands(tmp_path)
    assert run[run.index("--out") + 1] == str(tmp_path / "runs" / "224" / "seed0")
    config = tyro.cli(Evaluation, args=evaluation[2:])
    assert config.masks is None
    assert set(config.protocols) == {"linear", "finetune", "anatomy"}  # the others need masks


def test_what_was_begun_is_continued_within_the_lease(tmp_path):
    _, first, _ = commands(tmp_path, "out", LEASE="500", METHODS="byol dissect")
    config = parsed(first)
    assert config.methods == ("byol", "dissect")
    assert 400 < config.seconds <= 500
    assert not config.resume
    _, again, _ = commands(tmp_path, "out", LEASE="500", METHODS="byol dissect")
    assert parsed(again).resume


def test_nothing_is_trained_after_the_lease(tmp_path):
    assert len(commands(tmp_path, "out", LEASE="0")) == 1  # the images are unpacked
    commands(tmp_path, "out")
    _, evaluation = commands(tmp_path, "out", LEASE="0")  # what there is can be evaluated
    assert evaluation[1] == "examples.pretrain.evaluate"
    assert len(commands(tmp_path, "out", LEASE="0", EVALUATE="none")) == 1


def names_in(archive):
    with tarfile.open(archive) as file:
        return {name.removeprefix("./") for name in file.getnames()}


def run_tiny(out, *options, **environment):
    """Run the script on a few generated images, and return what its archive holds."""
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | environment
    subprocess.run([SCRIPT, "--tiny", out, *options], env=environment, check=True, timeout=900)
    return names_in(out / "results.tar.gz")


@pytest.mark.thorough
def test_stopped_script_continues_to_the_end_and_packs_its_results(tmp_path):
    """In no time one epoch of the first method fits; the same command without a limit trains the rest."""
    out = tmp_path / "out"
    evaluate = "linear segment-frozen --shares 0.5 --mask-shares 1 --subsets 2 --steps 2"
    packed = run_tiny(out, "--seconds", "0.001", EVALUATE=evaluate)
    assert torch.load(out / "seed0" / "byol" / "checkpoint.pt", weights_only=True)["epoch"] == 1
    assert not (out / "seed0" / "dissect").exists()
    assert {"evaluation/linear-byol@1-seed0.json", "evaluation/table.md", "seed0/byol/metrics.csv"} <= packed
    assert not any(name.endswith((".pt", ".safetensors", ".npz", ".zip")) or "images" in name for name in packed)

    again = run_tiny(out, EVALUATE=evaluate, CHECKPOINTS="1")
    for method in ("byol", "dissect", "dissect_codes"):
        with (out / "seed0" / method / "metrics.csv").open() as file:
            assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2"]
        assert {f"seed0/{method}/checkpoint.pt", f"seed0/{method}/encoder.safetensors"} <= again
        for protocol in ("linear", "segment-frozen"):
            assert f"evaluation/{protocol}-{method}-seed0.json" in again
    assert {"seed0/table.json", "seed0/curves.png", "seed0/dissect_codes/codes.png"} <= again
    assert json.loads((out / "seed0" / "table.json").read_text())["config"]["name"] == "paper"


@pytest.mark.thorough
def test_archive_is_made_where_the_script_fails(tmp_path):
    (tmp_path / "notes.json").write_text("{}")
    with pytest.raises(subprocess.CalledProcessError):
        run_tiny(tmp_path, "--seconds", "nonsense", EVALUATE="none")
    assert names_in(tmp_path / "results.tar.gz") == {"notes.json"}
