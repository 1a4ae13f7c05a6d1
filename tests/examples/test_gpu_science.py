"""The commands of the GPU script parse; a fake interpreter records them."""

import os
import stat
import subprocess
from pathlib import Path

import tyro

from examples.pretrain.data.labelled_folder import labelled_folder
from examples.pretrain.evaluate import Evaluation
from examples.pretrain.presets import PRESETS

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu_science.sh"


def commands(tmp_path, *options, **environment):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nprintf "%s\\t" "$@" >> "$LOG"; echo >> "$LOG"\n')
    python.chmod(python.stat().st_mode | stat.S_IEXEC)
    environment |= {"PYTHON": str(python), "LOG": str(tmp_path / "log")}
    # From another folder: relative paths belong to the user.
    subprocess.run(
        [SCRIPT, "images.zip", "about.npz", *options], cwd=tmp_path, env=os.environ | environment, check=True
    )
    return [line.rstrip("\t").split("\t") for line in (tmp_path / "log").read_text().splitlines()]


def test_every_command_of_the_script_parses(tmp_path):
    unpack, *runs, evaluation = commands(
        tmp_path, "out", "--optimization.epochs", "7", SEEDS="3 4", MASKS="lungs.npz", DEVICE="cuda:1"
    )
    out = tmp_path / "out"
    assert unpack[:2] == ["-m", labelled_folder.__module__]
    assert [Path(part) for part in unpack[2:]] == [tmp_path / "images.zip", tmp_path / "about.npz", out / "images"]
    for seed, (dash_m, module, *arguments) in zip((3, 4), runs, strict=True):
        assert (dash_m, module) == ("-m", "examples.pretrain")
        config = tyro.extras.overridable_config_cli(PRESETS, args=arguments)
        assert (config.name, config.seed, config.optimization.epochs) == ("paper", seed, 7)
        assert (config.data, config.out, config.resume) == (out / "images", out / f"seed{seed}", True)
        assert config.device == "cuda:1"
    assert evaluation[:2] == ["-m", "examples.pretrain.evaluate"]
    config = tyro.cli(Evaluation, args=evaluation[2:])
    assert config.runs == (out / "seed3", out / "seed4")
    assert (config.data, config.masks, config.out) == (out / "images", tmp_path / "lungs.npz", out / "evaluation")
    assert set(config.protocols) == {"linear", "finetune", "anatomy", "codes", "segment-frozen", "segment-tuned"}
    assert config.device == "cuda:1"
    assert config.settings.clusters == PRESETS["paper"][1].options["dissect"].codebook_size


def test_defaults_are_one_run_without_masks(tmp_path):
    _, run, evaluation = commands(tmp_path)
    assert run[run.index("--out") + 1] == str(tmp_path / "runs" / "224" / "seed0")
    config = tyro.cli(Evaluation, args=evaluation[2:])
    assert config.masks is None
    assert set(config.protocols) == {"linear", "finetune", "anatomy"}  # the others need masks
