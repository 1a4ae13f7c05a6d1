"""What every test gets: a seed, a hypothesis profile, and the real data where there are any.

Slow tests run by default; `-m "not slow"` leaves them out.
"""

import os
from pathlib import Path

import hypothesis
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

# A script of `.ci/run`, for another environment than this one; and a tool that needs triton.
collect_ignore = ["wheel_smoke.py", "kernels/ahead_of_time.py"]
if os.environ.get("TRITON_INTERPRET") != "1":  # kernels/test_triton.py runs it in a process that has asked for this
    collect_ignore.append("kernels/interpreted.py")
if not os.environ.get("VQSSL_SITE"):  # the built documentation; `.ci/run docs` sets it
    collect_ignore.append("site")
pytest.register_assert_rewrite("tests.laws")

hypothesis.settings.register_profile("default", deadline=None, max_examples=50)
hypothesis.settings.register_profile("ci", deadline=None, max_examples=150, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")


class TorchRandom:
    """Torch's global generator, so that hypothesis starts every example from the same state of it."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


torch_random = TorchRandom()  # hypothesis keeps a weak reference only
hypothesis.register_random(torch_random)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real radiographs: $VQSSL_DATA, or `shared/data` beside the repository."""
    named = os.environ.get("VQSSL_DATA")
    folder = Path(named) if named else ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        if named:
            pytest.fail(f"VQSSL_DATA names {folder}, which is no folder")
        pytest.skip(f"no real data: {folder} is not there, and VQSSL_DATA is not set")
    return folder
