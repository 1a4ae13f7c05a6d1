"""Which backend runs, what happens where one cannot, and the memory that threads keep."""

import sys
import types
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from vqssl import EMACodebook, kernels
from vqssl.functional import nearest_codeword
from vqssl.kernels import backends
from vqssl.kernels.workspace import workspace


@pytest.fixture
def fresh(monkeypatch):
    monkeypatch.setattr(backends, "_unusable", set())


def module(monkeypatch, function):
    fake = types.ModuleType("vqssl.kernels.fake_triton")
    fake.run = function
    monkeypatch.setitem(sys.modules, "vqssl.kernels.fake_triton", fake)


def test_a_kernel_that_runs_is_used(fresh, monkeypatch):
    module(monkeypatch, lambda a, b: a + b)
    assert backends.by_triton("fake_triton", "run", 1, 2) == 3


def test_kernels_run_on_the_device_of_their_tensors(fresh, monkeypatch):
    """Triton launches on the current device. Without two GPUs: a tensor that says that it is on the second."""
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
    module(monkeypatch, lambda x, k: list(entered))
    assert backends.by_triton("fake_triton", "run", torch.zeros(2).as_subclass(OnSecond), 3) == [OnSecond.device]
    assert entered == [OnSecond.device, "left"]


def test_a_missing_kernel_is_warned_of_once(fresh):
    with pytest.warns(RuntimeWarning, match="plain torch takes the place of the GPU kernel missing_triton"):
        assert backends.by_triton("missing_triton", "run", 1) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.by_triton("missing_triton", "run", 1) is None


def test_a_kernel_that_does_not_compile_is_given_up(fresh, monkeypatch):
    failure = type("CompilationError", (Exception,), {"__module__": "triton.compiler.errors"})
    calls = []

    def run():
        calls.append(1)
        raise failure("no such instruction")

    module(monkeypatch, run)
    with pytest.warns(RuntimeWarning, match="CompilationError: no such instruction"):
        assert backends.by_triton("fake_triton", "run") is None
    assert backends.by_triton("fake_triton", "run") is None
    assert calls == [1]


def test_other_errors_are_not_hidden(fresh, monkeypatch):
    def run():
        raise RuntimeError("illegal memory access")

    module(monkeypatch, run)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        backends.by_triton("fake_triton", "run")


def test_precision_by_name():
    x, codes = torch.randn(50, 4), torch.randn(9, 4)
    expected = nearest_codeword(x, codes)
    for precision in (*kernels.PRECISIONS, "torch"):
        assert torch.equal(nearest_codeword(x, codes, precision=precision), expected)
        assert torch.equal(EMACodebook(9, 4, precision=precision)(x).indices, EMACodebook(9, 4)(x).indices)
    for build in (lambda: nearest_codeword(x, codes, precision="fp8"), lambda: EMACodebook(9, 4, precision="fp8")):
        with pytest.raises(ValueError, match="precision must be one of 'exact', 'tf32', 'fp16', 'bf16', 'torch'"):
            build()


@pytest.mark.parametrize(("switch", "expected"), [("highest", "exact"), ("high", "tf32"), ("medium", "bf16")])
def test_the_precision_of_torch_is_followed(switch, expected):
    from vqssl.functional.search import resolve_precision

    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(switch)
        assert resolve_precision("torch") == expected
        assert resolve_precision("exact") == "exact"
    finally:
        torch.set_float32_matmul_precision(before)


def test_threads_do_not_share_the_workspace():
    def search(seed):
        generator = torch.Generator().manual_seed(seed)
        x, codes = torch.randn(3000, 8, generator=generator), torch.randn(100 + seed, 8, generator=generator)
        for _ in range(5):
            found = kernels.nearest_codeword(x, codes, "euclidean")
        return torch.equal(found, torch.cdist(x.double(), codes.double()).argmin(-1))

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(search, range(24)))


def test_the_workspace_outlives_inference_mode_and_grows():
    name = "test"
    with torch.inference_mode():
        first = workspace(name, torch.float32, torch.device("cpu"), 3, 5)
    first.fill_(1.0)
    assert workspace(name, torch.float32, torch.device("cpu"), 15).data_ptr() == first.data_ptr()
    assert workspace(name, torch.float64, torch.device("cpu"), 15).data_ptr() != first.data_ptr()
    assert workspace(name, torch.float32, torch.device("cpu"), 1000).numel() == 1000
    huge = [workspace(name, torch.float32, torch.device("cpu"), 2**22 + 1) for _ in range(2)]
    assert huge[0].data_ptr() != huge[1].data_ptr()


def test_results_do_not_live_in_the_workspace():
    x, codes = torch.randn(300, 8), torch.randn(70, 8)
    found = kernels.nearest_codeword(x, codes, "euclidean")
    kept = found.clone()
    kernels.nearest_codeword(torch.randn(300, 8), torch.randn(70, 8), "cosine")
    assert torch.equal(found, kept)
