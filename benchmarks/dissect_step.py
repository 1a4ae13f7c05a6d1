"""What does quantisation add to a step of pretraining? ResNet-18 at 224 px, BYOL against DiSSECT.

`python -m benchmarks.dissect_step [--device cuda] [--quick]`
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from benchmarks import harness
from examples.pretrain.model import Model, SelfSupervised


def stepper(method: str, batch: int, size: int, device: str) -> Any:
    torch.manual_seed(0)
    model = SelfSupervised(method, 1, Model(), total_steps=1000).to(device).train()
    optimizer = torch.optim.SGD([p for _, p in model.trained_parameters()], lr=1e-3)
    views = [torch.randn(batch, 1, size, size, device=device) for _ in range(2)]

    def step() -> None:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            result = model(views)
        optimizer.zero_grad()
        result.loss.total.backward()
        optimizer.step()
        model.teacher.update_(model.student)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    batch, size = (64, 224) if options.device == "cuda" else (8, 224)
    runners = {method: stepper(method, batch, size, options.device) for method in ("byol", "dissect")}
    times = harness.race(runners, 2 if options.quick else 9, options.device)
    harness.ratios(times, "byol")
    record = {
        "batch": batch,
        "views": 2,
        "size": size,
        "times": times,
        "added percent": round(100 * (times["dissect"]["ratio"] - 1), 1),
    }
    harness.write("dissect_step", options.device, options.quick, record)


if __name__ == "__main__":
    main()
