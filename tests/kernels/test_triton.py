"""The Triton kernels without a GPU: right in the interpreter, and compiled for each architecture without spilling."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_triton_is_here():
    """`python3 tests` installs it where there are wheels; a test that skipped itself would be missed by nobody."""
    assert find_spec("triton") or sys.platform != "linux", "pip install --no-deps -r .ci/kernels.txt"


needs_triton = pytest.mark.skipif(not find_spec("triton"), reason="see test_triton_is_here")


@needs_triton
@pytest.mark.slow
def test_parity_in_the_interpreter():
    # A process of its own: triton's own library asks for the interpreter when it is first imported.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels/interpreted.py"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= 89, done.stdout[-500:]
    assert "skipped" not in done.stdout.splitlines()[-1]


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("dim", [64, 128, 256, 300])
@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_default_configurations_fit_and_do_not_spill(capability, dim):
    from tests.kernels import ahead_of_time
    from vqssl.kernels import tuning

    for name, (report, config) in ahead_of_time.looks(capability, dim).items():
        message = f"{name} look, {config}: {report._replace(sass='')}"
        assert report.spilled == 0, message
        assert 0 < report.shared <= tuning.shared_memory(capability), message
        tensor = sum(number for operation, number in report.instructions().items() if "MMA" in operation)
        assert tensor > 0, f"no tensor cores: {message}"
        if capability == (9, 0):
            assert report.instructions()["HGMMA"] > 0, f"not Hopper's own: {message}"


@needs_triton
@pytest.mark.slow
def test_the_small_kernels_compile():
    from tests.kernels import ahead_of_time

    for name, report in ahead_of_time.others((9, 0)).items():
        assert report.spilled == 0, name


@needs_triton
def test_choice_of_configuration(tmp_path, monkeypatch):
    from vqssl.kernels import tuning

    monkeypatch.setenv("VQSSL_TUNING", str(tmp_path / "tuning.json"))
    rule = tuning.choose((9, 0), 128)
    assert rule == tuning.candidates((9, 0), 128)[0]
    assert tuning.shared_memory((7, 5)) == 99 * 1024  # unknown: the least
    monkeypatch.setenv("VQSSL_TUNING", str(tmp_path / "other.json"))
    (tmp_path / "other.json").write_text('{"sm_90/128/half": [64, 32, 128, 4, 2]}')
    assert tuning.choose((9, 0), 128) == (64, 32, 128, 4, 2)
    assert tuning.choose((9, 0), 64) == tuning.candidates((9, 0), 64)[0]
    monkeypatch.setenv("VQSSL_TUNING", str(tmp_path / "broken.json"))
    (tmp_path / "broken.json").write_text("{")
    assert tuning.choose((9, 0), 128) == rule
