"""Time the candidate block sizes on the GPU at hand, and keep the fastest for this user: `python -m benchmarks.tune`.

The search reads the file afterwards (see vqssl.kernels.tuning). Its answers do not depend on it.
"""

from __future__ import annotations

import json
from unittest import mock

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks import harness
from benchmarks.search import material
from vqssl.kernels import nearest_triton, tuning


def timed(x: Tensor, codes: Tensor, config: tuning.Config, split: bool) -> float | None:
    """Milliseconds of a search with this configuration of one look; None where it does not compile or fit."""

    def chosen(capability: tuple[int, int], dim: int, **which: bool) -> tuning.Config:
        return config if which.get("split", False) == split else tuning.choose(capability, dim, **which)

    with mock.patch.object(nearest_triton, "choose", chosen):
        try:
            race = harness.race(
                {"it": lambda: nearest_triton.nearest_codeword_triton(x, codes, "euclidean")}, 7, "cuda"
            )
        except Exception as error:
            print(f"{config}: {type(error).__name__}")
            return None
    return race["it"]["median"]


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("tuning needs a GPU")
    capability = torch.cuda.get_device_capability()
    table: dict[str, list[int]] = {}
    for dim in tqdm((64, 128, 256), desc="widths"):
        x, codes = material("random", 100352, 2048, dim, "cuda")
        for split in (False, True):
            times = {}
            for config in tuning.candidates(capability, dim, split=split):
                time = timed(x, codes, config, split)
                if time is not None:
                    times[config] = time
            best = min(times, key=lambda config: times[config])
            table[tuning.key(capability, dim, split, False)] = list(best)
            print(f"D = {dim}{', closer look' if split else ''}: {best} {times[best]:.3f} ms of {times}")
    path = tuning.tuning_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table, indent=1) + "\n")
    print(f"written: {path}")


if __name__ == "__main__":
    main()
