"""Checkpoints, logs and folders that are shared, damaged, swapped, linked or removed."""

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.attempts.attempt import ROOT, Outcome, attempt, run_command
from examples.pretrain.data import ImageSet
from examples.pretrain.encoder import EncoderOptions
from examples.pretrain.methods.byol import BYOLOptions
from examples.pretrain.methods.dissect_options import DiSSECTOptions
from examples.pretrain.optimization import Optimization
from examples.pretrain.phantoms import make_phantoms
from examples.pretrain.train import Pretraining, Run

BYOL = BYOLOptions(dim=8, hidden_dim=16)
OPTIMIZATION = Optimization("adamw", lr=1e-3, batch_size=16, epochs=3, warmup_epochs=1)
CONFIG = Pretraining("dissect", DiSSECTOptions(byol=BYOL, codebook_size=16), EncoderOptions(width=8, stem_stride=2))
CONFIG = replace(CONFIG, optimization=OPTIMIZATION)


def _phantoms() -> ImageSet:
    return make_phantoms(48, 32, seed=0)


@contextlib.contextmanager
def _trained() -> Iterator[Path]:
    """Yield the folder of a run that was stopped after two epochs of three."""
    with tempfile.TemporaryDirectory() as place:
        Run(_phantoms(), CONFIG, Path(place) / "run").train(until=2, quiet=True)
        yield Path(place) / "run"


def _resumed(folder: Path, data: ImageSet | None = None) -> str:
    """Return the sentence that refuses to resume, or what happened instead."""
    try:
        Run(_phantoms() if data is None else data, CONFIG, folder).resume()
    except ValueError as error:
        return str(error)
    except Exception as error:
        return f"raw {type(error).__name__}: {error}"
    return "resumed"


def _is_refusal(said: str, *words: str) -> bool:
    return "\n" not in said and not said.startswith(("raw", "resumed")) and all(word in said for word in words)


def _arguments(out: Path | str, *more: str) -> list[str]:
    options = ["--phantoms", "60", "--methods", "byol", "--subsets", "1", "--encoder.width", "8"]
    options += ["--byol.dim", "8", "--byol.hidden-dim", "16", "--optimization.batch-size", "16"]
    options += ["--optimization.warmup-epochs", "1", "--optimization.epochs", "2"]
    return ["-m", "examples.pretrain", "demo", *options, "--out", str(out), *more]


def _start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]


# ---- several writers ----


def _at_once(count: int, environments: list[dict[str, str]]) -> Outcome:
    with tempfile.TemporaryDirectory() as place:
        processes = [_start(*_arguments(Path(place) / "run"), **environments[i]) for i in range(count)]
        printed = [process.communicate(timeout=110)[0] for process in processes]
    fine = sum(process.returncode == 0 for process in processes)
    lines = [_last_line(text) for text, one in zip(printed, processes, strict=True) if one.returncode]
    named = sum(line.startswith("error: ") for line in lines)
    return Outcome(fine <= 1 and named == count - fine, f"{fine} trained, {named} refused: {(lines or [''])[0]}")


@attempt("the same command twice at once with one --out", right="one trains, the other is refused in one line")
def command_twice() -> Outcome:
    return _at_once(2, [{}, {}])


@attempt(
    "three processes that SLURM started, without torchrun",
    right="at most one trains, the others are refused in one line",
)
def slurm_without_torchrun() -> Outcome:
    return _at_once(3, [{"SLURM_PROCID": str(i), "SLURM_NTASKS": "3"} for i in range(3)])


WRITER = """
import sys
from pathlib import Path
from benchmarks.attempts import files
run = files.Run(files._phantoms(), files.CONFIG, Path(sys.argv[1]))
try:
    for _ in range(int(sys.argv[2])):
        run.save()
except ValueError as error:
    sys.exit(str(error))
"""


@attempt("two processes save to one folder while a third reads, 60 times each", right="no read is torn")
def torn_reads() -> Outcome:
    with tempfile.TemporaryDirectory() as place:
        processes = [_start("-c", WRITER, place, "60") for _ in range(2)]
        path, reads, torn = Path(place) / "checkpoint.pt", 0, 0
        while any(process.poll() is None for process in processes):
            if path.exists():
                reads += 1
                try:
                    torch.load(path, weights_only=True)
                except Exception:
                    torn += 1
        said = [process.communicate()[0] for process in processes]
    fine = sum(process.returncode == 0 for process in processes)
    return Outcome(torn == 0 and fine == 1, f"{torn} of {reads} reads torn, {fine} wrote. {_last_line(max(said))}")


@attempt("a run is killed; the same command with --resume", right="the folder is free at once, and half files are gone")
def killed_holder() -> Outcome:
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "run"
        process = _start(*_arguments(out, "--optimization.epochs", "40"))
        while process.poll() is None and not (out / "byol" / "checkpoint.pt").exists():
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        (out / "byol" / "checkpoint.pt.1-0.partial").write_bytes(b"half")
        again = run_command(*_arguments(out, "--optimization.epochs", "40", "--resume"))
        left = [path.name for path in out.rglob("*.partial")]
        fine = again.returncode == 0 and "continuing after epoch" in again.stdout and not left
        return Outcome(fine, f"exit status {again.returncode}, left over {left}. {_last_line(again.stderr)}")


# ---- links ----


@attempt("every file that a run writes is a link to a file elsewhere", right="the files elsewhere are as they were")
def links_out_of_the_folder() -> Outcome:
    names: tuple[str, ...] = ("byol/checkpoint.pt.partial", "byol/metrics.csv", "byol/metrics.csv.partial")
    names += ("byol/encoder.safetensors", "table.json", "table.json.partial", "table.md", "curves.png")
    with tempfile.TemporaryDirectory() as place:
        out, elsewhere = Path(place) / "run", Path(place) / "elsewhere"
        (out / "byol").mkdir(parents=True)
        elsewhere.mkdir()
        for number, name in enumerate(names):
            (elsewhere / str(number)).write_text("mine")
            (out / name).symlink_to(elsewhere / str(number))
        done = run_command(*_arguments(out))
        lost = [name for number, name in enumerate(names) if (elsewhere / str(number)).read_text() != "mine"]
        return Outcome(not lost, f"exit status {done.returncode}, overwritten: {', '.join(lost) or 'nothing'}")


@attempt("run.lock is a link to a file elsewhere", right="that file is as it was")
def lock_is_a_link() -> Outcome:
    with tempfile.TemporaryDirectory() as place:
        out, mine = Path(place) / "run", Path(place) / "mine"
        out.mkdir()
        mine.write_text("mine")
        (out / "run.lock").symlink_to(mine)
        done = run_command(*_arguments(out))
        return Outcome(mine.read_text() == "mine", f"exit status {done.returncode}. {_last_line(done.stderr)}")


# ---- other images ----


def _with_other_images(change: Callable[[ImageSet], ImageSet], word: str) -> Outcome:
    with _trained() as folder:
        said = _resumed(folder, change(_phantoms()))
        return Outcome(_is_refusal(said, word), said)


@attempt("a run is resumed on its images mirrored", right="refused: the images are others")
def mirrored() -> Outcome:
    return _with_other_images(lambda data: replace(data, images=data.images[:, :, ::-1].copy()), "images")


@attempt("a run is resumed on its images in another order", right="refused: another order")
def shuffled() -> Outcome:
    return _with_other_images(lambda data: data.subset(np.arange(len(data))[::-1]), "order")


@attempt("a run is resumed with two pixels of one image swapped", right="refused: the images are others")
def two_pixels() -> Outcome:
    def change(data: ImageSet) -> ImageSet:
        images = data.images.copy()
        images[7, 3, 4], images[7, 20, 21] = images[7, 20, 21] + 1, images[7, 3, 4] - 1
        return replace(data, images=images)

    return _with_other_images(change, "images")


@attempt("a run is resumed with labels, groups or masks of other images", right="each is refused by name")
def other_facts() -> Outcome:
    said = []
    for name in ("labels", "groups", "masks"):
        with _trained() as folder:
            said.append(
                _resumed(folder, replace(_phantoms(), **{name: np.roll(getattr(_phantoms(), name), 1, axis=0)}))
            )
            if not _is_refusal(said[-1], name):
                return Outcome(False, f"{name}: {said[-1]}")
    return Outcome(True, said[-1])


# ---- damaged checkpoints ----


@attempt("a checkpoint with one bit flipped, 200 places", right="none changes the model silently")
def flipped_bits() -> Outcome:
    rng = np.random.default_rng(0)
    with _trained() as folder:
        path = folder / "checkpoint.pt"
        whole = path.read_bytes()
        before = torch.load(path, weights_only=True)
        loaded = changed = raw = 0
        run = Run(_phantoms(), CONFIG, folder)
        for _ in range(200):
            damaged = bytearray(whole)
            damaged[rng.integers(len(whole))] ^= 1 << rng.integers(8)
            path.write_bytes(damaged)
            try:
                run.resume()
            except ValueError:
                continue
            except Exception:
                raw += 1
                continue
            loaded += 1
            state = run.method.state_dict()
            tensors = {name: value for name, value in before["model"].items() if torch.is_tensor(value)}
            same = all(torch.equal(state[name], value) for name, value in tensors.items())
            changed += not same or run.epoch != before["epoch"] or run.rows != before["rows"]
    return Outcome(changed == raw == 0, f"{loaded} of 200 loaded, {changed} of them changed, {raw} raw errors")


def _spoilt(change: Callable[[dict[str, Any]], None], *words: str) -> Outcome:
    with _trained() as folder:
        state = torch.load(folder / "checkpoint.pt", weights_only=True)
        change(state)
        torch.save(state, folder / "checkpoint.pt")
        said = _resumed(folder)
        return Outcome(_is_refusal(said, "checkpoint.pt", *words), said.replace(str(folder), ""))


def _entry(state: dict[str, Any], ending: str) -> str:
    return next(name for name in state["model"] if name.endswith(ending))


def _fill(ending: str, value: float) -> Callable[[dict[str, Any]], None]:
    def change(state: dict[str, Any]) -> None:
        state["model"][_entry(state, ending)].view(-1)[0] = value

    return change


@attempt("one NaN in cluster_size", right="refused by the entry's name")
def nan_in_cluster_size() -> Outcome:
    return _spoilt(_fill("cluster_size", float("nan")), "cluster_size")


@attempt("one infinity in a weight", right="refused by the entry's name")
def infinity_in_a_weight() -> Outcome:
    return _spoilt(_fill(".weight", float("inf")), "weight")


@attempt("weights as float16", right="refused by the entry's name")
def half_weights() -> Outcome:
    def change(state: dict[str, Any]) -> None:
        for name, value in state["model"].items():
            if torch.is_tensor(value) and value.is_floating_point():
                state["model"][name] = value.half()

    return _spoilt(change, "float16")


@attempt("epochs -1, 10^6, 1.5, True, nan and '2'", right="each is refused by the entry's name")
def impossible_epochs() -> Outcome:
    lost = []
    for epoch in (-1, 10**6, 1.5, True, float("nan"), "2"):
        outcome = _spoilt(lambda state, epoch=epoch: state.update(epoch=epoch), "epoch")  # type: ignore[misc]
        if not outcome.survived:
            lost.append(f"{epoch}: {outcome.seen}")
    return Outcome(not lost, f"{6 - len(lost)} of 6 refused. {'; '.join(lost)}")


@attempt("a moment of the optimizer of another shape, of float16, or NaN", right="each is refused by the entry's name")
def spoilt_optimizer() -> Outcome:
    lost = []
    for name, spoil in {
        "shape": lambda moment: moment.flatten()[:1].clone(),
        "dtype": lambda moment: moment.half(),
        "nan": lambda moment: moment * float("nan"),
    }.items():

        def change(state: dict[str, Any], spoil: Any = spoil) -> None:
            moments = state["optimizer"]["state"][0]
            moments["exp_avg"] = spoil(moments["exp_avg"])

        outcome = _spoilt(change, "exp_avg")
        if not outcome.survived:
            lost.append(f"{name}: {outcome.seen}")
    return Outcome(not lost, f"{3 - len(lost)} of 3 refused. {'; '.join(lost)}")


@attempt("a learning rate NaN, a scheduler of another step", right="each is refused by the entry's name")
def spoilt_schedule() -> Outcome:
    rate = _spoilt(lambda state: state["optimizer"]["param_groups"][0].update(lr=float("nan")), "lr")
    step = _spoilt(lambda state: state["scheduler"].update(last_epoch=77), "last_epoch")
    return Outcome(rate.survived and step.survived, f"{rate.seen}; {step.seen}")


@attempt("a checkpoint without rows, model or devices", right="each is refused by the entry's name")
def missing_entries() -> Outcome:
    lost = []
    for name in ("rows", "model", "devices", "optimizer", "data", "config"):
        outcome = _spoilt(lambda state, name=name: state.pop(name), name)  # type: ignore[misc]
        if not outcome.survived:
            lost.append(f"{name}: {outcome.seen}")
    return Outcome(not lost, f"{6 - len(lost)} of 6 refused. {'; '.join(lost)}")


@attempt("a checkpoint of 2 MB that unpacks to 2 GiB", right="refused by name, without taking the memory")
def archive_bomb() -> Outcome:
    with _trained() as folder:
        path = folder / "checkpoint.pt"
        state = torch.load(path, weights_only=True)
        state["model"]["bomb"] = torch.zeros(4)
        torch.save(state, path)
        bomb = folder / "bomb.zip"
        with zipfile.ZipFile(path) as old, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as new:
            for entry in old.infolist():
                if entry.filename.endswith("/data/0"):
                    with new.open(entry.filename, "w", force_zip64=True) as file:
                        for _ in range(2048):
                            file.write(bytes(2**20))
                else:
                    new.writestr(entry.filename, old.read(entry))
        bomb.replace(path)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        said = _resumed(folder)
        taken = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
        return Outcome(_is_refusal(said, "checkpoint.pt") and taken < 100, f"{taken} MiB taken. {said}")


@attempt("a checkpoint of an earlier version (format 2)", right="resumes on its images, and is refused on others")
def earlier_version() -> Outcome:
    with _trained() as folder:
        path = folder / "checkpoint.pt"
        state = torch.load(path, weights_only=True)
        images = _phantoms().images
        state["format"], state["data"] = 2, f"{images.shape} {images.dtype} {int(images.sum(dtype='uint64'))}"
        torch.save(state, path)
        fine, other = _resumed(folder), _resumed(folder, make_phantoms(48, 32, seed=1))
        return Outcome(fine == "resumed" and _is_refusal(other, "others"), f"{fine}; {other}")


# ---- folders ----


@attempt(
    "--resume with two figures of --out swapped",
    right="refused in one line that lists the near name; nothing is written",
)
def mistyped_out() -> Outcome:
    with tempfile.TemporaryDirectory() as place:
        run_command(*_arguments(Path(place) / "chest-64"))
        done = run_command(*_arguments(Path(place) / "chest-46", "--resume"))
        line = _last_line(done.stderr)
        fine = done.returncode != 0 and "chest-64" in line and not (Path(place) / "chest-46").exists()
        return Outcome(fine, f"exit status {done.returncode}. {line}")


@attempt("--out is inside --data", right="refused in one line before anything is written")
def out_inside_data() -> Outcome:
    with tempfile.TemporaryDirectory() as place:
        rng = np.random.default_rng(0)
        for number in range(48):
            path = Path(place) / "ab"[number % 2] / f"{number}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (32, 32), np.uint8)).save(path)
        before = sorted(Path(place).rglob("*"))
        done = run_command(*_arguments(Path(place) / "run", "--data", place))
        fine = done.returncode != 0 and sorted(Path(place).rglob("*")) == before
        return Outcome(fine, f"exit status {done.returncode}. {_last_line(done.stderr)}")


@attempt("runs/ holds demo-old1, demo-², a file demo-7 and a link", right="the next run is demo-1")
def stray_names() -> Outcome:
    with tempfile.TemporaryDirectory() as place:
        for name in ("demo-old1", "demo-²", "demo-1b", "demo-0x9"):
            (Path(place) / "runs" / name).mkdir(parents=True)
        (Path(place) / "runs" / "demo-x1").symlink_to("nowhere")
        arguments = [part for part in _arguments("") if part not in ("--out", "")]
        command = f"import os, runpy, sys; os.chdir({place!r}); sys.argv = ['x', *{arguments[2:]!r}]; "
        done = run_command("-c", command + "runpy.run_module('examples.pretrain', run_name='__main__')")
        fine = done.returncode == 0 and (Path(place) / "runs" / "demo-1" / "table.json").exists()
        return Outcome(fine, f"exit status {done.returncode}. {_last_line(done.stderr)}")


@attempt(
    "--out is removed after the first checkpoint", right="an exit status and a line that say so, or all files there"
)
def removed_while_training() -> Outcome:
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "run"
        process = _start(*_arguments(out, "--optimization.epochs", "12"))
        while process.poll() is None and not (out / "byol" / "checkpoint.pt").exists():
            time.sleep(0.02)
        shutil.rmtree(out, ignore_errors=True)
        printed = process.communicate(timeout=110)[0]
        whole = all((out / name).exists() for name in ("table.json", "byol/checkpoint.pt", "byol/metrics.csv"))
        line = _last_line(printed)
        fine = whole if process.returncode == 0 else bool(re.search(r"error: .*run", line))
        return Outcome(fine, f"exit status {process.returncode}, all files there: {whole}. {line}")


@attempt("a result in JSON is cut in half before the next evaluation", right="refused in one line that names the file")
def half_a_result() -> Outcome:
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "linear-byol-seed0.json"
        path.write_text(json.dumps({"protocol": "linear", "scores": {"1%": [0.5]}})[:30])
        done = run_command("-m", "examples.pretrain.evaluate", "--report", "--out", place)
        line = _last_line(done.stderr)
        return Outcome(done.returncode != 0 and path.name in line and line.startswith("error"), line)
