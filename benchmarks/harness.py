"""Interleaved timing, and the files that benchmarks write: what all of them share."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from benchmarks import records
from benchmarks.provenance import command_line, provenance


def race(
    runners: dict[str, Callable[[], Any]], rounds: int, device: str = "cpu", seed: int = 0
) -> dict[str, dict[str, float]]:
    """Time all runners in turn, in a new random order each round.

    Args:
        runners: functions to time, by name.
        rounds: how often each is timed, after two calls that are not.
        device: ``"cpu"`` or ``"cuda"``.
        seed: seed of the order.

    Returns:
        For each runner the median and the quartiles in milliseconds, and the number of rounds.
    """
    clock = _cuda_clock() if device == "cuda" else _cpu_clock
    shuffle = random.Random(seed)
    times: dict[str, list[float]] = {name: [] for name in runners}
    for runner in runners.values():  # compile, allocate and load before the first round
        runner()
        runner()
    for _ in tqdm(range(rounds), leave=False, desc="rounds"):
        order = list(runners)
        shuffle.shuffle(order)
        for name in order:
            times[name].append(clock(runners[name]))
    return {name: summary(values) for name, values in times.items()}


def summary(values: list[float]) -> dict[str, float]:
    """Return median, quartiles and number of values."""
    low, middle, high = np.percentile(values, [25, 50, 75])
    return {"median": round(middle, 4), "q25": round(low, 4), "q75": round(high, 4), "rounds": len(values)}


def ratios(times: dict[str, dict[str, float]], floor: str) -> None:
    """Add to each entry the ratio of its median to that of `floor`."""
    for entry in times.values():
        entry["ratio"] = round(entry["median"] / times[floor]["median"], 3)


def _cpu_clock(runner: Callable[[], Any]) -> float:
    start = time.perf_counter()
    runner()
    return 1e3 * (time.perf_counter() - start)


def _cuda_clock() -> Callable[[Callable[[], Any]], float]:
    flush = torch.empty(2**26, dtype=torch.int32, device="cuda")  # 256 MB: larger than any L2 cache

    def clock(runner: Callable[[], Any]) -> float:
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # The sleep keeps the GPU busy while Python launches, so that launch time is not measured.
        torch.cuda._sleep(2_000_000)
        start.record()
        runner()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)

    return clock


def write(name: str, device: str, quick: bool, figures: dict[str, Any]) -> None:
    """Write the record of this run to ``runs/benchmarks/``.

    Args:
        name: the benchmark; it becomes the record's ``kind`` and part of the name of its file.
        device: ``"cpu"`` or ``"cuda"``.
        quick: keep the file apart from that of a full run.
        figures: what was measured; a ``command`` among them takes the place of this process's own.
    """
    command = command_line(f"benchmarks.{Path(sys.argv[0]).stem}")
    record = {"kind": name, **provenance(command, device), **figures}
    records.write_run(run_file(name, device, quick), record)


def run_file(name: str, device: str, quick: bool) -> Path:
    """Return the file that :func:`write` writes."""
    return records.RUNS / "benchmarks" / f"{'quick.' if quick else ''}{device}.{name}.json"
