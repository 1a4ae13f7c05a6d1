"""Scratch memory: kept within a thread, never shared between calls, and never part of a result."""

import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vqssl import kernels
from vqssl.kernels.workspace import workspace

CPU = torch.device("cpu")


def test_buffer_is_reused_for_equal_or_smaller_shapes_of_its_name_and_dtype():
    with workspace() as memory:
        first = memory.empty("test", torch.float32, CPU, 3, 5)
        assert memory.empty("test", torch.float32, CPU, 15).data_ptr() == first.data_ptr()
        assert memory.empty("test", torch.float64, CPU, 15).data_ptr() != first.data_ptr()
        assert memory.empty("test", torch.float32, CPU, 1000).numel() == 1000


def test_next_call_gets_the_memory_of_the_last_and_a_call_within_a_call_does_not():
    with workspace() as outer:
        pass
    with workspace() as again, workspace() as inner:
        assert again is outer
        assert inner is not outer
    with workspace() as after, workspace() as within:
        assert after is not within


def test_buffer_made_in_inference_mode_can_be_written_outside_of_it():
    with torch.inference_mode(), workspace() as memory:
        buffer = memory.empty("test in inference mode", torch.float32, CPU, 3, 5)
    buffer.fill_(1.0)


def test_large_buffers_are_not_kept():
    with workspace() as memory:
        huge = [memory.empty("test", torch.float32, CPU, 2**22 + 1) for _ in range(2)]
    assert huge[0].data_ptr() != huge[1].data_ptr()


def search_cases():
    """Return two searches of the same sizes with their answers."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(2):
        x, codes = torch.randn(1500, 8, generator=generator), torch.randn(300, 8, generator=generator)
        found.append((x, codes, torch.cat([kernels.nearest_reference(part, codes) for part in x.split(100)])))
    return found


class Nested(TorchDispatchMode):
    """Runs a function before and after every operator."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.calls = inner, 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        if "vqssl" not in str(function):
            self.calls += 1
            self.inner()
        return result


def nearest_within_dispatch(x, codes):
    """Search under the modes that are active, as a caller's own kernel would: operators hide theirs from modes."""
    return kernels.nearest.tiled.nearest_codeword_tiled(x, codes, "euclidean")


def test_search_between_the_operators_of_another_search():
    (x, codes, expected), (y, others, answers) = search_cases()
    wrong = []

    def inner():
        wrong.append(not torch.equal(kernels.nearest_codeword(y, others, "euclidean"), answers))

    with Nested(inner) as mode:
        found = nearest_within_dispatch(x, codes)
    assert mode.calls > 20, "the mode saw no operators of the search"
    assert torch.equal(found, expected)
    assert not any(wrong)


def test_squared_error_between_the_operators_of_another():
    x, codes, y = torch.randn(500, 8), torch.randn(30, 8), torch.randn(500, 8)
    indices = torch.randint(30, (500,))
    expected, answer = ((t - codes[indices]).square().sum() for t in (x, y))
    plain = kernels.squared_error
    with Nested(lambda: torch.testing.assert_close(plain(y, indices, codes), answer)):
        found = plain._init_fn(x, indices, codes)
    torch.testing.assert_close(found, expected)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no interval timers here")
def test_search_from_a_signal_handler_during_a_search():
    (x, codes, expected), (y, others, answers) = search_cases()
    inner = []

    def handler(*_):
        inner.append(torch.equal(kernels.nearest_codeword(y, others, "euclidean"), answers))

    before = signal.signal(signal.SIGALRM, handler)
    outer = []
    try:
        for round in range(300):
            # Once a round, at a moment of its own: a timer that repeats could fire faster than the handler ends.
            signal.setitimer(signal.ITIMER_REAL, 1e-5 * (1 + 7 * round % 300))
            outer.append(torch.equal(kernels.nearest_codeword(x, codes, "euclidean"), expected))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert len(inner) > 30, "the timer hardly ever fired"
    assert all(outer)
    assert all(inner)


def test_threads_do_not_share_buffers():
    def search(seed):
        generator = torch.Generator().manual_seed(seed)
        x, codes = torch.randn(3000, 8, generator=generator), torch.randn(100 + seed, 8, generator=generator)
        for _ in range(5):
            found = kernels.nearest_codeword(x, codes, "euclidean")
        return torch.equal(found, torch.cdist(x.double(), codes.double()).argmin(-1))

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(search, range(24)))


def test_results_do_not_live_in_buffers():
    x, codes = torch.randn(300, 8), torch.randn(70, 8)
    found = kernels.nearest_codeword(x, codes, "euclidean")
    kept = found.clone()
    kernels.nearest_codeword(torch.randn(300, 8), torch.randn(70, 8), "cosine")
    assert torch.equal(found, kept)
