"""Count what a training forward of three scales launches, and time the parts of a codebook's step.

`python -m benchmarks.launches [--device cuda] [--dry]`. Launches and times of kernels are those of a GPU.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import vqssl
from vqssl.kernels import code_sums

SOURCE = str(Path(vqssl.__file__).parent)


class Counting(TorchDispatchMode):
    """Counts operators by the file of the library that calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: defaultdict[str, Counter[str]] = defaultdict(Counter)

    def __torch_dispatch__(self, operator: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        """Count an operator, and call it."""
        frame = sys._getframe(1)
        while frame.f_back is not None and not frame.f_code.co_filename.startswith(SOURCE):
            frame = frame.f_back
        self.found[Path(frame.f_code.co_filename).name][str(operator).removeprefix("aten.")] += 1
        return operator(*arguments, **(options or {}))


def kernels_of(run: Callable[[], Any]) -> list[tuple[str, int, float]]:
    """Return name, number and microseconds of the kernels of a call, those that take longest first."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    events = [event for event in profile.key_averages() if event.self_device_time_total]
    found = [(event.key[:60], event.count, round(event.self_device_time_total, 1)) for event in events]
    return sorted(found, key=lambda kernel: -kernel[2])


def three_scales(device: str) -> Callable[[], Any]:
    """Return a training forward of a quantiser of three scales."""
    model = vqssl.MultiScaleQuantizer([64, 128, 256], codebook_size=256, dim=64, device=device)
    maps = [torch.randn(8, width, side, side, device=device) for width, side in ((64, 16), (128, 8), (256, 4))]
    return lambda: model(maps)


def parts_of_a_step(rows: int, codes: int, dim: int, device: str) -> dict[str, Callable[[], Any]]:
    """Return a training forward of one codebook, and its parts."""
    codebook, x = vqssl.EMACodebook(codebook_size=codes, dim=dim, device=device), torch.randn(rows, dim, device=device)
    codebook(x)
    indices = codebook.quantize(x).indices
    return {
        "forward": lambda: codebook(x),
        "quantize": lambda: codebook.quantize(x),
        "update": lambda: vqssl.update_codebooks([codebook], [x], [indices], compared=True),
        "search": lambda: vqssl.functional.nearest_codeword(x, codebook.embed),
        "code sums": lambda: code_sums(x, indices, codes),
        "product": lambda: x @ codebook.embed.T,
    }


def device_ms(run: Callable[[], Any], rounds: int = 30) -> float:
    """Return the median milliseconds on the GPU, without the time that launching takes."""
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(3_000_000)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return float(np.median(times))


def loop_ms(run: Callable[[], Any], device: str, rounds: int = 50) -> float:
    """Return the milliseconds of a call in a loop, which on a GPU are those of launching if that takes longer."""
    start = time.perf_counter()
    for _ in range(rounds):
        run()
    if device == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start) / rounds


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dry", action="store_true", help="tiny sizes on a CPU")
    options = parser.parse_args()
    device = options.device
    forward = three_scales(device)
    for _ in range(3):
        forward()
    with Counting() as counted:
        forward()
    print(f"operators of a training forward of three scales: {sum(map(Counter.total, counted.found.values()))}")
    for name, operators in sorted(counted.found.items()):
        print(f"  {name}: {operators.total()} ({', '.join(f'{key} {n}' for key, n in operators.most_common(6))})")
    if device == "cuda":
        kernels = kernels_of(forward)
        print(f"kernels: {sum(n for _, n, _ in kernels)}, {sum(spent for *_, spent in kernels):.0f} us on the device")
    for rows in (64,) if options.dry else (25088, 100352):
        for name, run in parts_of_a_step(rows, *((16, 8) if options.dry else (2048, 128)), device).items():
            run()
            on_device = f"{device_ms(run):.3f} ms on the device, " if device == "cuda" else ""
            print(
                f"{rows} tokens, {name}: {on_device}{loop_ms(run, device, 2 if options.dry else 50):.3f} ms in a loop"
            )
            if device == "cuda" and name == "forward":
                for key, number, spent in kernels_of(run):
                    print(f"  {key}: {number}, {spent} us")


if __name__ == "__main__":
    main()
