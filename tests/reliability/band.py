"""How far 500 steps under autocast end from 500 steps in float32.

`python -m tests.reliability.band [cuda] [--trial]`; test_precision.py holds it within BAND and SPREAD.
"""

import sys

import torch
from torch import Tensor

from tests.reliability.material import Net, images
from tests.reliability.record import keep

BAND = 0.05
"""Of the mean loss of the last 100 steps, relative to float32's."""
SPREAD = 0.1
"""Of each codebook's perplexity at the end, relative to float32's."""


def train(net, steps, *, dtype=None, scaler=None, batch_of=images) -> Tensor:
    """The losses of a loop as a user of autocast, and of GradScaler, writes it; on the device of the net."""
    device = net.fusion.alpha.device
    optimizer = torch.optim.SGD(net.trained(), lr=0.05, momentum=0.9)
    losses = []
    for step in range(steps):
        with torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            loss = net(batch_of(step, 8).to(device))
        optimizer.zero_grad()
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        net.teacher.update_(net.student)
        losses.append(loss.detach().float())
    return torch.stack(losses).cpu()


def perplexities(net) -> Tensor:
    return torch.stack([codebook.usage().perplexity for codebook in net.quantizer.codebooks])


def main() -> None:
    device = "cuda" if "cuda" in sys.argv else "cpu"
    runs = {}
    for name, dtype in (("float32", None), ("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        net = Net().to(device)
        scaler = torch.amp.GradScaler(device) if dtype == torch.float16 else None
        losses = train(net, 500, dtype=dtype, scaler=scaler)
        runs[name] = losses[-100:].mean().item(), perplexities(net)
    loss, perplexity = runs["float32"]
    figures = {
        "steps": 500,
        "loss": {name: round(value, 5) for name, (value, _) in runs.items()},
        "perplexity": {name: [round(v, 2) for v in values.tolist()] for name, (_, values) in runs.items()},
        "loss off by": {name: round(abs(v / loss - 1), 4) for name, (v, _) in runs.items() if name != "float32"},
        "perplexity off by": {
            name: round((v / perplexity - 1).abs().max().item(), 4)
            for name, (_, v) in runs.items()
            if name != "float32"
        },
        "bands": {"loss": BAND, "perplexity": SPREAD},
    }
    name, command = ("band", "python -m tests.reliability.band")
    if device == "cuda":
        name, command = f"{name}.cuda", f"{command} cuda"
    keep(name, command, figures, "--trial" not in sys.argv)


if __name__ == "__main__":
    main()
