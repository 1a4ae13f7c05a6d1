"""Run the example on generated copies of NIH ChestX-ray14 and CheXpert: killed twice it gives what a whole run gives.

    python -m benchmarks.published_sets                       2,000 images of each set, some minutes
    python -m benchmarks.published_sets --images 80 --sets nih

Copies have the published layout, patients with several images, and a split by patient. Of CheXpert's findings some are
blank and some -1, which `--unknown ignore --uncertain ignore` leaves out of all losses. One run goes from decoding to
the table. The other is killed (SIGKILL) after a part of the images is decoded, and again right after the checkpoint of
the first epoch, and continues each time. Table, figures and every bit of the checkpoints must be equal.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from torch.utils._pytree import tree_flatten

from benchmarks.provenance import provenance
from examples.pretrain.data import chexpert, nih
from examples.pretrain.data.cache import Cache
from examples.pretrain.data.imageset import ImageSet
from examples.pretrain.phantoms import make_phantoms
from examples.pretrain.train import Run

OPTIONS = {"nih": (), "chexpert": ("--unknown", "ignore", "--uncertain", "ignore")}
SIDE = 64
"""Of the pictures in pixels."""


# ---- copies ----


def write_nih(folder: Path, data: ImageSet) -> None:
    """Write phantoms as NIH ChestX-ray14 is published; every tenth patient is in the list of the test."""
    assert data.groups is not None
    assert data.labels is not None
    rows = ["Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age"]
    lists: dict[bool, list[str]] = {False: [], True: []}
    for number, (image, found, patient) in enumerate(zip(data.images, data.labels, data.groups, strict=True)):
        name = f"{patient:08}_{number:03}.png"
        place = folder / f"images_{1 + number % 3:03}" / "images"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / name)
        there = [finding for finding, yes in zip(("Nodule", "Effusion"), found, strict=True) if yes]
        rows.append(f"{name},{'|'.join(there) or 'No Finding'},{number},{patient},50")
        lists[patient % 10 == 0].append(name)
    (folder / "Data_Entry_2017_v2020.csv").write_text("\n".join(rows) + "\n")
    (folder / "train_val_list.txt").write_text("\n".join(lists[False]) + "\n")
    (folder / "test_list.txt").write_text("\n".join(lists[True]) + "\n")


def write_chexpert(folder: Path, data: ImageSet) -> None:
    """Write phantoms as CheXpert is published; every tenth patient is in `valid/`, where all is known."""
    assert data.groups is not None
    assert data.labels is not None
    rng = np.random.default_rng(0)
    rows: dict[str, list[str]] = {"train": [], "valid": []}
    for number, (image, found, patient) in enumerate(zip(data.images, data.labels, data.groups, strict=True)):
        side = "valid" if patient % 10 == 0 else "train"
        path = f"{side}/patient{patient:05}/study1/view{number}_frontal.jpg"
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / path, quality=95)
        values = dict.fromkeys(chexpert.FINDINGS, "" if side == "train" else "0.0")
        for finding, yes in zip(("Lung Lesion", "Pleural Effusion"), found, strict=True):
            drawn = rng.random()
            values[finding] = f"{float(yes)}" if side == "valid" or drawn > 0.4 else "" if drawn > 0.1 else "-1.0"
        rows[side].append(f"CheXpert-v1.0-small/{path},Male,50,{','.join(values.values())}")
    for side, lines in rows.items():
        header = f"Path,Sex,Age,{','.join(chexpert.FINDINGS)}"
        (folder / f"{side}.csv").write_text("\n".join([header, *lines]) + "\n")


WRITE = {"nih": write_nih, "chexpert": write_chexpert}


# ---- runs ----


def run(arguments: list[str], *, die: str = "") -> int:
    """Run the example in a process of its own and return its status; `die` says where it kills itself."""
    command = [sys.executable, "-m", "benchmarks.published_sets", "--child", die, *arguments]
    with tempfile.TemporaryFile("w+") as said:
        status = subprocess.run(command, stdout=said, stderr=subprocess.STDOUT).returncode
        if status not in (0, -signal.SIGKILL):
            said.seek(0)
            sys.exit(f"{' '.join(arguments)} ended with {status}:\n{said.read()[-3000:]}")
    return status


def child(die: str, arguments: list[str]) -> None:
    """Run the example, and kill this process where `die` says."""
    fill, save = Cache.fill, Run.save

    def fill_and_die(self: Cache, **options: Any) -> Iterator[int]:
        for done in fill(self, **options):
            yield done
            if done:
                os.kill(os.getpid(), signal.SIGKILL)

    def save_and_die(self: Run) -> None:
        save(self)
        os.kill(os.getpid(), signal.SIGKILL)

    if die == "decoding":
        Cache.fill = fill_and_die  # type: ignore[method-assign]
    elif die == "epoch":
        Run.save = save_and_die  # type: ignore[method-assign]
    from examples.pretrain.__main__ import main as pretrain

    pretrain(arguments)


def result_of(out: Path) -> tuple[dict[str, Any], list[Any]]:
    """Return table and figures of a run without its times, and all tensors and numbers of its checkpoints."""
    record = json.loads((out / "table.json").read_text())
    runs = {
        name: {key: value for key, value in each.items() if key != "seconds"} for name, each in record["runs"].items()
    }
    leaves: list[Any] = []
    for path in sorted(out.glob("*/checkpoint.pt")):
        state = torch.load(path, weights_only=True)
        leaves += tree_flatten({name: state[name] for name in ("config", "data", "model", "optimizer", "scheduler")})[0]
    for path in sorted(out.glob("*/*.safetensors")):
        leaves += tree_flatten(safetensors.torch.load_file(path))[0]  # their headers are in no fixed order
    return {"auc": record["auc"], "runs": runs, "images": record["images"]}, leaves


def same(ours: list[Any], theirs: list[Any]) -> bool:
    """Return True if two lists hold the same bits."""
    return len(ours) == len(theirs) and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(ours, theirs, strict=True)
    )


def measure(name: str, place: Path, count: int, options: list[str]) -> dict[str, Any]:
    """Return what the two runs on a copy of a set gave, and what the cache takes."""
    folder = place / name
    folder.mkdir()
    WRITE[name](folder, make_phantoms(count, SIDE))
    assert (nih if name == "nih" else chexpert).is_here(folder)
    results, seconds = {}, {}
    for kind, deaths in (("whole", []), ("killed twice", ["decoding", "epoch"])):
        out, cache = place / f"{name} {kind}", place / f"{name} cache {kind}"
        command = ["small", "--data", str(folder), "--cache", str(cache), "--out", str(out), *OPTIONS[name], *options]
        begin = time.perf_counter()
        for number, die in enumerate([*deaths, ""]):
            resume = ["--resume"] if number == 2 else []
            status = run([*command, *resume], die=die)
            assert (status == -signal.SIGKILL) == bool(die), f"{name}: nothing was there to be killed at {die}"
            print(f"{name}, {kind}: {'killed in ' + die if die else 'finished'}", flush=True)
        seconds[kind] = round(time.perf_counter() - begin, 1)
        results[kind] = result_of(out)
    (record, bits), (again, more) = results.values()
    files = [path for path in (place / f"{name} cache killed twice").rglob("*") if path.is_file()]
    return {
        "images": record["images"],
        "equal": record == again and same(bits, more),
        "cache in bytes": sum(path.stat().st_size for path in files),
        "files in cache": sorted(path.name for path in files),
        "seconds": seconds,
        "auc": {encoder: {share: round(float(np.mean(values)), 4) for share, values in scores.items()}
                for encoder, scores in record["auc"].items()},
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return 1 if a killed run differs."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["--child"]:
        child(arguments[1], arguments[2:])
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000, help="images of each set")
    parser.add_argument("--sets", nargs="+", choices=list(WRITE), default=list(WRITE))
    parser.add_argument("--out", type=Path, help="file for the record")
    options, rest = parser.parse_known_args(arguments)
    rest = rest or ["--methods", "dissect", "--optimization.epochs", "3", "--encoder.width", "8", "--device", "cpu"]
    with tempfile.TemporaryDirectory() as place:
        found = {name: measure(name, Path(place), options.images, rest) for name in options.sets}
    print(json.dumps(found, indent=1))
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        record = {**provenance("python -m benchmarks.published_sets"), "options": rest, "sets": found}
        options.out.write_text(json.dumps(record, indent=1))
    return 0 if all(each["equal"] for each in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
