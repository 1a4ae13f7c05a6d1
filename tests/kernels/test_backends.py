"""The choice of a backend: Triton's kernels if they run, PyTorch if they are missing or do not compile."""

import sys
import types
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from vqssl.kernels import backends

needs_triton = pytest.mark.skipif(not find_spec("triton"), reason="test_triton.py says that it must be there")

MODULE = "vqssl.kernels.fake_triton"


@pytest.fixture
def launch(monkeypatch):
    """Return a function that makes its argument the kernel of a module, and forget failures afterwards."""
    monkeypatch.setattr(backends, "_unusable", set())
    monkeypatch.setattr(backends, "_used", set())
    fake = types.ModuleType(MODULE)
    monkeypatch.setitem(sys.modules, MODULE, fake)

    def run(kernel, *arguments):
        fake.run = kernel
        return backends.run_triton(MODULE, "run", *arguments)

    return run


def test_kernel_that_runs_is_used(launch):
    assert backends.used_modules() == set()
    assert launch(lambda a, b: a + b, 1, 2) == 3
    assert backends.used_modules() == {MODULE}
    assert backends.unusable_modules() == set()


def test_kernel_runs_on_the_device_of_its_tensors(launch, monkeypatch):
    """Triton launches on the current device. Without two GPUs: a tensor that claims to be on the second."""
    entered = []

    class Guard:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            entered.append(self.device)

        def __exit__(self, *_):
            entered.append("left")

    class OnSecond(torch.Tensor):
        is_cuda = True
        device = torch.device("cuda", 1)

    monkeypatch.setattr(torch.cuda, "device", Guard)
    assert launch(lambda x, k: list(entered), torch.zeros(2).as_subclass(OnSecond), 3) == [OnSecond.device]
    assert entered == [OnSecond.device, "left"]


def test_missing_kernel_warns_once(launch):
    missing = "vqssl.kernels.missing_triton"
    with pytest.warns(RuntimeWarning, match=rf"kernels of {missing} cannot .*falling back to PyTorch: same results"):
        assert backends.run_triton(missing, "run", 1) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.run_triton(missing, "run", 1) is None
    assert backends.unusable_modules() == {missing}


def test_kernel_that_does_not_compile_is_not_tried_again(launch):
    failure = type("CompilationError", (Exception,), {"__module__": "triton.compiler.errors"})
    calls = []

    def run():
        calls.append(1)
        raise failure("no such instruction")

    with pytest.warns(RuntimeWarning, match="CompilationError: no such instruction"):
        assert launch(run) is None
    assert launch(run) is None
    assert calls == [1]
    assert backends.used_modules() == set()


@needs_triton
@pytest.mark.parametrize("compiler", ["none", "without Python.h", "breaks"])
def test_image_without_a_compiler_falls_back(compiler, launch, monkeypatch, tmp_path):
    """As in slim images: Triton builds its launcher when it first starts, and that raises errors of any class."""
    from triton.runtime import build

    def start():
        build.compile_module_from_src("#include <Python.h>", name=f"launcher_{compiler.split()[0]}")

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    if compiler == "none":
        monkeypatch.delenv("CC", raising=False)
    else:
        said = "fatal error: Python.h: No such file" if compiler == "without Python.h" else "internal compiler error"
        script = tmp_path / "cc"
        script.write_text(f"#!/bin/sh\necho '{said}' >&2\nexit 1\n")
        script.chmod(0o755)
        monkeypatch.setenv("CC", str(script))
    with pytest.warns(RuntimeWarning, match="falling back to PyTorch.*needs a C compiler and Python's headers"):
        assert launch(start) is None
    assert launch(start) is None


def test_error_of_the_file_system_is_not_taken_for_tritons(launch):
    def run():
        (Path("/") / "no" / "such" / "file").read_text()

    with pytest.raises(FileNotFoundError):
        launch(run)


def test_other_errors_are_raised(launch):
    def run():
        raise RuntimeError("illegal memory access")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        launch(run)
