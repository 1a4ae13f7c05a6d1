"""Time the search's kernels with every candidate block size on the GPU at hand: `python -m benchmarks.tune`.

Prints the kernels' times by size, each answer compared with float64 first, and keeps the fastest sizes for this user.
The search reads the file afterwards (see vqssl.kernels.nearest.tuning). Results do not depend on it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.search import exact, material
from vqssl.kernels.nearest import search_triton, tuning

KERNELS = ("sample_centre", "round_codes", "first_look", "close_calls", "last_look")
ROUNDS = 5


def kernel_times(search: Callable[[], Any]) -> dict[str, float]:
    """Return the microseconds of each kernel of a search, with tokens that are not in the cache."""
    flush = torch.empty(2**26, dtype=torch.int32, device="cuda")  # 256 MB
    with torch.profiler.profile() as profile:
        for _ in range(ROUNDS):
            flush.zero_()
            search()
        torch.cuda.synchronize()
    times = {event.key: event.device_time_total / ROUNDS for event in profile.key_averages()}
    return {name: round(times[name], 1) for name in KERNELS if times.get(name)}


def searcher(x: Tensor, codes: Tensor, config: tuning.Config) -> Callable[[], search_triton.Found]:
    """Return the search with these block sizes of the first look."""
    return lambda: search_triton.search_triton(x, codes, "euclidean", first=config)


def compiled(task: tuple[int, int, tuning.Config]) -> str:
    """Compile for ``(D, K, block sizes)``, into Triton's cache; return why that failed, or nothing."""
    dim, count, config = task
    try:
        searcher(torch.randn(256, dim, device="cuda"), torch.randn(count, dim, device="cuda"), config)()
        torch.cuda.synchronize()
    except Exception as error:  # too much shared memory, or the compiler gives up
        return type(error).__name__
    return ""


def one_width(dim: int, rows: int, count: int, capability: tuple[int, int], workers: int) -> tuning.Config:
    """Print the kernels' times of each candidate for tokens of one width; return the fastest."""
    candidates = tuning.candidates(capability, dim, "half")
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        failures = list(pool.map(compiled, [(dim, count, config) for config in candidates]))
    x, codes = material("random", rows, count, dim, "cuda")
    expected = exact(x, codes)
    times = {}
    for config, failure in zip(tqdm(candidates, desc=f"D = {dim}", leave=False), failures, strict=True):
        if failure:
            print(f"D = {dim}, {tuple(config)}: {failure}", flush=True)
            continue
        search = searcher(x, codes, config)
        found, left = search()
        if not torch.equal(found, expected):
            raise SystemExit(f"D = {dim}, {tuple(config)}: {int((found != expected).sum())} rows differ from float64")
        parts = kernel_times(search)
        close, still_open = (f"{100 * number / rows:.3f}%" for number in left.tolist())
        times[config] = sum(parts.values())
        print(f"D = {dim}, {tuple(config)}: {parts} us, close calls {close}, open {still_open}", flush=True)
    return min(times, key=lambda config: times[config])


def main() -> None:
    """Time every candidate at some widths, and write the fastest so far to the user's file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 64, 256], help="D (default: 128 64 256)")
    parser.add_argument("--rows", type=int, default=100352, help="N (default: 100352)")
    parser.add_argument("--codes", type=int, default=2048, help="K (default: 2048)")
    parser.add_argument("--workers", type=int, default=8, help="processes that compile (default: 8)")
    parser.add_argument("--dry", action="store_true", help="list the candidates of an H100, time and write nothing")
    options = parser.parse_args()
    if options.dry:
        for dim in options.widths:
            print(f"D = {dim}: {tuning.candidates((9, 0), dim, 'half')}")
        print(f"would write {tuning.tuning_file()}")
        return
    if not torch.cuda.is_available():
        raise SystemExit("tuning needs a GPU")
    capability = torch.cuda.get_device_capability()
    path = tuning.tuning_file()
    table: dict[str, list[int]] = json.loads(path.read_text()) if path.exists() else {}
    for dim in options.widths:
        best = one_width(dim, options.rows, options.codes, capability, options.workers)
        table[tuning.key(capability, dim, "half")] = list(best)
        print(f"D = {dim}: {tuple(best)} is fastest", flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(table, indent=1) + "\n")
    print(f"written: {path}")


if __name__ == "__main__":
    main()
