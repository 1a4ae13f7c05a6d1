"""Time the candidate block sizes on the GPU at hand, and keep the fastest for this user: `python -m benchmarks.tune`.

The search reads the file afterwards (see vqssl.kernels.nearest.tuning). Results do not depend on it.
"""

from __future__ import annotations

import json

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks import harness
from benchmarks.search import material
from vqssl.kernels.nearest import search_triton, tuning


def timed(x: Tensor, codes: Tensor, config: tuning.Config, product: tuning.Product) -> float | None:
    """Return the milliseconds of a search with this configuration of one look; None if it does not compile or fit."""
    first, closer = (None, config) if product == "split" else (config, None)

    def search() -> Tensor:
        return search_triton.search_triton(x, codes, "euclidean", first=first, closer=closer).indices

    try:
        race = harness.race({"search": search}, 7, "cuda")
    except Exception as error:
        print(f"{config}: {type(error).__name__}")
        return None
    return race["search"]["median"]


def main() -> None:
    """Time every candidate of both looks at three widths, and write the fastest to the user's file."""
    if not torch.cuda.is_available():
        raise SystemExit("tuning needs a GPU")
    capability = torch.cuda.get_device_capability()
    table: dict[str, list[int]] = {}
    products: tuple[tuning.Product, ...] = ("half", "split")
    for dim in tqdm((64, 128, 256), desc="widths"):
        x, codes = material("random", 100352, 2048, dim, "cuda")
        for product in products:
            times = {}
            for config in tuning.candidates(capability, dim, product):
                time = timed(x, codes, config, product)
                if time is not None:
                    times[config] = time
            best = min(times, key=lambda config: times[config])
            table[tuning.key(capability, dim, product)] = list(best)
            print(f"D = {dim}, {product} products: {best} {times[best]:.3f} ms of {times}")
    path = tuning.tuning_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table, indent=1) + "\n")
    print(f"written: {path}")


if __name__ == "__main__":
    main()
