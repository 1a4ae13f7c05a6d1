"""Pretraining runs that diverge, lose their folder, or get labels, names and options that cannot work."""

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import torch
from PIL import Image

from benchmarks.attempts.attempt import Outcome, attempt, run_command
from examples.pretrain import evaluate
from examples.pretrain.data import load_images, train_test_split
from examples.pretrain.encoder import EncoderOptions
from examples.pretrain.methods.byol import BYOLOptions
from examples.pretrain.methods.dissect_options import DiSSECTOptions
from examples.pretrain.optimization import Optimization
from examples.pretrain.phantoms import make_phantoms
from examples.pretrain.protocols import Settings
from examples.pretrain.train import Pretraining, Run

TINY = (
    *("demo", "--image-size", "32", "--phantoms", "96", "--subsets", "1", "--encoder.width", "8"),
    *("--byol.dim", "8", "--byol.hidden-dim", "16", "--dissect.byol.dim", "8", "--dissect.byol.hidden-dim", "16"),
    *("--dissect.codebook-size", "16", "--optimization.epochs", "2", "--optimization.batch-size", "16"),
)
"""A command of a few seconds."""


def _command(out: Path, *more: str, encoding: str = "utf-8") -> CompletedProcess[str]:
    command: list[str | Path] = ["-m", "examples.pretrain", *TINY, "--out", out, *more]
    return run_command(*command, PYTHONIOENCODING=encoding, LC_ALL="C")


def _said(done: CompletedProcess[str]) -> str:
    lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    return f"status {done.returncode}: {next((line for line in lines if 'rror' in line), lines[-1] if lines else '')}"


def _refused_early(*more: str, word: str) -> Outcome:
    """Run the command; it should end in one line that holds a word, and leave nothing behind."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        done = _command(out, *more)
        trained = any(out.rglob("checkpoint.pt"))
        one_line = "Traceback" not in done.stderr and word in done.stderr
        return Outcome(
            done.returncode == 1 and one_line and not trained, _said(done) + (", after training" if trained else "")
        )


def _tiny_run(folder: Path, method: str = "byol", epochs: int = 3) -> Run:
    byol = BYOLOptions(dim=8, hidden_dim=16, momentum=0.9)
    options = byol if method == "byol" else DiSSECTOptions(byol=byol, codebook_size=16)
    optimization = Optimization("adamw", lr=1e-3, batch_size=16, epochs=epochs, warmup_epochs=0)
    encoder = EncoderOptions(width=8, stem_stride=2)
    return Run(make_phantoms(48, 32), Pretraining(method, options, encoder, optimization=optimization), folder)


# ---- divergence ----


@attempt("learning rate of 1e9", right="one line with the epoch, status 1, no checkpoint that is not finite")
def learning_rate_of_a_billion() -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        done = _command(Path(folder), "--methods", "byol", "--optimization.lr", "1e9")
        bad = [path for path in Path(folder).rglob("checkpoint.pt") if not _is_finite(path)]
        told = "diverged" in done.stderr and "epoch" in done.stderr and "Traceback" not in done.stderr
        return Outcome(done.returncode == 1 and told and not bad, f"{_said(done)}, {len(bad)} checkpoints not finite")


@attempt("learning rate NaN", right="refused before training")
def learning_rate_is_not_a_number() -> Outcome:
    return _refused_early("--optimization.lr", "nan", word="lr")


def _is_finite(path: Path) -> bool:
    state = torch.load(path, weights_only=True)["model"]
    tensors = [value for value in state.values() if isinstance(value, torch.Tensor) and value.is_floating_point()]
    return all(bool(torch.isfinite(value).all()) for value in tensors)


def _poisoned(poison: Callable[[Run], None], method: str = "byol") -> Outcome:
    """Train an epoch, put a NaN somewhere, and train another: it should raise and keep the first checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        run = _tiny_run(Path(folder), method)
        run.train(until=1, quiet=True)
        path = run.folder / "checkpoint.pt"
        before = path.read_bytes()
        with torch.no_grad():
            poison(run)
        try:
            run.train(until=2, quiet=True)
        except Exception as error:
            kept = path.read_bytes() == before
            return Outcome(kept and "epoch 2" in str(error), f"{'kept' if kept else 'overwritten'}: {error}")
        return Outcome(False, f"went on, checkpoint {'kept' if path.read_bytes() == before else 'overwritten'}")


@attempt("NaN in a weight after the first epoch", right="raises, the first checkpoint is kept")
def weight_is_not_a_number() -> Outcome:
    return _poisoned(lambda run: run.method.encoder.resnet.conv1.weight[0].fill_(float("nan")))


@attempt("NaN in a parameter of the teacher", right="raises, the first checkpoint is kept")
def teacher_is_not_a_number() -> Outcome:
    return _poisoned(lambda run: run.method.teacher.module.projector[3].bias[0].fill_(float("nan")))


@attempt("NaN in the sums of a codebook", right="raises, the first checkpoint is kept")
def codebook_is_not_a_number() -> Outcome:
    return _poisoned(lambda run: run.method.quantizer.codebook(0).embed_avg[0].fill_(float("nan")), "dissect")


@attempt("infinity in the optimizer's second moment, loss finite", right="raises, the first checkpoint is kept")
def optimizer_is_infinite() -> Outcome:
    def poison(run: Run) -> None:
        next(iter(run.optimizer.state.values()))["exp_avg_sq"].fill_(float("inf"))

    return _poisoned(poison)


# ---- the folder ----


@attempt("the run's folder is removed while it trains", right="an error, not half a run")
def folder_removed() -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        run = _tiny_run(Path(folder) / "run")

        def remove(run: Run) -> dict[str, float]:
            if run.epoch == 2:
                shutil.rmtree(run.folder)
            return {}

        try:
            run.train(quiet=True, monitor=remove)
        except OSError as error:
            return Outcome(True, str(error))
        there = (run.folder / "metrics.csv").exists()
        return Outcome(there, f"ended well {'with its' if there else 'without a'} log")


@attempt("the run's log is removed while it trains", right="an error, or a whole log")
def log_removed() -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        run = _tiny_run(Path(folder) / "run")

        def remove(run: Run) -> dict[str, float]:
            if run.epoch == 3:
                (run.folder / "metrics.csv").unlink()
            return {}

        try:
            run.train(quiet=True, monitor=remove)
        except OSError as error:
            return Outcome(True, str(error))
        there = (run.folder / "metrics.csv").exists()
        return Outcome(there, f"ended well {'with its' if there else 'without a'} log")


# ---- refusals before training ----


def _labelled(labels: np.ndarray, *more: str, word: str) -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        images = make_phantoms(len(labels), 32).images
        np.savez(Path(folder) / "images.npz", images=images, labels=labels)
        return _refused_early("--methods", "byol", "--data", f"{folder}/images.npz", *more, word=word)


@attempt("a class of a single image", right="refused before training")
def class_of_one_image() -> Outcome:
    labels = np.arange(96) % 2
    labels[5] = 2
    return _labelled(labels, word="rare")


@attempt("all images of one class", right="refused before training")
def single_class() -> Outcome:
    return _labelled(np.zeros(96, int), word="tell images apart")


@attempt("findings that every image has", right="refused before training")
def constant_findings() -> Outcome:
    return _labelled(np.ones((96, 2), np.uint8), word="tell images apart")


@attempt("--subsets 0", right="refused before training")
def no_subsets() -> Outcome:
    return _refused_early("--methods", "byol", "--subsets", "0", word="subsets")


@attempt("--methods byol byol", right="refused before training")
def method_twice() -> Outcome:
    return _refused_early("--methods", "byol", "byol", word="byol")


@attempt("--optimization.epochs 0", right="refused before training")
def no_epochs() -> Outcome:
    return _refused_early("--methods", "byol", "--optimization.epochs", "0", word="epochs")


@attempt("--resume with a mistyped --out", right="refused, nothing is trained")
def mistyped_out() -> Outcome:
    return _refused_early("--methods", "byol", "--resume", word="resume")


@attempt("the second method's checkpoint has other settings", right="refused before the first method trains")
def second_checkpoint_is_another() -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        _tiny_run(out / "dissect", "dissect").train(until=1, quiet=True)
        done = _command(out, "--methods", "byol", "dissect", "--resume")
        trained = (out / "byol" / "checkpoint.pt").exists()
        told = "another configuration" in done.stderr
        return Outcome(done.returncode == 1 and told and not trained, _said(done) + (", trained" if trained else ""))


# ---- names ----

NAMES = [rb"a$\b", rb"$\frac{$", b"na|me\n\x1b[31m", b"ros\xe9-\xff", "Größe".encode()]


@attempt("classes named `$\\`, `|`, line breaks, bytes that are not UTF-8; an ASCII terminal", right="a finished run")
def names_of_all_kinds() -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        data, out = Path(folder) / "images", Path(folder) / "run"
        images = make_phantoms(100, 32).images
        for number, image in enumerate(images):
            place = bytes(data) + b"/" + NAMES[number % len(NAMES)]
            Path(place.decode("utf-8", "surrogateescape")).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(f"{place.decode('utf-8', 'surrogateescape')}/{number}.png")
        done = _command(out, "--methods", "dissect", "--data", f"{data}", encoding="ascii")
        files = ("table.md", "curves.png", "dissect/code_maps.png", "dissect/codes.png")
        missing = [name for name in files if not (out / name).exists()]
        return Outcome(
            done.returncode == 0 and not missing, f"{_said(done)}, missing: {' '.join(missing) or 'nothing'}"
        )


# ---- the evaluation ----


def _evaluated(folder: Path, *protocols: str, data: Path | None = None, **settings: object) -> str:
    """Evaluate a tiny run of phantoms; return the error, or an empty string."""
    data = data or folder / "images.npz"
    phantoms = make_phantoms(96, 32)
    if not data.exists():
        np.savez(data, images=phantoms.images, labels=np.asarray(phantoms.labels))
    loaded = load_images(data, 32)
    run = _tiny_run(folder / "byol", epochs=1)
    run = Run(loaded.subset(train_test_split(loaded)[0]), run.config, folder / "byol")
    run.train(quiet=True)
    quick = replace(Settings(shares=(0.5, 1.0), subsets=1, steps=3, clusters=8), **settings)  # type: ignore[arg-type]
    config = evaluate.Evaluation(protocols=protocols, runs=(folder,), data=data, out=folder / "out", settings=quick)
    try:
        evaluate.main(config)
    except (ArithmeticError, ValueError) as error:
        return str(error)
    return ""


@attempt("evaluate linear, then a protocol that lacks its masks", right="refused before the first is measured")
def second_protocol_lacks_masks() -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        error = _evaluated(Path(folder), "linear", "segment-frozen")
        measured = list((Path(folder) / "out").glob("*.json"))
        return Outcome("masks" in error and not measured, f"{len(measured)} measured, then: {error}")


@attempt("fine-tuning with a learning rate of 1e30", right="an error that names the learning rate")
def fine_tuning_diverges() -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        error = _evaluated(Path(folder), "finetune", lr=1e30)
        return Outcome("--lr" in error, error)


@attempt("evaluate --shares 0.5 nan", right="refused by name")
def share_is_not_a_number() -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        error = _evaluated(Path(folder), "linear", shares=(0.5, float("nan")))
        return Outcome("shares" in error, error or "accepted")
