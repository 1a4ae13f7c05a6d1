"""Cost of quantisation in a pretraining step: ResNet-18 at 224 px, BYOL against DiSSECT.

`python -m benchmarks.dissect_step [--device cuda] [--quick]`
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks import harness
from examples.pretrain.encoder import Encoder, EncoderOptions
from examples.pretrain.methods import METHODS


def stepper(name: str, batch: int, size: int, device: str) -> Callable[[], None]:
    """Return a function that takes one training step of a method with its default options."""
    torch.manual_seed(0)
    method: Any = METHODS[name](Encoder(1, EncoderOptions()), METHODS[name].Options(), total_steps=1000, seed=0)
    method.to(device).train()
    optimizer = torch.optim.SGD([each for each in method.parameters() if each.requires_grad], lr=1e-3)
    views = [torch.randn(batch, 1, size, size, device=device) for _ in range(2)]

    def step() -> None:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            loss = method(views).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.after_step()

    return step


def main() -> None:
    """Time both methods in turn and keep the result."""
    options = harness.options_of(__doc__, quick="two rounds, and a file of its own").parse_args()
    batch, size = (64, 224) if options.device == "cuda" else (2, 64) if options.dry else (8, 224)
    runners = {name: stepper(name, batch, size, options.device) for name in ("byol", "dissect")}
    times = harness.race(runners, 1 if options.dry else 2 if options.quick else 9, options.device)
    harness.ratios(times, "byol")
    record = {
        "batch": batch,
        "views": 2,
        "size": size,
        "times": times,
        "added percent": round(100 * (times["dissect"]["ratio"] - 1), 1),
    }
    harness.write("dissect_step", options, record)


if __name__ == "__main__":
    main()
