"""Run the attempts, on an older commit too where one is named, and write the record."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from benchmarks import records
from benchmarks.attempts import failing
from benchmarks.attempts.attempt import ATTEMPTS, ROOT, Attempt, Outcome, kinds, load, run_here
from benchmarks.provenance import command_line, provenance

FOLDER = Path(__file__).resolve().parent
FORKED = ("full_disk", "lost_ranks", "odd_options", "signals")
"""Kinds whose attempts each start the example: they are forked from one process that has imported it."""
MARK = "outcome: "


def run_in(tree: Path, one: Attempt, patience: float) -> Outcome:
    """Run an attempt in a process of its own, from the root of ``tree``; ``patience`` multiplies its time-out."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-P", "-m", "benchmarks.attempts", "--one", one.name]
    # In a session of its own: what the attempt started dies with it.
    process = subprocess.Popen(
        command,
        cwd=tree,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        printed, errors = process.communicate(timeout=patience * one.timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.communicate()
        return Outcome(survived=False, seen=f"no end within {patience * one.timeout:g} s")
    try:
        return Outcome(**json.loads(printed.strip().splitlines()[-1]))
    except (IndexError, TypeError, ValueError):
        last = (errors.strip().splitlines() or [""])[-1]
        return Outcome(survived=False, seen=f"exit status {process.returncode}: {last}"[:300])


def run_forked(tree: Path, attempts: list[Attempt], patience: float) -> Iterator[Outcome]:
    """Run attempts one after the other, forked from a process in ``tree`` that has imported what they all need."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    environment["TORCH_CPP_LOG_LEVEL"] = (
        "ERROR"  # torch reads it once, here; a rank of the example sets it at its start
    )
    command = [sys.executable, "-P", "-m", "benchmarks.attempts", "--patience", str(patience), "--forked"]
    names = [one.name for one in attempts]
    with subprocess.Popen([*command, *names], cwd=tree, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(MARK):
                yield Outcome(**json.loads(line.removeprefix(MARK)))


def fork_all(names: list[str], patience: float) -> None:
    """Run attempts in forked processes, and print a line of JSON for each."""
    modules = {one.partition(".")[0] for one in names}
    load(*modules)
    importlib.import_module(failing.PRELOADED)
    for name in names:
        one = ATTEMPTS[name]
        with tempfile.TemporaryFile("w+") as result:
            child = os.fork()
            if not child:
                os.setsid()
                try:
                    json.dump(run_here(one)._asdict(), result)
                    result.flush()
                finally:
                    os._exit(0)
            until = time.monotonic() + patience * one.timeout
            while not os.waitpid(child, os.WNOHANG)[0]:
                if time.monotonic() > until:
                    os.killpg(child, 9)
                time.sleep(0.02)
            with contextlib.suppress(ProcessLookupError):  # what it has started dies with it
                os.killpg(child, 9)
            result.seek(0)
            late = Outcome(survived=False, seen=f"no end within {patience * one.timeout:g} s")
            print(MARK + (result.read() or json.dumps(late._asdict())), flush=True)


def without_folders(outcome: Outcome) -> Outcome:
    """Return an outcome that names no temporary folder and no checkout: they say nothing, and differ each time."""
    seen = re.sub(r"tmp\w{8}/?", "", outcome.seen.replace(f"{tempfile.gettempdir()}/", ""))
    return outcome._replace(seen=seen.replace(f"{ROOT}/", ""))


def run_all(tree: Path, attempts: list[Attempt], workers: int, patience: float, title: str) -> list[Outcome]:
    """Run the attempts in ``tree`` and return their outcomes in the same order."""
    forked = [one for one in attempts if one.kind in FORKED]
    alone = [one for one in attempts if one.kind not in FORKED]
    with ThreadPoolExecutor(workers) as pool, tqdm(desc=title, total=len(attempts), leave=False) as bar:
        by_name = {}
        found = pool.map(lambda one: run_in(tree, one, patience), alone)
        after = run_forked(tree, forked, patience) if forked else ()
        for one, outcome in zip(alone + forked, itertools.chain(found, after), strict=True):
            by_name[one.name] = without_folders(outcome)
            bar.update()
    return [by_name[one.name] for one in attempts]


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.attempts",
        description=sys.modules["benchmarks.attempts"].__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--old", metavar="COMMIT", help="run the attempts on this commit too, and write the record")
    parser.add_argument("--kind", nargs="+", default=[], choices=kinds(), help="only the attempts of these files")
    parser.add_argument("--workers", type=int, default=2, help="how many run at once (default: %(default)s)")
    parser.add_argument(
        "--patience", type=float, default=1, metavar="FACTOR", help="longer time-outs, for a machine that is busy"
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--forked", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        load(options.one.partition(".")[0])
        print(json.dumps(run_here(ATTEMPTS[options.one])._asdict()))
        return
    if options.forked:
        fork_all(options.forked, options.patience)
        return

    attempts = load(*options.kind)
    after = run_all(ROOT, attempts, options.workers, options.patience, "working tree")
    before: list[Outcome | None] = [None] * len(attempts)
    if options.old:
        with tempfile.TemporaryDirectory() as folder:
            tree = Path(folder) / "old"
            subprocess.run(["git", "worktree", "add", "--detach", str(tree), options.old], cwd=ROOT, check=True)
            try:
                shutil.copytree(FOLDER, tree / "benchmarks" / "attempts", dirs_exist_ok=True)
                before = list(run_all(tree, attempts, options.workers, options.patience, options.old))
            finally:
                subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=True)
    rows = []
    for one, old, new in zip(attempts, before, after, strict=True):
        rows.append({"kind": one.kind, "attempt": one.title, "right": one.right, "after": new._asdict()})
        if old is not None:
            rows[-1]["before"] = old._asdict()
            print(f"{one.name}\n  before: {'' if old.survived else 'LOST '}{old.seen}")
        else:
            print(one.name)
        print(f"  after:  {'' if new.survived else 'LOST '}{new.seen}")
    survived = sum(one.survived for one in after)
    print(f"{len(attempts)} attempts, {survived} survived, {len(attempts) - survived} lost")
    if options.old:
        of = "-".join(sorted(options.kind))
        record = {
            "kind": f"attempts of {of}" if of else "attempts",
            **provenance(command_line("benchmarks.attempts")),
            "old": options.old,
            "attempts": len(attempts),
            "survived": survived,
            "lost": len(attempts) - survived,
            "survived before": sum(one is not None and one.survived for one in before),
            "rows": rows,
        }
        records.write_run(records.RUNS / "reliability" / f"cpu.attempts{of and '-'}{of}.json", record)
    raise SystemExit(survived < len(attempts))


if __name__ == "__main__":
    main()
