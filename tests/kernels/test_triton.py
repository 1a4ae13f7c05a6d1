"""The Triton kernels without a GPU: exact in Triton's interpreter, compiled for each architecture without spills."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_triton_is_installed():
    """`python3 tests` installs it on Linux; without it the tests below would skip themselves unnoticed."""
    assert find_spec("triton") or sys.platform != "linux", "pip install --no-deps -r .ci/kernels.txt"


needs_triton = pytest.mark.skipif(not find_spec("triton"), reason="see test_triton_is_installed")


SMALL = "nonfinite or 200-7-5 or update_refuses"  # of the search, of sums by code, and of the update
ROUNDED = "every_kind or certif or nonfinite or below_fp16s"


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize(
    ("select", "least", "tensor_cores"),
    [
        (SMALL, 7, None),
        pytest.param("below_fp16s", 1, "A100", marks=pytest.mark.thorough),
        pytest.param("below_fp16s", 1, "H100", marks=pytest.mark.thorough),
        pytest.param("", 161, None, marks=pytest.mark.thorough),
        pytest.param(ROUNDED, 40, "A100", marks=pytest.mark.thorough),
        pytest.param(ROUNDED, 40, "H100", marks=pytest.mark.thorough),
    ],
)
def test_kernels_pass_their_tests_in_the_interpreter(select, least, tensor_cores):
    # In a process of its own: Triton reads TRITON_INTERPRET when it is first imported.
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/kernels/interpreted.py",
        "-k",
        select,
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    if tensor_cores is not None:
        environment["TENSOR_CORES"] = tensor_cores
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= least, done.stdout[-500:]
    assert "skipped" not in done.stdout.splitlines()[-1]


COMMON = ((9, 0), 128)
ALL = [
    (capability, dim)
    for capability in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))
    for dim in (64, 128, 256, 300)
]


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "dim"),
    [pytest.param(*each, marks=[] if each == COMMON else pytest.mark.thorough) for each in ALL],
)
def test_default_configurations_fit_and_do_not_spill(capability, dim):
    from tests.kernels import ahead_of_time
    from vqssl.kernels.nearest import tuning

    report, config = ahead_of_time.first_look(capability, dim)
    message = f"{config}: {report._replace(sass='')}"
    assert report.spilled == 0, message
    assert 0 < report.shared <= tuning.shared_memory(capability), message
    tensor = sum(number for operation, number in report.instructions().items() if "MMA" in operation)
    assert tensor > 0, f"no tensor cores: {message}"
    if capability == (9, 0):
        assert report.instructions()["HGMMA"] > 0, f"no warp-group instructions of Hopper: {message}"


@needs_triton
@pytest.mark.slow
def test_other_kernels_compile_without_spills():
    from tests.kernels import ahead_of_time

    for name, report in ahead_of_time.others((9, 0)).items():
        assert report.spilled == 0, name
        if name in ("close", "last"):  # cosine divides, which takes some
            assert report.instructions()["DFMA"] == 0, name
