"""Time the candidate block sizes on the GPU at hand, and keep the fastest for this user: `python -m benchmarks.tune`.

The search reads the file afterwards (see vqssl.kernels.nearest.tuning). Results do not depend on it.
"""

from __future__ import annotations

import argparse
import json

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks import harness
from benchmarks.search import material
from vqssl.kernels.nearest import search_triton, tuning


def timed(x: Tensor, codes: Tensor, config: tuning.Config) -> float | None:
    """Return the milliseconds of a search with this configuration; None if it does not compile or fit."""

    def search() -> Tensor:
        return search_triton.search_triton(x, codes, "euclidean", first=config).indices

    try:
        race = harness.race({"search": search}, 5, "cuda")
    except Exception as error:
        print(f"{config}: {type(error).__name__}")
        return None
    return race["search"]["median"]


def main() -> None:
    """Time every candidate of the first look at three widths, and write the fastest so far to the user's file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 64, 256], help="D (default: 128 64 256)")
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
    for dim in tqdm(options.widths, desc="widths"):
        x, codes = material("random", 100352, 2048, dim, "cuda")
        times = {}
        for config in tuning.candidates(capability, dim, "half"):
            time = timed(x, codes, config)
            if time is not None:
                times[config] = time
        best = min(times, key=lambda config: times[config])
        table[tuning.key(capability, dim, "half")] = list(best)
        print(f"D = {dim}: {best} {times[best]:.3f} ms of {times}", flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(table, indent=1) + "\n")
    print(f"written: {path}")


if __name__ == "__main__":
    main()
