"""Two ranks with accumulated gradients in fp16 resume to the bit, and compute what one process does with all images."""

import datetime
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import vqssl
from examples.pretrain import ranks
from examples.pretrain.phantoms import make_phantoms
from examples.pretrain.train import Run
from tests.examples.test_optimizer_step import everything_of, make_exact, tensors_of
from tests.examples.tiny import QUICK, pretraining
from tests.laws import assert_same_bits
from tests.rank_processes import run_ranks

RANKS = 2


def exact_steps(folder, accumulate):
    """Take steps in float64 without BatchNorm on this rank's share of each batch; return all that is trained."""
    config = pretraining(optimization=replace(QUICK, accumulate=accumulate))
    run = make_exact(Run(make_phantoms(48, 32, seed=0), config, folder))
    generator = torch.Generator().manual_seed(0)
    for book in run.method.modules():
        if isinstance(book, vqssl.EMACodebook):
            book.set_codes_(torch.randn(book.embed.shape, generator=generator, dtype=torch.float64))
    run.method.train()
    forward = run.method
    if ranks.world_size() > 1:
        forward = DistributedDataParallel(run.method, find_unused_parameters=True, **ranks.buffers_stay())
    for _ in range(3):
        batch = torch.rand(16, 1, 32, 32, generator=generator)
        run._step(forward, batch[ranks.rank() :: ranks.world_size()])
    return everything_of(run)


def work(rank, folder):
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=300)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS, timeout=timeout)
    found = {"exact": exact_steps(folder / "exact", 2)}
    phantoms = make_phantoms(48, 32, seed=0)
    config = pretraining(optimization=replace(QUICK, epochs=2, accumulate=2, precision="fp16"))
    unbroken = Run(phantoms, config, folder / "unbroken")
    unbroken.train(quiet=True)
    Run(phantoms, config, folder / "broken").train(until=1, quiet=True)
    resumed = Run(phantoms, config, folder / "broken")
    assert resumed.resume()
    torch.manual_seed(99 + rank)
    resumed.train(quiet=True)
    found |= {"unbroken": everything_of(unbroken), "resumed": everything_of(resumed), "model": tensors_of(unbroken)}
    torch.save(found, folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.thorough
def test_two_ranks_resume_to_the_bit_and_equal_one_process(tmp_path):
    run_ranks(work, (tmp_path,), RANKS)
    both = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(RANKS)]
    for found in both:
        assert_same_bits(found["unbroken"], found["resumed"])
    assert_same_bits(both[0]["model"], both[1]["model"])
    whole = exact_steps(tmp_path / "whole", 1)
    for found in both:
        torch.testing.assert_close(found["exact"], whole, rtol=1e-9, atol=1e-10)
