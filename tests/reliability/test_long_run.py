"""A short version of long_run.py, and bitwise equal repetitions of a training run."""

import pytest
import torch

import vqssl
from tests.laws import assert_same_bits
from tests.profiles import few
from tests.reliability import long_run
from tests.reliability.material import Net, gradients, images


@pytest.mark.thorough
def test_thousand_steps_leak_no_memory_and_leave_no_dead_codes():
    record = long_run.run(1000, looks=10)
    first, last = record["live tensors after the first tenth and at the end"]
    assert last <= first + 2
    assert record["memory growth MiB after the first tenth"] < 8
    assert record["numbers that are not finite"] == 0
    assert record["sum(cluster_size) off by at most"] < 1e-4
    assert record["least perplexity after the first tenth"] > long_run.CODES / 3
    assert record["dead codes at the end"] < long_run.CODES / 10
    # Without revival the jump leaves dead codes behind.
    without = long_run.run(1000, None, looks=10)
    assert without["perplexity at the end"] < 0.8 * record["perplexity at the end"]
    assert without["dead codes at the end"] > 3 * record["dead codes at the end"] + 10


@pytest.fixture
def deterministic():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("options", few([{}, {"metric": "cosine"}, {"shared": True}, {"ema": "batch_mean"}]))
@pytest.mark.parametrize("threads", few([2, 1]))
def test_two_deterministic_runs_are_bitwise_equal(options, threads):
    """Under torch.use_deterministic_algorithms, which raises where an operation is not; with k-means and revival."""

    def run():
        net = Net(initialization=vqssl.KMeansInit(5), **options)
        optimizer = torch.optim.SGD(net.trained(), lr=0.05, momentum=0.9)
        for step in range(25):
            optimizer.zero_grad()
            loss = net(images(step, 8))
            loss.backward()
            optimizer.step()
            net.teacher.update_(net.student)
        return [loss.detach(), gradients(net), dict(net.named_parameters()), dict(net.named_buffers())]

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_same_bits(run(), run())
    finally:
        torch.set_num_threads(before)
