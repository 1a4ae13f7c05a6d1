"""The parts for a GPU, tried on a CPU: all imports, arguments and files, and nothing measured."""

import json
import subprocess
import sys
import tarfile

import pytest

from benchmarks import gpu
from benchmarks.provenance import ROOT


@pytest.mark.slow
@pytest.mark.thorough
def test_every_part_runs_dry(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry", "--out", str(tmp_path / "gpu")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stdout[-5000:]
    ended = json.loads((tmp_path / "gpu" / "summary.json").read_text())
    assert [(part["part"], part["status"]) for part in ended] == [(name, "done") for name in gpu.PARTS]
    assert json.loads((tmp_path / "gpu" / "about.json").read_text())["available"] is False
    with tarfile.open(tmp_path / "gpu.tar.gz") as archive:
        packed = set(archive.getnames())
    assert {f"gpu/{name}.log" for name in gpu.PARTS} <= packed
    assert {f"gpu/dry.cpu.{name}.json" for name in ("search", "train_step", "memory", "dissect_step")} <= packed


def test_every_part_ends_within_a_short_lease():
    assert all(part.limit < 8 * 60 for part in gpu.PARTS.values())


def test_part_that_takes_too_long_or_fails_is_named_and_the_others_run(tmp_path, monkeypatch, capsys):
    parts = {
        "slow": gpu.Part(1, (), ("-c", "import time; print('begun', flush=True); time.sleep(60)")),
        "fails": gpu.Part(30, (), ("-c", "raise SystemExit(3)")),
        "works": gpu.Part(30, (), ("-c", "print('yes')")),
    }
    monkeypatch.setattr(gpu, "PARTS", parts)
    monkeypatch.setattr(sys, "argv", ["gpu", "--dry", "--out", str(tmp_path / "gpu")])
    assert gpu.main() == 1
    ended = json.loads((tmp_path / "gpu" / "summary.json").read_text())
    assert [part["status"] for part in ended] == ["stopped after 1 s", "exit 3", "done"]
    assert (tmp_path / "gpu" / "slow.log").read_text() == "begun\n"
    assert "failed: slow, fails" in capsys.readouterr().out


def test_unknown_parts_and_a_missing_gpu_are_refused(monkeypatch, capsys):
    for arguments, says in (["nothing"], "parts must be among check"), (["check"], "write --dry"):
        monkeypatch.setattr(sys, "argv", ["gpu", *arguments])
        with pytest.raises(SystemExit) as ended:
            gpu.main()
        assert ended.value.code == 2
        assert says in capsys.readouterr().err
