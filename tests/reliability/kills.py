"""Kill a pretraining run with SIGKILL many times, and compare its end with that of a run that was never interrupted.

`python -m tests.reliability.kills [--kills 50] [--trial]`. Each attempt is a process forked from this one, which has
imported everything and computed nothing. It resumes, trains, and is killed: at a random moment, or, every other time,
while a checkpoint is being written. After each kill the checkpoint must be whole. At the end the run continues to its
last epoch, and its checkpoint must equal that of the uninterrupted run.
"""

import argparse
import contextlib
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from examples.pretrain.data import ImageSet
from examples.pretrain.phantoms import make_phantoms
from examples.pretrain.train import Run
from tests.examples.tiny import QUICK, pretraining
from tests.reliability.record import write

EPOCHS = 400


def settings():
    """Return the settings of a small run of many short epochs."""
    return pretraining("dissect", replace(QUICK, epochs=EPOCHS), codebook_decay=0.9)


def start(data: ImageSet, folder: Path, epochs: int) -> int:
    """Start a process that resumes the run and trains on, and return its process number."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        run = Run(data, settings(), folder)
        run.resume()
        run.train(until=epochs, quiet=True)
        status = 0
    finally:
        os._exit(status)


def wait(child: int) -> None:
    """Wait for a process that must end without an error."""
    _, status = os.waitpid(child, 0)
    if status:
        raise SystemExit(f"a process ended by itself with status {status}")


def epoch_of(folder: Path) -> int:
    """Return the epoch of the checkpoint, 0 without one; a broken checkpoint fails to load."""
    path = folder / "checkpoint.pt"
    return torch.load(path, weights_only=True)["epoch"] if path.exists() else 0


def kill(child: int, folder: Path, rng: random.Random, *, while_writing: bool, span: float) -> bool:
    """Kill the process, and return True if a checkpoint was half written at that moment."""

    def half_written() -> bool:
        return any(folder.glob("checkpoint.pt.*.partial"))

    deadline = time.monotonic() + (30 if while_writing else rng.uniform(0, span))
    for left in folder.glob("*.partial"):  # left over from an earlier kill
        with contextlib.suppress(FileNotFoundError):  # the process that has just started removes them too
            left.unlink()
    while time.monotonic() < deadline:
        if while_writing and half_written():
            break
        time.sleep(0.0002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return half_written()


def leaves(folder: Path) -> list:
    """Return every value of a finished run's checkpoint except elapsed times."""
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    del state["seconds"]
    state["rows"] = [{name: value for name, value in row.items() if name != "seconds"} for row in state["rows"]]
    return tree_leaves(state)


def same(a: object, b: object) -> bool:
    """Return True if two values are equal to the bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    return a == b


def main() -> None:
    """Kill and resume a run, compare it with a whole one, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trial", action="store_true", help="write no record")
    options = parser.parse_args()
    torch.set_num_threads(1)  # no thread pool exists yet that a fork would leave behind
    data = make_phantoms(48, 32, seed=0)
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as place:
        broken, whole = Path(place, "broken"), Path(place, "whole")
        broken.mkdir()
        half_written, epochs, lost = 0, [], 0
        for number in tqdm(range(options.kills), desc="kills", disable=not sys.stderr.isatty()):
            before = epoch_of(broken)
            child = start(data, broken, EPOCHS)
            half_written += kill(child, broken, rng, while_writing=number % 2 == 1, span=8.0)
            epochs.append(epoch_of(broken))
            lost += epochs[-1] < before
        last = epochs[-1] + 3
        if last > EPOCHS:
            raise SystemExit(f"the run ended before its {options.kills} kills: raise EPOCHS")
        for folder in (broken, whole):
            wait(start(data, folder, last))
        pairs = list(zip(leaves(broken), leaves(whole), strict=True))
        differ = sum(not same(a, b) for a, b in pairs)
        for name in ("encoder", "codebooks"):
            file = f"{name}.safetensors"
            if (broken / file).read_bytes() != (whole / file).read_bytes():
                raise SystemExit(f"{file} differs")
        figures = {
            "kills": options.kills,
            "while a checkpoint was being written": half_written,
            "checkpoints that went back or broke": lost,
            "epochs reached": last,
            "attempts that got further": sum(b > a for a, b in zip([0, *epochs], epochs, strict=False)),
            "values in the last checkpoint": len(pairs),
            "of them other than in the unbroken run": differ,
        }
    if differ or lost:
        raise SystemExit(f"something was lost: {figures}")
    write("kills", "python -m tests.reliability.kills", figures, trial=options.trial)


if __name__ == "__main__":
    main()
