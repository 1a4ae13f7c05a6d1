"""Signals at any moment: Ctrl-C, a scheduler's SIGTERM, a terminal that is closed."""

import signal
import tempfile
from pathlib import Path

from benchmarks.attempts.attempt import Outcome, attempt
from benchmarks.attempts.failing import SMALL, Ended, command, example

EPOCHS = ("--optimization.epochs", "300")
START = "one line, the shell's status, nothing written"
MIDDLE = "one line that names the kept epoch, the shell's status"


def _ended(done: Ended, number: int, *words: str, also: bool = True) -> Outcome:
    told = len(done.lines) == 1 and all(word in done.lines[0] for word in words)
    return Outcome(done.clean and told and done.status == 128 + number and also, done.seen())


def _at_start(number: int, after: float) -> Outcome:
    """Send a signal while libraries are imported."""
    with tempfile.TemporaryDirectory() as name:
        arguments = ("-m", "examples.pretrain", *SMALL, "--out", f"{name}/run")
        done = command(*arguments, stop=(number, after), fresh=True)
        return _ended(done, number, "before anything was written", also=not Path(name, "run").exists())


def _in_training(number: int) -> Outcome:
    with tempfile.TemporaryDirectory() as name:
        done = example("--out", f"{name}/run", *EPOCHS, stop=(number, "byol 2/"))
        whole = Path(name, "run", "byol", "checkpoint.pt").exists()
        partial = list(Path(name).rglob("*.partial"))
        return _ended(done, number, "is whole", "--resume", also=whole and not partial)


@attempt("Ctrl-C after 0.3 seconds, in the imports", right=START)
def ctrl_c_in_the_first_imports() -> Outcome:
    return _at_start(signal.SIGINT, 0.3)


@attempt("Ctrl-C after 2 seconds, in the imports", right=START)
def ctrl_c_in_the_imports() -> Outcome:
    return _at_start(signal.SIGINT, 2.0)


@attempt("SIGTERM after a second, in the imports", right=START)
def sigterm_in_the_imports() -> Outcome:
    return _at_start(signal.SIGTERM, 1.0)


@attempt("SIGHUP after a second, in the imports", right=START)
def sighup_in_the_imports() -> Outcome:
    return _at_start(signal.SIGHUP, 1.0)


@attempt("Ctrl-C after a second of `evaluate`, in the imports", right=START)
def ctrl_c_in_the_imports_of_evaluate() -> Outcome:
    done = command("-m", "examples.pretrain.evaluate", stop=(signal.SIGINT, 1.0), fresh=True)
    return _ended(done, signal.SIGINT, "before anything was written")


@attempt("Ctrl-C in the second epoch", right=MIDDLE)
def ctrl_c_in_training() -> Outcome:
    return _in_training(signal.SIGINT)


@attempt("SIGTERM in the second epoch", right=MIDDLE)
def sigterm_in_training() -> Outcome:
    return _in_training(signal.SIGTERM)


@attempt("SIGHUP in the second epoch", right=MIDDLE)
def sighup_in_training() -> Outcome:
    return _in_training(signal.SIGHUP)


@attempt("SIGHUP under nohup, which ignores it", right="the run goes on to its table")
def sighup_under_nohup() -> Outcome:
    def ignored() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    with tempfile.TemporaryDirectory() as name:
        done = example("--out", f"{name}/run", setup=ignored, stop=(signal.SIGHUP, "byol 1/"))
        return Outcome(done.status == 0 and "| BYOL |" in done.out, done.seen())


@attempt("Ctrl-C while the first checkpoint is written", right="one line, no half-written file")
def ctrl_c_in_a_write() -> Outcome:
    code = (
        "import os, signal, sys, runpy\nfsync = os.fsync\ndef stop(file):\n"
        "    if 'checkpoint' in os.readlink(f'/proc/self/fd/{file}'): os.kill(os.getpid(), signal.SIGINT)\n"
        "    fsync(file)\nos.fsync = stop\nrunpy.run_module('examples.pretrain', run_name='__main__', alter_sys=True)\n"
    )
    with tempfile.TemporaryDirectory() as name:
        script = Path(name, "run.py")
        script.write_text(code)
        done = command(script, *SMALL, "--methods", "byol", "--out", f"{name}/run")
        partial = list(Path(name).rglob("*.partial"))
        return _ended(done, signal.SIGINT, "interrupted", also=not partial)


@attempt("SIGTERM, then the same command with --resume", right="it continues from the kept epoch to its table")
def resumed_after_sigterm() -> Outcome:
    with tempfile.TemporaryDirectory() as name:
        arguments = ("--out", f"{name}/run", "--optimization.epochs", "6")
        stopped = example(*arguments, stop=(signal.SIGTERM, "byol 2/"))
        done = example(*arguments, "--resume")
        right = done.status == 0 and "continuing after epoch" in done.out and "| BYOL |" in done.out
        return Outcome(stopped.clean and stopped.status == 143 and right, f"{stopped.seen()}; then {done.seen()}")


@attempt("Ctrl-C in `evaluate`, after its first results", right="one line that says how to go on, status 130")
def ctrl_c_in_evaluate() -> Outcome:
    with tempfile.TemporaryDirectory() as name:
        example("--out", f"{name}/run")
        code = (
            "import os, signal\nimport examples.pretrain.evaluate as e\nwrite = e.write_record\n"
            "def stop(*args, **more):\n    write(*args, **more)\n    os.kill(os.getpid(), signal.SIGINT)\n"
            "e.write_record = stop\n"
        )
        done = _evaluate(Path(name), code)
        kept = len(list(Path(name, "out").glob("*.json")))
        return _ended(done, signal.SIGINT, "interrupted", "measures what is missing", also=kept == 1)


def _evaluate(folder: Path, code: str) -> Ended:
    script = folder / "evaluate.py"
    text = Path(__file__).resolve().parents[2] / "examples" / "pretrain" / "evaluate.py"
    body = text.read_text().replace('if __name__ == "__main__":', f"if True:\n    exec({code!r})\nif True:")
    script.write_text(body.replace("e.write_record = stop", "write_record = stop"))
    options = ("--phantoms", "96", "--subsets", "1", "--steps", "3", "--shares", "0.5", "1.0")
    return command(script, "linear", "--runs", folder / "run", "--out", folder / "out", *options)


@attempt("Ctrl-C in `python -m vqssl.health`", right="one line or none, status 130")
def ctrl_c_in_health() -> Outcome:
    code = (
        "import os, signal, runpy\nimport vqssl.health as h\n"
        "def stop(*args):\n    os.kill(os.getpid(), signal.SIGINT)\nh.read_checkpoint = stop\n"
        "runpy.run_module('vqssl.health', run_name='__main__', alter_sys=True)\n"
    )
    with tempfile.TemporaryDirectory() as name:
        script = Path(name, "health.py")
        script.write_text(code)
        done = command(script, "model.pt")
        return Outcome(done.clean and len(done.lines) <= 1 and done.status == 130, done.seen())
