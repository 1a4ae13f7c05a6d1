"""Ranks that do not agree on what they run, or that do not know of each other."""

import shutil
import tempfile
from pathlib import Path

from benchmarks.attempts.attempt import Outcome, attempt, run_command
from benchmarks.attempts.runs import TINY

RANK = """
import os, runpy, signal, sys
signal.alarm(90)  # a rank that waits for ever must not outlive the attempt
rank = os.environ["RANK"]
os.chdir(os.environ["FOLDER"] + "/" + rank)
exec(os.environ["CODE"] if rank == "1" else "")
sys.argv = ["examples.pretrain", *sys.argv[1:], *(os.environ["MORE"].split() if rank == "1" else [])]
runpy.run_module("examples.pretrain", run_name="__main__")
"""
"""A rank of the example in a folder of its own. The second has more arguments, and runs some code first."""
OPTIONS = [*TINY, "--methods", "byol"]


def _two_ranks(folder: Path, *arguments: str | Path, more: str = "", code: str = "") -> tuple[int, list[str]]:
    """Return the status of torchrun, and the error lines of the ranks."""
    for rank in "01":
        (folder / rank).mkdir(exist_ok=True)
    (folder / "rank.py").write_text(RANK)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, folder / "rank.py", *OPTIONS, *arguments]
    done = run_command(*command, FOLDER=str(folder), MORE=more, CODE=code)
    return done.returncode, [line for line in done.stderr.splitlines() if line.startswith("error: ")]


def _refused(*words: str, more: str = "", code: str = "") -> Outcome:
    """Run two ranks that differ: both should say in the same line what differs, and nothing be written."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        status, lines = _two_ranks(folder, "--out", folder / "run", more=more, code=code)
        return _outcome(status, lines, words, written=(folder / "run").exists())


def _outcome(status: int, lines: list[str], words: tuple[str, ...], *, written: bool) -> Outcome:
    alike = len(set(lines)) == 1  # of one rank, or the same of both
    named = bool(lines) and all(word in lines[0] for word in words)
    seen = f"status {status}, {len(lines)} lines, {'written' if written else 'nothing written'}: {' / '.join(lines)}"
    return Outcome(status != 0 and alike and named and not written, seen)


@attempt("two ranks with other seeds and learning rates", right="both refuse by name, nothing is written")
def other_seed_and_rate() -> Outcome:
    return _refused("seed", "lr", more="--seed 3 --optimization.lr 0.01")


@attempt("two ranks with other lists of methods", right="both refuse by name, nothing is written")
def other_methods() -> Outcome:
    return _refused("methods", more="--methods byol simsiam")


@attempt("two ranks with other numbers of images", right="both refuse by name, nothing is written")
def other_number_of_images() -> Outcome:
    return _refused("phantoms", more="--phantoms 95")


@attempt("two ranks with other folders", right="both refuse by name, nothing is written")
def other_folder() -> Outcome:
    with tempfile.TemporaryDirectory() as elsewhere:
        return _refused("out", more=f"--out {elsewhere}/run")


@attempt("two ranks with other versions of vqssl", right="both refuse by name, nothing is written")
def other_version() -> Outcome:
    return _refused("vqssl", code="import vqssl; vqssl.__version__ = '0.0'")


@attempt("one command, other images in the file of the second rank", right="both refuse, nothing is written")
def other_images() -> Outcome:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for rank in "01":
            (folder / rank).mkdir()
            (folder / "make.py").write_text(
                "import sys, numpy as np\nfrom examples.pretrain.phantoms import make_phantoms\n"
                "np.savez(sys.argv[1], images=make_phantoms(96, 32, seed=int(sys.argv[2])).images)\n"
            )
            run_command(folder / "make.py", folder / rank / "images.npz", rank)
        status, lines = _two_ranks(folder, "--data", "images.npz", "--out", folder / "run")
        return _outcome(status, lines, ("images",), written=(folder / "run").exists())


@attempt("the file of images is missing on the second rank", right="both say so, nothing is written")
def missing_images() -> Outcome:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "0").mkdir()
        (folder / "make.py").write_text(
            "import sys, numpy as np\nfrom examples.pretrain.phantoms import make_phantoms\n"
            "np.savez(sys.argv[1], images=make_phantoms(96, 32).images)\n"
        )
        run_command(folder / "make.py", folder / "0" / "images.npz")
        status, lines = _two_ranks(folder, "--data", "images.npz", "--out", folder / "run")
        return _outcome(status, lines, ("images.npz",), written=(folder / "run").exists())


@attempt("a checkpoint on rank 0 alone", right="both refuse by name, the checkpoint stays as it is")
def checkpoint_on_one_rank() -> Outcome:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for rank in "01":
            (folder / rank / "run").mkdir(parents=True)
        run_command("-m", "examples.pretrain", *OPTIONS, "--out", folder / "made", "--optimization.epochs", "2")
        shutil.copytree(folder / "made" / "byol", folder / "0" / "run" / "byol")
        path = folder / "0" / "run" / "byol" / "checkpoint.pt"
        before = path.read_bytes()
        # One name for two folders, as on two machines without a common file system.
        status, lines = _two_ranks(folder, "--out", "/proc/self/cwd/run", "--resume")
        return _outcome(status, lines, ("epoch",), written=path.read_bytes() != before)


@attempt("two ranks, learning rate of 1e9", right="both stop in the same line, no checkpoint is written")
def both_diverge() -> Outcome:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        status, lines = _two_ranks(folder, "--out", folder / "run", "--optimization.lr", "1e9")
        written = any((folder / "run").rglob("checkpoint.pt"))
        return _outcome(status, lines, ("diverged", "epoch 1"), written=written)


@attempt("two ranks, the folder is removed after the first epoch", right="both stop in the same line")
def folder_removed() -> Outcome:
    code = (
        "import examples.pretrain.train as train, shutil\n"
        "keep = train.Run._epoch\n"
        "def removing(run, *args):\n"
        "    if run.epoch == 1: shutil.rmtree(run.folder)\n"
        "    return keep(run, *args)\n"
        "train.Run._epoch = removing\n"
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        status, lines = _two_ranks(folder, "--out", folder / "run", code=code)
        return _outcome(status, lines, ("gone",), written=any((folder / "run").rglob("checkpoint.pt")))


@attempt("srun starts four processes without torchrun", right="refused with the line to write")
def srun_without_torchrun() -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command: list[str | Path] = ["-m", "examples.pretrain", *OPTIONS, "--out", out]
        done = run_command(*command, SLURM_PROCID="0", SLURM_NTASKS="4", SLURM_NNODES="1")
        refused = done.returncode == 1 and "torchrun" in done.stderr and not out.exists()
        return Outcome(refused, f"status {done.returncode}: {done.stderr.strip().splitlines()[-1:]}")


@attempt("WORLD_SIZE of 2 without LOCAL_RANK", right="refused")
def ranks_by_hand() -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        done = run_command("-m", "examples.pretrain", *OPTIONS, "--out", out, RANK="0", WORLD_SIZE="2")
        refused = done.returncode == 1 and "torchrun" in done.stderr and not out.exists()
        return Outcome(refused, f"status {done.returncode}: {done.stderr.strip().splitlines()[-1:]}")
