"""Run the commands of README, Makefile and get-started as a reader would, each in a fresh clone.

    python3 .ci/documented.py [PLACE...]  # default: all; minutes, and a few GB for a while
    python3 .ci/documented.py --list      # what is run whole, what is shortened and how, what is left out and why

Commands share a clone and its environment only where the pages say so: a *place* below. Each command is run by bash as
it stands on its page, or with the change that is named beside it. A command that stands on a page and not here, or here
and on no page, is an error. The commit at HEAD is what is cloned. Needs only Python 3.11 and git.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "docs/get-started.md")
FIRST_WORDS = ("python", "python3", ".venv/bin/python", "pip", "make", "git", ".ci/run")
"""How a command starts, by which those within a sentence are told from names."""
HARMLESS = {"HOME", "LANG", "LC_ALL", "LOGNAME", "PATH", "SHELL", "TERM", "TMPDIR", "USER", "TZ", "DISPLAY"}


class Command(NamedTuple):
    """A command of a page, and what is run in its place."""

    text: str
    """As on the page, its lines joined and without its comment; or, where `change` says so, not on any page."""
    run: str | None = None
    """The shell line that is run instead; None: the text itself."""
    change: str = ""
    """How `run` differs from the text."""


class Place(NamedTuple):
    """Commands that share a clone and an environment, in their order."""

    says: str
    """Which page says that they share it."""
    commands: tuple[Command, ...]
    activated: bool = False
    """Run inside a virtual environment that the reader made, as for pip."""


SETUP = "not on a page: "
SHORT = "--optimization.epochs 1 --subsets 1"
IMAGES = "phantoms/phantoms-400-32.npz"
DRAW = """{python} -c 'import pathlib; from examples.pretrain.phantoms import phantom_file
phantom_file(pathlib.Path("phantoms"), 400, 32)'"""
ABLATE = ".venv/bin/python -m examples.pretrain.ablate"
SEEDS = "0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17"
BENCH = "python3 .ci/environment.py bench -m benchmarks"


def code_of(page: str, python: str) -> Command:
    """Return the command that runs all Python blocks of a page as one program."""
    return Command(
        f"the Python code of {page}",
        f"""{python} - <<'END'
import pathlib, re
text = pathlib.Path("{page}").read_text(encoding="utf-8")
exec("\\n".join(re.findall(r"```python\\n(.*?)```", text, flags=re.DOTALL)), {{"__name__": "page"}})
END""",
        SETUP + "all blocks of the page, in order",
    )


PLACES = {
    "pip": Place(
        "get-started, *Install*; README, *install*",
        (
            Command("pip install ."),
            code_of("README.md", "python"),
            Command('pip install ".[health]"'),
            Command(
                "save a codebook",
                "python -c 'import torch, vqssl; "
                'torch.save(vqssl.EMACodebook(codebook_size=64, dim=16).state_dict(), "codebook.pt")\'',
                SETUP + "a CHECKPOINT for the next command",
            ),
            Command("python -m vqssl.health CHECKPOINT", "python -m vqssl.health codebook.pt", "CHECKPOINT has a name"),
        ),
        activated=True,
    ),
    "examples": Place(
        "README, *Two commands*; get-started, *The paper's method*",
        (
            Command(
                "python3 examples --help", "python3 examples --help && test ! -e .venv", "and it makes no environment"
            ),
            Command(
                "python3 examples",
                f"python3 examples demo --phantoms 400 {SHORT}",
                "400 phantoms for 5000, 1 epoch for 14, 1 label subset for 5: minutes less",
            ),
            Command(".venv/bin/python -m vqssl.health runs/demo-1/dissect/checkpoint.pt"),
            Command(
                ".venv/bin/python -m examples.pretrain.demonstration",
                ".venv/bin/python -m examples.pretrain.demonstration --phantoms 400 --epochs 1",
                "400 phantoms for 5000, 1 epoch for 14: minutes less",
            ),
            code_of("docs/get-started.md", ".venv/bin/python"),
            Command("draw phantoms", DRAW.format(python=".venv/bin/python"), SETUP + "images for PATH below"),
            Command(
                "python3 examples small --data PATH",
                f"python3 examples small --data {IMAGES} {SHORT}",
                "PATH is 400 phantoms; 1 epoch for 12, 1 label subset for 5",
            ),
            Command(
                ".venv/bin/python -m examples.pretrain.evaluate --runs FOLDER --data PATH",
                ".venv/bin/python -m examples.pretrain.evaluate linear finetune localise lesion-cells codes"
                f" segment-frozen segment-tuned --runs runs/small-1 --data {IMAGES}"
                " --shares 0.4 --mask-shares 0.4 --subsets 1 --steps 2",
                "the run of the command before; one share, 1 subset, 2 steps; no anatomy, whose t-SNE takes minutes",
            ),
            Command(
                ".venv/bin/python -m examples.pretrain.compare --methods all --data PATH",
                f".venv/bin/python -m examples.pretrain.compare --methods all --data {IMAGES}"
                " --trials 1 --seeds 0 --epochs 1 --shares 0.4 --subsets 1 --steps 2",
                "PATH is 400 phantoms; no trials, 1 seed, 1 epoch, one share, 2 steps: hours less",
            ),
            Command(
                f"{ABLATE} --preset demo --phantoms 5000 --variants byol anchors full --seeds {SEEDS}",
                f"{ABLATE} --preset demo --phantoms 400 --variants byol anchors full --seeds 0 --epochs 1 --subsets 1"
                " --runs runs/a --results runs/a",
                "400 phantoms, 1 seed, 1 epoch, 1 label subset: hours less",
            ),
            Command(
                f"{ABLATE} --data kermany_cxr_64.npz --variants byol full --seeds 0 1 2 3 4 5",
                f"{ABLATE} --data {IMAGES} --variants byol full --seeds 0 --epochs 1 --subsets 1"
                " --runs runs/b --results runs/b",
                "the file is not in the repository: 400 phantoms; 1 seed, 1 epoch, 1 label subset",
            ),
        ),
    ),
    "tests": Place(
        "README, *Two commands*",
        (
            Command(
                "python3 tests",
                "python3 tests tests/test_readme.py tests/health",
                "two places of tests: `.ci/run tests` runs all of them",
            ),
        ),
    ),
    "docs": Place("README, last line", (Command("make docs"),)),
    "lint": Place("Makefile", (Command("make lint"),)),
    "build": Place("Makefile", (Command("make build"),)),
    "bench": Place(
        "README, *Figures*; Makefile",
        (
            Command("make bench", f"{BENCH} --dry", "its recipe with tiny sizes, which measure nothing"),
            *(
                Command(f"{BENCH}.{name}", f"{BENCH}.{name} --dry", "tiny sizes, which measure nothing")
                for name in ("search", "train_step", "memory")
            ),
        ),
    ),
}

LEFT_OUT = {
    "git clone REPOSITORY vqssl && cd vqssl": "every place starts with it; REPOSITORY is this checkout",
    ".ci/run": "this is a part of it, and the other parts have run when this one starts",
    "make demo": "its recipe is run: python3 examples",
    "make test": "its recipe is run: python3 tests",
}


# ---- what the pages say ----


def documented() -> dict[str, str]:
    """Return the commands of the pages and of the Makefile, each with the place where it stands first."""
    found: dict[str, str] = {}
    for page in PAGES:
        for text in commands_of((ROOT / page).read_text(encoding="utf-8")):
            found.setdefault(text, page)
    for target in recipes():
        found.setdefault(f"make {target}", "Makefile")
    return found


def commands_of(markdown: str) -> Iterator[str]:
    """Yield the commands of a page: lines of its shell blocks, and code in its sentences that starts like one."""
    fence = re.compile(r"^ *```([^\n`]*)\n(.*?)^ *```$", flags=re.DOTALL | re.MULTILINE)
    for language, block in fence.findall(markdown):
        if language in ("sh", "bash", "shell", "console"):
            # A line that ends in a backslash goes on in the next one.
            for line in block.replace("\\\n", " ").splitlines():
                if text := joined(re.sub(r"(^|\s)#.*", "", line)):
                    yield text
    for code in re.findall(r"`([^`]+)`", fence.sub("", markdown)):
        text = joined(code)
        if text.split(" ")[0] in FIRST_WORDS and (" " in text or text.startswith(".")) and text not in FIRST_WORDS[:3]:
            yield text


def joined(text: str) -> str:
    """Return text with one space for each run of white space."""
    return " ".join(text.split())


def recipes() -> dict[str, str]:
    """Return the lines of each target of the Makefile."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    return {name: joined(lines) for name, lines in re.findall(r"^(\w+):.*\n((?:\t.+\n?)+)", text, flags=re.MULTILINE)}


def disagreements() -> list[str]:
    """Return what stands on a page and not here, or here and on no page."""
    on_pages = documented()
    here = {command.text for place in PLACES.values() for command in place.commands if not is_setup(command)}
    missing = [
        f"{page}: `{text}` is neither run nor left out with a reason"
        for text, page in on_pages.items()
        if text not in here | LEFT_OUT.keys()
    ]
    stale = [f"`{text}` stands on no page" for text in here | LEFT_OUT.keys() if text not in on_pages]
    both = [f"`{text}` is run and left out" for text in here & LEFT_OUT.keys()]
    silent = [
        f"`{command.text}` is changed without a word"
        for place in PLACES.values()
        for command in place.commands
        if (command.run is None) != (command.change == "")
    ]
    # "its recipe is run: COMMAND" must be true.
    for text, reason in LEFT_OUT.items():
        recipe = reason.partition("its recipe is run: ")[2]
        if recipe and (recipes().get(text.removeprefix("make ")) != recipe or recipe not in here):
            silent.append(f"`{text}`: its recipe is another one, or is not run")
    return [*missing, *stale, *both, *silent]


def is_setup(command: Command) -> bool:
    """Return True for what prepares another command and stands on no page."""
    return command.change.startswith(SETUP)


# ---- run ----


def run_place(name: str, scratch: Path) -> list[str]:
    """Run the commands of a place in a new clone, and print the time of each; return what failed."""
    place, folder = PLACES[name], scratch / name
    folder.mkdir()
    start = time.monotonic()
    subprocess.run(["git", "clone", "--quiet", ROOT.as_uri(), str(folder / "vqssl")], check=True)
    env = environment_of(folder, place.activated)
    failed = []
    for number, command in enumerate(place.commands):
        began = time.monotonic()
        log = folder / f"{number}.log"
        with log.open("wb") as output:
            line = command.run or command.text
            ran = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", line],
                cwd=folder / "vqssl",
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        note = f"  [{command.change}]" if command.change else ""
        print(f"{time.monotonic() - began:6.0f} s  {command.text}{note}", flush=True)
        if ran.returncode:
            said = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-40:])
            print(f"{said}\n{name}: status {ran.returncode} of: {line}", flush=True)
            failed.append(f"{name}: {command.text}")
            break  # the next commands of the place build on it
    shutil.rmtree(folder)
    print(f"{time.monotonic() - start:6.0f} s  {name}: all of it, with its clone and environment\n", flush=True)
    return failed


def environment_of(folder: Path, activated: bool) -> dict[str, str]:
    """Return the variables of a reader's shell, where `python3` is the Python that runs this file."""
    env = {
        name: value
        for name, value in os.environ.items()
        if name in HARMLESS or name.startswith(("PIP_", "XDG_")) or name.lower().endswith("_proxy")
    }
    # The exact versions of CI, as for every other environment here.
    env["PIP_CONSTRAINT"] = str(ROOT / ".ci" / "constraints.txt")
    programs = folder / "bin"
    programs.mkdir()
    python = programs / "python3"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    first = programs
    if activated:
        subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
        first = folder / "venv" / "bin"
    env["PATH"] = f"{first}{os.pathsep}{env.get('PATH', os.defpath)}"
    return env


def listing() -> str:
    """Return what is run whole, what is shortened and how, what is left out and why."""
    lines = []
    for name, place in PLACES.items():
        lines.append(f"{name} ({place.says})")
        for command in place.commands:
            lines.append(f"  {command.text}\n    " + (f"changed: {command.change}" if command.change else "whole"))
    lines.append("not run")
    lines += [f"  {text}\n    {reason}" for text, reason in LEFT_OUT.items()]
    return "\n".join(lines)


def main() -> None:
    """Check that nothing is forgotten, and run the places."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("places", nargs="*", metavar="PLACE", help=f"{', '.join(PLACES)} (default: all)")
    parser.add_argument("--list", action="store_true", help="say what is run, and run nothing")
    options = parser.parse_args()
    unknown = [name for name in options.places if name not in PLACES]
    if unknown:
        parser.error(f"places must be of {', '.join(PLACES)}, got {', '.join(unknown)}")
    wrong = disagreements()
    if wrong:
        sys.exit("\n".join(wrong))
    if options.list:
        print(listing())
        return
    if subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, check=True).stdout:
        print("note: changes that are not committed are not in the clones", flush=True)
    start, failed = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="vqssl-documented-") as scratch:
        for name in options.places or PLACES:
            failed += run_place(name, Path(scratch))
    print(f"documented commands: {time.monotonic() - start:.0f} s")
    if failed:
        sys.exit("failed: " + "; ".join(failed))


if __name__ == "__main__":
    main()
