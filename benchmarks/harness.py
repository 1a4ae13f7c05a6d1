"""Interleaved timing, and the files that benchmarks write: what all of them share."""

from __future__ import annotations

import argparse
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


def options_of(description: str | None, **quick: str) -> argparse.ArgumentParser:
    """Return a parser with the options of every benchmark: ``--device``, ``--quick`` and ``--dry``."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--quick", action="store_true", help=quick.get("quick", "fewer rounds, and a file of its own"))
    parser.add_argument("--dry", action="store_true", help="seconds on tiny sizes: tries the program, measures nothing")
    return parser


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
    launching: dict[int, float] = {}

    def clock(runner: Callable[[], Any]) -> float:
        if id(runner) not in launching:
            torch.cuda.synchronize()
            before = time.perf_counter()
            runner()
            launching[id(runner)] = time.perf_counter() - before
            torch.cuda.synchronize()
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # The sleep keeps the GPU busy while Python launches, so that launch time is not measured: twice as long as that
        # takes, at the clock of the fastest GPUs.
        torch.cuda._sleep(int(2_000_000 + 2 * launching[id(runner)] * 2e9))
        start.record()
        runner()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)

    return clock


def write(name: str, options: argparse.Namespace, figures: dict[str, Any], *, part: bool = False) -> None:
    """Write the record of this run to ``runs/benchmarks/``.

    Args:
        name: the benchmark; it becomes the record's ``kind`` and part of the name of its file.
        options: of :func:`options_of`; quick and dry runs have files of their own.
        figures: what was measured; a ``command`` among them takes the place of this process's own.
        part: the run goes on, and this is what it has so far: kept in a file of its own until the whole is there.
    """
    command = command_line(f"benchmarks.{Path(sys.argv[0]).stem}")
    record = {"kind": name, **provenance(command, options.device), **figures}
    path = run_file(name, options.device, "dry" if options.dry else "quick" if options.quick else "")
    so_far = path.with_suffix(".part.json")
    records.write_run(so_far if part else path, record)
    if not part:
        so_far.unlink(missing_ok=True)


def run_file(name: str, device: str, extent: str = "") -> Path:
    """Return the file that :func:`write` writes; ``extent`` is ``"quick"``, ``"dry"``, or empty for a whole run."""
    return records.RUNS / "benchmarks" / f"{extent}{'.' if extent else ''}{device}.{name}.json"
