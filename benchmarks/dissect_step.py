"""What quantisation costs in a pretraining step, by scale and by size of the encoder and the images.

`python -m benchmarks.dissect_step [--device cuda] [--quick] [--dry]`

BYOL, DiSSECT (codes, fusion, refined target) and DiSSECT with code prediction take steps in turn, on the coarsest
map alone, on two, three and four maps. The finest map has most places, and costs most.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from benchmarks import harness
from examples.pretrain.encoder import STAGES, Encoder, EncoderOptions
from examples.pretrain.methods import METHODS
from examples.pretrain.presets import PRESETS, Experiment


class Setting(NamedTuple):
    """A preset, and the images that it takes a step on."""

    preset: Experiment
    side: int
    batch: int

    @property
    def title(self) -> str:
        """Width of the encoder and size of the images."""
        return f"width {self.preset.encoder.width}, {self.side} px, batch {self.batch}"


SMALL, PAPER = (PRESETS[name][1] for name in ("small", "paper"))
SETTINGS = {
    "cpu": (Setting(SMALL, 32, 64), Setting(SMALL, 64, 64), Setting(PAPER, 224, 8)),
    "cuda": (Setting(SMALL, 64, 256), Setting(PAPER, 224, 64)),
    "dry": (Setting(SMALL, 32, 4),),
}
SCALES = (STAGES[3:], STAGES[2:], STAGES[1:], STAGES)


def stepper(name: str, setting: Setting, scales: tuple[str, ...], device: str) -> Callable[[], None]:
    """Return a function that takes one training step of a method with the options of the preset."""
    torch.manual_seed(0)
    options: EncoderOptions = replace(setting.preset.encoder, scales=scales)
    method: Any = METHODS[name](Encoder(1, options), setting.preset.options[name], total_steps=1000, seed=0)
    method.to(device).train()
    optimizer = torch.optim.SGD([each for each in method.parameters() if each.requires_grad], lr=1e-3)
    views = [torch.randn(setting.batch, 1, setting.side, setting.side, device=device) for _ in range(2)]

    def step() -> None:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            loss = method(views).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.after_step()

    return step


def main() -> None:
    """Time all methods in turn at each setting, and keep the result."""
    options = harness.options_of(__doc__, quick="two rounds, and a file of its own").parse_args()
    rounds = 1 if options.dry else 2 if options.quick else 9
    found = []
    for setting in SETTINGS["dry" if options.dry else options.device]:
        runners = {"byol": stepper("byol", setting, STAGES, options.device)}
        for scales in SCALES:
            for name in ("dissect", "dissect_codes"):
                runners[f"{name}, {' '.join(scales)}"] = stepper(name, setting, scales, options.device)
        times = harness.race(runners, rounds, options.device)
        harness.ratios(times, "byol")
        codes = setting.preset.options["dissect"].codebook_size
        found.append({"title": setting.title, "codes": codes, "views": 2, "times": times})
    harness.write("dissect_step", options, {"settings": found})


if __name__ == "__main__":
    main()
