"""Disks that are full, read-only or limited, outputs that cannot be written, libraries and memory that are missing."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.attempts.attempt import Outcome, attempt
from benchmarks.attempts.failing import (
    SMALL,
    Ended,
    command,
    example,
    file_limit,
    finished,
    memory_limit,
    one_line,
    small_disk,
    without_rights,
)

NAMED = "one line: which file, what is whole, how to go on; no half-written file"
GOES_ON = "the run ends with its table on the terminal, and says what is left out"


def _left(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*.partial")]


def _filled(fault: str, *words: str, right: Callable[..., Outcome] = one_line, more: tuple[str, ...] = ()) -> Outcome:
    """Run the example on a small disk that is filled when a function of the example is called; see :data:`FILL`."""
    with small_disk("24m") as disk:
        script = disk / "run.py"
        script.write_text(FILL.format(disk=disk, fault=fault))
        done = command(script, *SMALL, "--methods", "dissect", "byol", "--out", disk / "run", *more)
        return (
            right(done, *words, also=not _left(disk)) if right is one_line else _table(done, *words, left=_left(disk))
        )


def _table(done: Ended, *words: str, left: list[str]) -> Outcome:
    """Return the outcome of a run that should end with 1 and its table, and name what it could not write."""
    return finished(done, *words, status=1, also=not left and "run" in done.errors)


FILL = """
import os, runpy
def fill():
    with open("{disk}/filling", "ab", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
whole = __import__("examples.pretrain.checkpoint", fromlist=["x"])
import examples.pretrain.checkpoint, examples.pretrain.log, examples.pretrain.records
import examples.pretrain.reports.figure, examples.pretrain.reports.text
kept, calls = whole.write_whole, {{}}
def filling(path, content):
    calls[path.name] = calls.get(path.name, 0) + 1
    if ({fault}):
        fill()
    return kept(path, content)
for module in (whole, examples.pretrain.log, examples.pretrain.records, examples.pretrain.reports.figure,
               examples.pretrain.reports.text):
    module.write_whole = filling
runpy.run_module("examples.pretrain", run_name="__main__", alter_sys=True)
"""
"""A run whose disk is filled just before a file is written for which the condition ``fault`` holds."""


@attempt("full disk at the first checkpoint", right=NAMED)
def full_at_first_checkpoint() -> Outcome:
    return _filled("path.name == 'checkpoint.pt'", "checkpoint.pt cannot be written: No space left", "Make room")


@attempt("full disk at the second checkpoint", right=NAMED)
def full_at_second_checkpoint() -> Outcome:
    fault = "path.name == 'checkpoint.pt' and calls[path.name] == 2"
    return _filled(fault, "checkpoint.pt cannot be written: No space left", "epoch 1 is whole", "--resume")


@attempt("full disk at the log, after the second checkpoint", right=NAMED)
def full_at_the_log() -> Outcome:
    fault = "path.name == 'metrics.csv' and calls[path.name] == 3"
    return _filled(fault, "metrics.csv cannot be written: No space left", "epoch 2 is whole", "--resume")


@attempt("full disk at the safetensors of the finished run", right=NAMED)
def full_at_the_weights() -> Outcome:
    fault = "path.suffix == '.safetensors'"
    return _filled(fault, "safetensors cannot be written: No space left", "epoch 2 is whole", "--resume")


@attempt("full disk at the second method's checkpoint", right=NAMED)
def full_at_the_second_method() -> Outcome:
    fault = "path.name == 'checkpoint.pt' and path.parent.name == 'byol'"
    return _filled(fault, "byol/checkpoint.pt cannot be written", "dissect/checkpoint.pt of epoch 2 is whole")


@attempt("full disk at `table.json`", right=GOES_ON)
def full_at_the_record() -> Outcome:
    return _filled("path.name == 'table.json'", "left out", "table.json cannot be written", right=finished)


@attempt("full disk at `table.md`", right=GOES_ON)
def full_at_the_table() -> Outcome:
    return _filled("path.name == 'table.md'", "left out", "table.md cannot be written", right=finished)


@attempt("full disk at the picture of the curves", right=GOES_ON)
def full_at_the_curves() -> Outcome:
    return _filled("path.name == 'curves.png'", "left out", "curves.png cannot be written", right=finished)


@attempt("full disk at the picture of the codes", right=GOES_ON)
def full_at_the_codes() -> Outcome:
    return _filled("path.name == 'codes.png'", "left out", "codes.png cannot be written", right=finished)


@attempt("full disk, then room and --resume", right="the same table as without the fault")
def resumed_after_full_disk() -> Outcome:
    with small_disk("24m") as disk:
        script = disk / "run.py"
        script.write_text(FILL.format(disk=disk, fault="path.name == 'checkpoint.pt' and calls[path.name] == 2"))
        arguments = ("--methods", "byol", "--out", disk / "run")
        broken = command(script, *SMALL, *arguments)
        (disk / "filling").unlink(missing_ok=True)
        done = command("-m", "examples.pretrain", *SMALL, *arguments, "--resume")
        whole = command("-m", "examples.pretrain", *SMALL, "--methods", "byol", "--out", disk / "whole")
        rows = [[line for line in each.out.splitlines() if line.startswith("| BYOL")] for each in (done, whole)]
        return Outcome(broken.clean and bool(rows[0]) and rows[0] == rows[1], f"{broken.seen()}; then {rows[0]}")


@attempt("a disk of 1 MB for the whole run", right=NAMED)
def tiny_disk() -> Outcome:
    with small_disk("1m") as disk:
        done = example("--out", disk / "run")
        return one_line(done, "checkpoint.pt cannot be written: No space left", "starts again", also=not _left(disk))


@attempt("a limit of 1 MB on the size of files", right=NAMED)
def limited_files() -> Outcome:
    with tempfile.TemporaryDirectory() as name:
        done = example("--out", f"{name}/run", setup=file_limit(10**6))
        return one_line(
            done, "checkpoint.pt cannot be written: File too large", "ulimit -f", also=not _left(Path(name))
        )


@attempt("a read-only disk", right=NAMED)
def read_only_disk() -> Outcome:
    with small_disk("8m", read_only=True) as disk:
        return one_line(example("--out", disk / "run"), "run cannot be written: Read-only file system")


@attempt("a folder without the right to write", right=NAMED)
def folder_without_rights() -> Outcome:
    with tempfile.TemporaryDirectory() as name:
        place = Path(name, "place")
        place.mkdir(mode=0o500)
        done = example("--out", place / "run", setup=without_rights)
        return one_line(done, "run cannot be written: Permission denied")


@attempt("--resume in a folder whose right to write is gone", right=NAMED)
def resumed_without_rights() -> Outcome:
    with tempfile.TemporaryDirectory() as name:
        example("--out", f"{name}/run", "--optimization.epochs", "2")
        for path in (Path(name, "run", "byol"), Path(name, "run")):
            for file in path.iterdir():
                file.chmod(0o500 if file.is_dir() else 0o400)
            path.chmod(0o500)
        return one_line(
            example("--out", f"{name}/run", "--resume", setup=without_rights), "run.lock", "Permission denied"
        )


@attempt("--out is a file", right=NAMED)
def out_is_a_file() -> Outcome:
    with tempfile.TemporaryDirectory() as name:
        Path(name, "run").touch()
        return one_line(example("--out", f"{name}/run"), "run cannot be written: File exists")


@attempt("--out is below a file", right=NAMED)
def out_is_below_a_file() -> Outcome:
    with tempfile.TemporaryDirectory() as name:
        Path(name, "file").touch()
        return one_line(example("--out", f"{name}/file/run"), "run cannot be written: Not a directory")


@attempt("images that may not be read", right="one line that names the file")
def images_without_rights() -> Outcome:
    with tempfile.TemporaryDirectory() as name:
        images = Path(name, "images.npz")
        images.write_bytes(b"PK")
        images.chmod(0)
        done = example("--data", images, "--out", f"{name}/run", setup=without_rights)
        return one_line(done, "images.npz", "Permission denied")


@attempt("the output goes to a full disk (/dev/full)", right="one line, the checkpoint stays whole")
def output_to_a_full_disk() -> Outcome:
    with tempfile.TemporaryDirectory() as name, open("/dev/full", "w") as full:
        return one_line(example("--out", f"{name}/run", stdout=full.fileno()), "No space left on device")


@attempt("the output goes to a reader that ends, as in `| head -1`", right="a quiet end with status 141")
def reader_ends() -> Outcome:
    with tempfile.TemporaryDirectory() as name:
        read, write = os.pipe()
        os.close(read)
        done = example("--out", f"{name}/run", stdout=write)
        os.close(write)
        return Outcome(done.clean and not done.lines and done.status == 141, done.seen())


@attempt("the cache of decoded images is on a full disk", right="one line that names the file; no half-written file")
def full_at_the_cache() -> Outcome:
    code = (
        "import sys, numpy as np\nfrom PIL import Image\nrng = np.random.default_rng(0)\n"
        "for n in range(96):\n    image = Image.fromarray(rng.integers(0, 255, (256, 256), np.uint8))\n"
        "    image.save(f'{sys.argv[1]}/{n}.png')\n"
    )
    with tempfile.TemporaryDirectory() as name, small_disk("9m") as disk:
        images = Path(name, "images")
        images.mkdir()
        script = Path(name, "make.py")
        script.write_text(code)
        command(script, images)
        done = example("--data", images, "--cache", disk / "cache", "--image-size", "256", "--out", f"{name}/run")
        return one_line(done, "cannot be written: No space left", also=not _left(disk))


@attempt("evaluate: full disk at its first result", right="one line that names the file and how to go on")
def full_at_a_result() -> Outcome:
    return _evaluated("path.suffix == '.json'", "cannot be written: No space left", "measures what is missing")


@attempt("evaluate: full disk at its picture", right="the table is shown; what is left out is said")
def full_at_a_picture_of_evaluate() -> Outcome:
    return _evaluated("path.name == 'shares.png'", "shares.png cannot be written", table=True)


@attempt("evaluate: full disk at its table", right="the table is shown; what is left out is said")
def full_at_the_table_of_evaluate() -> Outcome:
    return _evaluated("path.name == 'table.md'", "table.md cannot be written", table=True)


def _evaluated(fault: str, *words: str, table: bool = False) -> Outcome:
    with tempfile.TemporaryDirectory() as name, small_disk("4m") as disk:
        example("--out", f"{name}/run")
        script = Path(name, "evaluate.py")
        script.write_text(
            FILL.format(disk=disk, fault=fault).replace('"examples.pretrain",', '"examples.pretrain.evaluate",')
        )
        options = ("--phantoms", "96", "--subsets", "1", "--shares", "0.5", "1.0", "--out", disk / "out")
        done = command(script, "linear", "--runs", f"{name}/run", *options)
        told = done.clean and all(word in done.errors for word in words) and done.status == 1
        shown = "| byol |" in done.out
        return Outcome(told and not _left(disk) and shown == table, done.seen() + (", table shown" if shown else ""))


@attempt("evaluate: a read-only place for its results", right="one line that names the place")
def read_only_results() -> Outcome:
    with tempfile.TemporaryDirectory() as name, small_disk("4m", read_only=True) as disk:
        example("--out", f"{name}/run")
        arguments = ("-m", "examples.pretrain.evaluate", "linear", "--runs", f"{name}/run", "--phantoms", "96")
        return one_line(command(*arguments, "--out", disk / "out"), "out cannot be written: Read-only file system")


@attempt("compare: full disk at its phantoms", right="one line, and no half file that the next call would read")
def full_at_the_phantoms_of_compare() -> Outcome:
    with small_disk("100k") as disk:
        arguments = ("--methods", "byol", "--trials", "1", "--seeds", "0", "--phantoms", "400", "--image-size", "32")
        done = command("-m", "examples.pretrain.compare", *arguments, "--out", disk / "out")
        left = [path.name for path in (disk / "out").iterdir()] if (disk / "out").exists() else []
        return one_line(
            done, "cannot be written: No space left", also=not left, note=f", left: {' '.join(left) or 'nothing'}"
        )


@attempt("health: its picture on a full disk", right="the report is printed, one line, status 2, no half picture")
def full_at_the_picture_of_health() -> Outcome:
    return _health("picture.png", "No space left on device")


@attempt("health: its picture below a read-only disk", right="the report is printed, one line, status 2")
def read_only_picture_of_health() -> Outcome:
    return _health("picture.png", "Read-only file system", read_only=True)


def _health(picture: str, word: str, *, read_only: bool = False) -> Outcome:
    with tempfile.TemporaryDirectory() as name, small_disk("8k", read_only=read_only) as disk:
        made = Path(name, "make.py")
        made.write_text("import sys, torch, vqssl\ntorch.save(vqssl.EMACodebook(64, 4).state_dict(), sys.argv[1])\n")
        made.write_text(
            "import sys, torch, vqssl\n"
            "torch.save(vqssl.EMACodebook(codebook_size=64, dim=4).state_dict(), sys.argv[1])\n"
        )
        command(made, f"{name}/model.pt")
        done = command("-m", "vqssl.health", f"{name}/model.pt", "--picture", disk / picture)
        left = (disk / picture).exists()
        told = len(done.lines) == 1 and word in done.lines[0] and "codes" in done.out
        return Outcome(
            done.clean and told and done.status == 2 and not left, done.seen() + (", half a picture" if left else "")
        )


NO_MATPLOTLIB = """
import runpy, sys
class Refusing:
    def find_spec(self, name, path=None, target=None):
        if name == "matplotlib" or name.startswith("matplotlib."):
            raise {error}
for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
    del sys.modules[name]
for name in [name for name in sys.modules if name.startswith("examples.pretrain")]:
    del sys.modules[name]
sys.meta_path.insert(0, Refusing())
runpy.run_module("{module}", run_name="__main__", alter_sys=True)
"""


@attempt("matplotlib cannot be imported", right=GOES_ON)
def no_matplotlib() -> Outcome:
    return _without_matplotlib("ImportError('libpng16.so: cannot open shared object file')")


@attempt("no memory for the import of matplotlib", right=GOES_ON)
def no_memory_for_matplotlib() -> Outcome:
    return _without_matplotlib("MemoryError()")


def _without_matplotlib(error: str) -> Outcome:
    with tempfile.TemporaryDirectory() as name:
        script = Path(name, "run.py")
        script.write_text(NO_MATPLOTLIB.format(error=error, module="examples.pretrain"))
        done = command(script, *SMALL, "--methods", "byol", "--out", f"{name}/run")
        return finished(done, "left out", "curves.png", also=Path(name, "run", "table.md").exists())


@attempt("no memory while the images are read", right="one line that says so")
def no_memory_for_images() -> Outcome:
    with tempfile.TemporaryDirectory() as name:
        done = example("--phantoms", "999999999999", "--out", f"{name}/run")
        return one_line(done, "not enough memory", also=not Path(name, "run").exists())


@attempt("no memory for the model", right="one line that says so")
def no_memory_for_the_model() -> Outcome:
    with tempfile.TemporaryDirectory() as name:
        done = example("--encoder.width", "999999999", "--out", f"{name}/run")
        return one_line(done, "not enough memory", also=not Path(name, "run").exists())


@attempt("700 MB of address space: no library can be loaded", right="one line, status 1")
def no_memory_for_libraries() -> Outcome:
    with tempfile.TemporaryDirectory() as name:
        arguments = ("-m", "examples.pretrain", *SMALL, "--out", f"{name}/run")
        done = command(*arguments, setup=memory_limit(700 * 10**6), fresh=True)
        return one_line(done, "cannot be imported")
