"""Options, profiles and fixtures of all tests.

Two profiles: by default, tests marked `thorough` are left out, and hypothesis tries 10 examples a property. With
`--thorough`, or where CI=true as in `.ci/run`, all tests run, with 150 examples. Tests marked `slow` run in both;
`-m "not slow"` leaves them out.
"""

import contextlib
import os
import signal
from pathlib import Path

import hypothesis
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

# A script that `.ci/run` runs in another environment, a tool that needs triton, and a model that needs encodec.
collect_ignore = ["wheel_smoke.py", "kernels/ahead_of_time.py", "ports/before/audio_codec.py"]
if os.environ.get("TRITON_INTERPRET") != "1":  # kernels/test_triton.py runs it in a process of its own
    collect_ignore.append("kernels/interpreted.py")
if not os.environ.get("VQSSL_SITE"):  # the built documentation; `.ci/run docs` sets it
    collect_ignore.append("site")
pytest.register_assert_rewrite("tests.laws")

hypothesis.settings.register_profile("default", deadline=None, max_examples=10)
hypothesis.settings.register_profile("ci", deadline=None, max_examples=150, derandomize=True, print_blob=True)

LEFT_OUT = pytest.StashKey[int]()


def pytest_addoption(parser):
    parser.addoption("--thorough", action="store_true", help="also run the tests marked thorough; so does CI=true")


def is_thorough(config):
    return config.getoption("thorough") or bool(os.environ.get("CI"))


def heed_signals():
    """Take the signals that end a program as a terminal has them, for this process and those that it starts.

    Shells start what runs in the background with Ctrl-C ignored, and nohup ignores SIGHUP: a test that waits for one
    would wait for ever.
    """
    for name, usual in (
        ("SIGINT", signal.default_int_handler),
        ("SIGTERM", signal.SIG_DFL),
        ("SIGHUP", signal.SIG_DFL),
    ):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_IGN:
            with contextlib.suppress(ValueError):  # not in the main thread
                signal.signal(number, usual)


def pytest_configure(config):
    heed_signals()
    # Before the test modules are imported: `@settings` there takes what it does not name from the loaded profile.
    hypothesis.settings.load_profile("ci" if is_thorough(config) else "default")


def pytest_collection_modifyitems(config, items):
    if is_thorough(config):
        return
    left_out = [item for item in items if item.get_closest_marker("thorough")]
    items[:] = [item for item in items if not item.get_closest_marker("thorough")]
    config.hook.pytest_deselected(items=left_out)
    config.stash[LEFT_OUT] = len(left_out)


def pytest_sessionfinish(session):
    worker = getattr(session.config, "workeroutput", None)
    if worker is not None:  # every process of pytest-xdist collects all tests, and only the first one prints
        worker["left_out"] = session.config.stash.get(LEFT_OUT, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    node.config.stash[LEFT_OUT] = getattr(node, "workeroutput", {}).get("left_out", 0)


def pytest_terminal_summary(terminalreporter, config):
    count = config.stash.get(LEFT_OUT, 0)
    if count:
        plural = "test was" if count == 1 else "tests were"
        terminalreporter.write_line(
            f"{count} thorough {plural} not run: `python3 tests --thorough` and `.ci/run` run them", yellow=True
        )


class TorchRandom:
    """Torch's global generator, so that hypothesis starts every example from the same state of it."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


torch_random = TorchRandom()  # hypothesis keeps only a weak reference
hypothesis.register_random(torch_random)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def thorough_profile(pytestconfig) -> bool:
    """Return True if all tests run: for one that has more steps then."""
    return is_thorough(pytestconfig)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Return the folder of real radiographs: $VQSSL_DATA, or `shared/data` beside the repository."""
    named = os.environ.get("VQSSL_DATA")
    folder = Path(named) if named else ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        if named:
            pytest.fail(f"VQSSL_DATA must name a folder, got {folder}")
        pytest.skip(f"no real data: {folder} does not exist, and VQSSL_DATA is not set")
    return folder
