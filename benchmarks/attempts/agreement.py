"""Ranks that differ in options, state, mode or number of calls: two processes over gloo."""

import contextlib
import datetime
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

import vqssl
from benchmarks.attempts.attempt import Outcome, attempt

LIMIT = 30
"""Seconds until the time-out of the process group, which no rank should have to wait for."""
SHORT_LIMIT = 10
"""The same where one rank never comes."""


def _rank(work: Callable[[int], Any], rank: int, folder: str, limit: int, results: Any) -> None:
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=limit)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=timeout)
    begin = time.monotonic()
    try:
        said = str(work(rank))
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    results.put((rank, said, time.monotonic() - begin))


def _two_ranks(work: Callable[[int], Any], limit: int = LIMIT) -> list[tuple[str, float]]:
    """Run `work` on two ranks and return what each returned or raised, and after how many seconds."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=_rank, args=(work, rank, folder, limit, results), daemon=True) for rank in range(2)
        ]
        for process in ranks:
            process.start()
        found = {}
        with contextlib.suppress(Exception):  # a rank that crashed or still waits says nothing
            for _ in ranks:
                rank, said, seconds = results.get(timeout=50)
                found[rank] = said, seconds
        for process in ranks:
            process.kill()
    return [found.get(rank, ("nothing", 50.0)) for rank in range(2)]


def _tokens(rank: int, step: int = 0) -> torch.Tensor:
    return torch.randn(64, 8, generator=torch.Generator().manual_seed(100 * rank + step))


def _steps(module: torch.nn.Module, rank: int, steps: int = 3) -> str:
    for step in range(steps):
        module(_tokens(rank, step))
    return "no error"


def _refused_by_name(work: Callable[[int], Any], *words: str) -> Outcome:
    """Survive if both ranks raise an error with these words, before the time-out."""
    found = _two_ranks(work)
    named = all(all(word in said for word in words) and seconds < LIMIT for said, seconds in found)
    seen = "; ".join(f"rank {rank} after {seconds:.0f} s: {said[:110]}" for rank, (said, seconds) in enumerate(found))
    return Outcome(named, seen)


def _option(name: str, first: Any, second: Any) -> Outcome:
    def work(rank: int) -> str:
        options = {"codebook_size": 16, "dim": 8, name: second if rank else first}
        return _steps(vqssl.EMACodebook(**options), rank)

    return _refused_by_name(work, name)


@attempt("another seed on rank 1", right="both ranks raise an error that names seed, 0 and 1")
def seed() -> Outcome:
    return _option("seed", 0, 1)


@attempt("another codebook_size on rank 1", right="both ranks raise an error that names it")
def codebook_size() -> Outcome:
    return _option("codebook_size", 16, 17)


@attempt("another decay on rank 1", right="both ranks raise an error that names it")
def decay() -> Outcome:
    return _option("decay", 0.99, 0.9)


@attempt("another metric on rank 1", right="both ranks raise an error that names it")
def metric() -> Outcome:
    return _option("metric", "euclidean", "cosine")


@attempt("another EMA rule on rank 1", right="both ranks raise an error that names it")
def ema() -> Outcome:
    return _option("ema", "count_weighted", "batch_mean")


@attempt("no revival on rank 1", right="both ranks raise an error that names it")
def revival() -> Outcome:
    return _option("revival", vqssl.BatchRevival(), None)


@attempt("another revival threshold on rank 1", right="both ranks raise an error that names it")
def threshold() -> Outcome:
    return _option("revival", vqssl.BatchRevival(0.1), vqssl.BatchRevival(0.2))


@attempt("a state of float64 on rank 1", right="both ranks raise an error that names dtype")
def dtype() -> Outcome:
    return _option("dtype", torch.float32, torch.float64)


@attempt("another number of scales on rank 1", right="both ranks raise an error that names in_channels")
def scales() -> Outcome:
    def work(rank: int) -> str:
        channels = [8, 8][: 1 + rank]
        quantizer = vqssl.MultiScaleQuantizer(channels, codebook_size=16, dim=8)
        for step in range(3):
            quantizer([_tokens(rank, step) for _ in channels])
        return "no error"

    return _refused_by_name(work, "in_channels")


@attempt("rank 0 alone loads a trained state", right="both ranks raise an error that names initialized")
def state_on_one_rank() -> Outcome:
    trained = vqssl.EMACodebook(codebook_size=16, dim=8)
    trained(_tokens(0))
    state = trained.state_dict()

    def work(rank: int) -> str:
        codebook = vqssl.EMACodebook(codebook_size=16, dim=8)
        if rank == 0:
            codebook.load_state_dict(state)
        return _steps(codebook, rank)

    return _refused_by_name(work, "initialized")


@attempt("each rank loads another trained state of equal age", right="both ranks raise an error that names the codes")
def two_states() -> Outcome:
    def work(rank: int) -> str:
        alone = [dist.new_group([each]) for each in range(2)][rank]
        codebook = vqssl.EMACodebook(codebook_size=16, dim=8, process_group=alone)
        _steps(codebook, rank)
        codebook.process_group = None
        return _steps(codebook, rank)

    return _refused_by_name(work, "codes")


@attempt("the codebook is frozen on rank 1", right="rank 0, which would wait for it, raises an error that names frozen")
def frozen() -> Outcome:
    def work(rank: int) -> str:
        codebook = vqssl.EMACodebook(codebook_size=16, dim=8)
        codebook.set_codes_(_tokens(7)[:16])
        codebook.freeze(rank == 1)
        said = _steps(codebook, rank)
        time.sleep(20 * rank)  # rank 1 goes on without the codebook
        return said

    said, seconds = _two_ranks(work, SHORT_LIMIT)[0]
    return Outcome("frozen on rank 1" in said and seconds < SHORT_LIMIT, f"rank 0 after {seconds:.0f} s: {said[:200]}")


def _named_at_time_out(work: Callable[[int], Any]) -> Outcome:
    """Survive if rank 0, which waits for rank 1 in vain, says so."""
    said, seconds = _two_ranks(work, SHORT_LIMIT)[0]
    return Outcome("training mode" in said and "eval mode" in said, f"rank 0 after {seconds:.0f} s: {said[:200]}")


@attempt("the codebook is in eval mode on rank 1", right="rank 0 names rank 1 and the mode when the time is over")
def eval_mode() -> Outcome:
    def work(rank: int) -> str:
        codebook = vqssl.EMACodebook(codebook_size=16, dim=8)
        codebook.set_codes_(_tokens(7)[:16])
        codebook.train(rank == 0)
        said = _steps(codebook, rank)
        time.sleep(20 * rank)
        return said

    return _named_at_time_out(work)


@attempt("rank 0 calls the codebook once more", right="rank 0 says that calls must be equal when the time is over")
def one_call_more() -> Outcome:
    def work(rank: int) -> str:
        codebook = vqssl.EMACodebook(codebook_size=16, dim=8)
        said = _steps(codebook, rank, steps=4 - rank)
        time.sleep(20 * rank)
        return said

    return _named_at_time_out(work)


def _bits_are_equal(work: Callable[[int], torch.nn.Module]) -> Outcome:
    def checksum(rank: int) -> str:
        module = work(rank)
        return str([float(value.double().sum()) for value in module.state_dict().values()])

    (first, _), (second, _) = _two_ranks(checksum)
    return Outcome(first == second and first.startswith("["), f"{first[:100]} and {second[:100]}")


@attempt("rank 0 alone evaluates before training", right="no wait: training goes on, ranks are equal")
def evaluation_on_one_rank() -> Outcome:
    def work(rank: int) -> torch.nn.Module:
        codebook = vqssl.EMACodebook(codebook_size=16, dim=8)
        codebook.set_codes_(_tokens(7)[:16])
        if rank == 0:
            codebook.eval()(_tokens(0))
        _steps(codebook.train(), rank)
        return codebook

    return _bits_are_equal(work)


@attempt("a frozen codebook in training mode on rank 0 alone, another trains", right="no wait, no error")
def frozen_on_one_rank() -> Outcome:
    def work(rank: int) -> str:
        codebook = vqssl.EMACodebook(codebook_size=16, dim=8)
        codebook.set_codes_(_tokens(7)[:16])
        codebook.freeze()
        if rank == 0:
            _steps(codebook, rank)
        return _steps(vqssl.EMACodebook(codebook_size=8, dim=8), rank)

    found = _two_ranks(work)
    return Outcome(all(said == "no error" and seconds < LIMIT for said, seconds in found), str(found))


@attempt("DDP broadcasts rank 0's state over another seed", right="training goes on, ranks are equal")
def ddp_heals_another_seed() -> Outcome:
    def work(rank: int) -> torch.nn.Module:
        class Net(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.linear = torch.nn.Linear(8, 8)
                self.codebook = vqssl.EMACodebook(codebook_size=16, dim=8, seed=rank)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                loss: torch.Tensor = self.codebook(self.linear(x)).commitment_loss
                return loss

        net = torch.nn.parallel.DistributedDataParallel(Net())
        for step in range(3):
            net(_tokens(rank, step)).backward()
        return net

    return _bits_are_equal(work)


@attempt("objects without a text of their own as options", right="training goes on, ranks are equal")
def options_with_addresses() -> Outcome:
    def work(rank: int) -> torch.nn.Module:
        padding: Iterator[object] = iter([object() for _ in range(1000 * rank)])  # objects lie elsewhere on each rank

        class First:
            def __call__(self, pool: Any, codebook_size: int, rng: torch.Tensor, metric: Any) -> None:
                return None

        codebook = vqssl.EMACodebook(
            codebook_size=16, dim=8, initialization=First(), metric=lambda x: x.clone(), seed=3
        )
        _steps(codebook, rank)
        del padding
        return codebook

    return _bits_are_equal(work)
