"""What every benchmark shares: who was measured, interleaved timing, and where results go."""

from __future__ import annotations

import json
import platform
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "vqssl",
    "vector-quantize-pytorch",
    "faiss-cpu",
    "pykeops",
    "flash-kmeans",
    "monai",
)


def environment(device: str) -> dict[str, Any]:
    """The machine and the versions, for the record."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    found = {
        "device": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "cores": torch.get_num_threads() if device == "cpu" else None,
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit.stdout.strip(),
        "command": "python -m " + " ".join([command_name(), *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
    }
    return found


def command_name() -> str:
    return f"benchmarks.{Path(sys.argv[0]).stem}"


def processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    name = re.search(r"model name\s*: (.*)", text)
    numbers = [re.search(rf"{field}\s*: (\d+)", text) for field in ("cpu family", r"model\t")]
    return f"{name[1] if name else '?'} (family {', model '.join(n[1] for n in numbers if n)})"


def race(
    runners: dict[str, Callable[[], Any]], rounds: int, device: str = "cpu", seed: int = 0
) -> dict[str, dict[str, float]]:
    """Time all runners in turn, in another order each round: milliseconds, median and quartiles."""
    clock = _cuda_clock() if device == "cuda" else _cpu_clock
    shuffle = random.Random(seed)
    times: dict[str, list[float]] = {name: [] for name in runners}
    for runner in runners.values():  # what is compiled, allocated and loaded once
        runner()
        runner()
    for _ in tqdm(range(rounds), leave=False, desc="rounds"):
        order = list(runners)
        shuffle.shuffle(order)
        for name in order:
            times[name].append(clock(runners[name]))
    return {name: summary(values) for name, values in times.items()}


def summary(values: list[float]) -> dict[str, float]:
    low, middle, high = np.percentile(values, [25, 50, 75])
    return {"median": round(middle, 4), "q25": round(low, 4), "q75": round(high, 4), "rounds": len(values)}


def ratios(times: dict[str, dict[str, float]], floor: str) -> None:
    """Add to each entry how many times the floor it takes."""
    for entry in times.values():
        entry["ratio"] = round(entry["median"] / times[floor]["median"], 3)


def _cpu_clock(runner: Callable[[], Any]) -> float:
    start = time.perf_counter()
    runner()
    return 1e3 * (time.perf_counter() - start)


def _cuda_clock() -> Callable[[Callable[[], Any]], float]:
    flush = torch.empty(2**26, dtype=torch.int32, device="cuda")  # 256 MB: larger than any second-level cache

    def clock(runner: Callable[[], Any]) -> float:
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # The queue is kept busy while Python launches, so that its own time does not count.
        torch.cuda._sleep(2_000_000)
        start.record()
        runner()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)

    return clock


def write(name: str, device: str, quick: bool, record: dict[str, Any]) -> None:
    """Keep a result; quick ones apart from those that are committed."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{'quick.' if quick else ''}{device}.{name}.json"
    text = json.dumps({**environment(device), **record}, indent=1)
    # Lists of plain values on a line of their own.
    text = re.sub(r"\[\s+[^\[\]{}]*?\s+\]", lambda found: re.sub(r"\s*\n\s*", " ", found[0]), text)
    path.write_text(text + "\n")
    print(f"written: {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")
