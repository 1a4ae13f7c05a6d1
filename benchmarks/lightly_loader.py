"""Images a second of lightly's own data set and of torch's loader over it, for `benchmarks.data`.

lightly needs torchvision, which is in no environment of this project. Put both into a folder of their own, torchvision
of the minor version that belongs to torch, and name the folder::

    pip install --no-deps --target LIBRARIES torchvision==0.28.* lightly==1.6.0
    python -m benchmarks.data --libraries LIBRARIES
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import torch
from torch.utils.data import DataLoader

EPOCHS = ("first epoch of lightly's LightlyDataset", "warm epoch of lightly's LightlyDataset")


def lightly_rates(libraries: Path, folder: Path, side: int, batch: int, workers: int) -> dict[str, float]:
    """Return :func:`measure` of a process that has `libraries` on its path.

    Raises:
        ValueError: the libraries cannot be used; the message holds what Python said.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(libraries), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "benchmarks.lightly_loader", str(folder), *map(str, (side, batch, workers))]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True)
    if answer.returncode:
        why = (answer.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ValueError(
            f"--libraries must hold lightly and a torchvision for torch {torch.__version__}, got {libraries}: {why}. "
            "See benchmarks/lightly_loader.py for how to make it"
        )
    found: dict[str, float] = json.loads(answer.stdout.splitlines()[-1])
    return found


def measure(folder: Path, side: int, batch: int, workers: int) -> dict[str, float]:
    """Return images a second of two epochs: decoded, cropped and resized each time, because lightly keeps nothing."""
    # A torchvision of another build of torch lacks its compiled part, without which it cannot be imported.
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    transforms = import_module("torchvision.transforms")
    transform = transforms.Compose(
        [transforms.Grayscale(), transforms.Resize(side), transforms.CenterCrop(side), transforms.ToTensor()]
    )
    dataset = import_module("lightly.data").LightlyDataset(str(folder), transform=transform)
    loader: DataLoader = DataLoader(dataset, batch_size=batch, shuffle=True, num_workers=workers)
    found = {}
    for name in EPOCHS:
        begin = time.perf_counter()
        for images, *_ in loader:
            assert images.shape[1:] == (1, side, side)
        found[name] = len(dataset) / (time.perf_counter() - begin)
    return found


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]), *map(int, sys.argv[2:]))))
