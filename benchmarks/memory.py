"""Measure the peak memory of a quantiser's training step, besides tokens and codebook.

`python -m benchmarks.memory [--device cuda] [--quick]`. On a CPU torch's profiler counts every allocation. The
measurement is checked first on allocations of known size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import harness
from benchmarks.search import material
from benchmarks.train_step import makers, step


def peak(run: Callable[[], Any], device: str) -> int:
    """Return the most bytes that `run` holds at once beyond what was allocated before."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    running = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        running += event.nbytes()
        most = max(most, running)
    return most


def check_peak(device: str) -> None:
    """Exit where :func:`peak` does not return the known peak of a few allocations."""

    def known() -> None:
        a = torch.empty(2**20, device=device)
        b = torch.empty(2**21, device=device)
        del a
        c = torch.empty(2**19, device=device)
        del b, c

    measured = peak(known, device)
    if abs(measured - 3 * 2**22) > 2**12:
        raise SystemExit(f"the peak is measured wrongly: 12 MiB were allocated, measured {measured / 2**20:.2f}")


def main() -> None:
    """Run the benchmark."""
    options = harness.options_of(__doc__).parse_args()
    check_peak(options.device)
    shape = (96, 64, 8) if options.dry else (12544, 2048, 128) if options.quick else (50176, 2048, 128)
    x, codes = material("random", *shape, options.device)
    gradient = torch.randn_like(x)
    found = {}
    for name, make in tqdm(makers().items(), desc="quantisers"):
        module = make(codes)
        tokens = (x[None] if "pytorch" in name else x).detach().clone().requires_grad_()

        def run(module: Any = module, tokens: Any = tokens) -> None:
            step(module, tokens, gradient.view_as(tokens))
            tokens.grad = None

        cold = peak(run, options.device)
        found[name] = {"MiB": round(peak(run, options.device) / 2**20, 1), "MiB, first step": round(cold / 2**20, 1)}
    n, _, d = shape
    bound = (3 * n * d * 4 + 16 * 10**6) / 2**20
    record = {"shape": shape, "peak": found, "bound MiB (3 N D 4 + 16 MB)": round(bound, 1)}
    record["tokens MiB"] = round(n * d * 4 / 2**20, 1)
    harness.write("memory", options, record)


if __name__ == "__main__":
    main()
