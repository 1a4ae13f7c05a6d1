"""Compare 500 training steps under autocast with 500 steps in float32: loss and perplexity at the end.

`python -m tests.reliability.band [cuda] [--trial]`. test_precision.py keeps the difference within BAND and SPREAD.
"""

import sys

import torch
from torch import Tensor

from tests.reliability.material import Net, images
from tests.reliability.record import write

BAND = 0.05
"""Largest relative difference from float32 of the mean loss of the last 100 steps."""
SPREAD = 0.1
"""Largest relative difference from float32 of each codebook's final perplexity."""


def train(net, steps, *, dtype=None, scaler=None, batch_of=images) -> Tensor:
    """Train on the network's device, with autocast and GradScaler where given; return the loss of each step."""
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
    """Return the perplexity of each codebook."""
    return torch.stack([codebook.usage().perplexity for codebook in net.quantizer.codebooks])


def main() -> None:
    """Train in three precisions and write the record."""
    device = "cuda" if "cuda" in sys.argv else "cpu"
    steps = 10 if "--dry" in sys.argv else 500
    runs = {}
    for name, dtype in (("float32", None), ("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        net = Net().to(device)
        scaler = torch.amp.GradScaler(device) if dtype == torch.float16 else None
        losses = train(net, steps, dtype=dtype, scaler=scaler)
        runs[name] = losses[-steps // 5 :].mean().item(), perplexities(net)
    loss, perplexity = runs["float32"]
    figures = {
        "steps": steps,
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
    command = "python -m tests.reliability.band" + " cuda" * (device == "cuda")
    write("band", command, figures, device=device, trial=bool({"--trial", "--dry"} & set(sys.argv)))


if __name__ == "__main__":
    main()
