"""Killed runs continue to the bit, and on other numbers of ranks; files hold nothing to execute."""

import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

import vqssl
from examples.pretrain.encoder import Encoder
from examples.pretrain.phantoms import make_phantoms
from examples.pretrain.train import Run
from tests.examples.tiny import ENCODER, QUICK, pretraining
from tests.laws import assert_same_bits

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.thorough
@pytest.mark.skipif(os.name != "posix", reason="forks")
def test_sigkill_at_any_moment_loses_nothing():
    command = [sys.executable, "-m", "tests.reliability.kills", "--kills", "12", "--seed", "1", "--trial"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(done.stdout)
    assert figures["kills"] == 12
    assert figures["while a checkpoint was being written"] >= 4
    assert figures["of them other than in the unbroken run"] == 0


# ---- ranks ----

EPOCHS = 8


def example(folder, ranks, *more):
    """Start the command of a user; ranks = 0 is without torchrun."""
    start = [sys.executable, "-m"]
    if ranks:
        start += ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    options = ["--methods", "dissect", "--phantoms", "200", "--subsets", "1"]
    options += [f"--optimization.{name}={value}" for name, value in (("warmup-epochs", 1), ("epochs", EPOCHS))]
    command = [*start, "examples.pretrain", "demo", "--out", str(folder), *options, *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def epoch_of(folder):
    path = folder / "dissect" / "checkpoint.pt"
    return torch.load(path, weights_only=True)["epoch"] if path.exists() else 0


def kill_after(process, folder, epoch):
    """Send SIGKILL to the launcher and to every rank, each in its own session."""
    deadline = time.monotonic() + 120
    with process:
        while epoch_of(folder) < epoch:
            assert process.poll() is None, process.stdout.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if str(folder).encode() in (entry / "cmdline").read_bytes():
                    os.kill(int(entry.name), signal.SIGKILL)


@pytest.mark.thorough
@pytest.mark.skipif(not Path("/proc").exists(), reason="finds the ranks by it")
def test_the_example_runs_on_ranks_and_resumes_on_another_number(tmp_path):
    reached = []
    for ranks in (2, 4):
        kill_after(example(tmp_path, ranks, *(["--resume"] if reached else [])), tmp_path, (reached or [0])[-1] + 1)
        reached.append(epoch_of(tmp_path))
    process = example(tmp_path, 0, "--resume")
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert f"continuing after epoch {reached[-1]}" in output
    rows = (tmp_path / "dissect" / "metrics.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["epoch", *map(str, range(1, EPOCHS + 1))]
    assert json.loads((tmp_path / "table.json").read_text())["auc"]["dissect"]
    columns = rows[0].split(",")
    last = dict(zip(columns, map(float, rows[-1].split(",")), strict=True))
    assert last["perplexity_layer2"] > 100
    assert last["target_spread"] > 0.3
    assert reached == sorted(set(reached))


@pytest.mark.thorough
@pytest.mark.slow
def test_ranks_divide_the_batch_or_are_refused(tmp_path):
    process = example(tmp_path, 2, "--optimization.batch-size", "15")
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "batch_size must be a multiple of the number of ranks, got 15 for 2" in output


# ---- files ----


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    run = Run(make_phantoms(48, 32, seed=0), pretraining("dissect", replace(QUICK, epochs=2)), folder)
    run.train(quiet=True)
    return run


def test_weights_are_exported_without_anything_to_execute(finished):
    encoder = Encoder(1, ENCODER)
    encoder.load_state_dict(safetensors.torch.load_file(finished.folder / "encoder.safetensors"))
    assert_same_bits(dict(encoder.state_dict()), dict(finished.method.encoder.state_dict()))
    state = safetensors.torch.load_file(finished.folder / "codebooks.safetensors")
    quantizer = vqssl.MultiScaleQuantizer(encoder.scale_channels, codebook_size=16, dim=8)
    quantizer.load_state_dict(state)
    assert all(codebook.initialized for codebook in quantizer.codebooks)
    assert_same_bits(dict(quantizer.state_dict()), dict(finished.method.quantizer.state_dict()))


class Payload:
    """What a hostile file would run when it is opened."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_a_hostile_checkpoint_is_refused_and_not_run(finished, tmp_path, how):
    sign = tmp_path / "owned"
    folder = tmp_path / "run"
    folder.mkdir()
    state = torch.load(finished.folder / "checkpoint.pt", weights_only=True)
    state["rows"] = Payload(sign)
    path = folder / "checkpoint.pt"
    if how == "torch":
        torch.save(state, path)
    else:
        path.write_bytes(pickle.dumps(state))
    run = Run(finished.data, finished.config, folder)
    before = {name: value.clone() for name, value in run.method.named_parameters()}
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        run.resume()
    assert not sign.exists()
    assert_same_bits(dict(run.method.named_parameters()), before)
    # The payload does work if it is allowed to: the test would notice.
    if how == "torch":
        torch.load(path, weights_only=False)
        assert sign.exists()


@pytest.mark.parametrize("cut", [0, 10, 0.3, 0.9, 0.999])
def test_a_truncated_checkpoint_is_refused(finished, tmp_path, cut):
    content = (finished.folder / "checkpoint.pt").read_bytes()
    (tmp_path / "checkpoint.pt").write_bytes(content[: cut if isinstance(cut, int) else int(cut * len(content))])
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        Run(finished.data, finished.config, tmp_path).resume()
