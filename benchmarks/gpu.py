"""Everything that needs a GPU, by parts: checks, timings, memory, tuning, profiles.

    python -m benchmarks.gpu                   all parts, one after the other
    python -m benchmarks.gpu check search      some of them
    python -m benchmarks.gpu --dry             try all on a CPU, on tiny sizes: imports, arguments, files
    python -m benchmarks.gpu --carry wheels    fetch what a bare machine lacks, where there is a package index
    python -m benchmarks.gpu --wheels wheels   install that first, where there is none

Each part writes its log and its records to ``--out`` as it goes, and has a limit below the eight minutes of a short
lease. A part that fails does not stop the others. At the end all is packed into one archive beside the folder. Records
are kept by ``python -m benchmarks.records add``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from benchmarks import records
from benchmarks.provenance import ROOT, versions
from vqssl.kernels.nearest import tuning

CARRIED = (
    "vector-quantize-pytorch", "einx", "frozendict", "loguru", "torch-einops-utils", "monai", "pydicom", "kornia",
    "kornia-rs", "pytorch-optimizer", "flash-kmeans",
)  # fmt: skip
"""What the comparisons import, and a machine with torch for CUDA, numpy, einops, tqdm and matplotlib lacks."""

PROFILED = """
import torch
from vqssl.functional import nearest_codeword
device = "cuda" if torch.cuda.is_available() else "cpu"
rows, codes = (100352, 2048) if device == "cuda" else (96, 64)
x, codes = torch.randn(rows, 128, device=device), torch.randn(codes, 128, device=device)
for _ in range(3):
    nearest_codeword(x, codes)
with torch.profiler.profile() as profile:
    for _ in range(20):
        nearest_codeword(x, codes)
    torch.cuda.synchronize() if device == "cuda" else None
print(profile.key_averages().table(sort_by=f"{device}_time_total", row_limit=20))
"""


class Part(NamedTuple):
    """A part of the work."""

    limit: int
    """Seconds after which it is stopped."""
    command: tuple[str, ...]
    """Arguments of Python; or of the tool that is named first."""
    dry: tuple[str, ...]
    """The same on a CPU and tiny sizes."""
    tool: str = ""
    """A program that runs Python; the part is left out, and says so, where it is missing."""


def _module(name: str, *options: str, limit: int = 240, dry: tuple[str, ...] = ("--dry",)) -> Part:
    return Part(limit, ("-m", name, *options), ("-m", name, *dry))


def _sanitized(tool: str) -> Part:
    check = ("-m", "benchmarks.gpu_check", "--small")
    command = ("--tool", tool, "--error-exitcode", "9", sys.executable, *check)
    return Part(240, command, ("-m", "benchmarks.gpu_check", "--small", "--dry"), "compute-sanitizer")


PARTS: dict[str, Part] = {
    "check": _module("benchmarks.gpu_check", limit=400),
    "search": _module("benchmarks.search", "--device", "cuda"),
    "train_step": _module("benchmarks.train_step", "--device", "cuda"),
    "quantisers": _module("benchmarks.quantisers", "--device", "cuda", limit=180),
    "memory": _module("benchmarks.memory", "--device", "cuda", limit=120),
    "dissect_step": _module("benchmarks.dissect_step", "--device", "cuda", limit=180),
    "launches": _module("benchmarks.launches", "--device", "cuda", limit=90),
    "profile": Part(120, ("-c", PROFILED), ("-c", PROFILED)),
    "memcheck": _sanitized("memcheck"),
    "racecheck": _sanitized("racecheck"),
    "band": _module("tests.reliability.band", "cuda", limit=180),
    "tune": _module("benchmarks.tune", limit=200),
    "codebook_usage": _module("benchmarks.codebook_usage", "--device", "cuda", limit=400),
    "ncu": Part(
        120,
        ("--set", "basic", "--kernel-name", "regex:_look", "--launch-count", "6", sys.executable, "-c", PROFILED),
        ("-c", PROFILED),
        "ncu",
    ),
}
"""All parts, in the order in which they run: what is wanted most comes first."""


def about() -> dict[str, Any]:
    """Return what a reader of a first run wants to know: device, software, the kernels' configuration, tools."""
    found: dict[str, Any] = {"versions": versions(), "cuda": torch.version.cuda, "available": torch.cuda.is_available()}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        capability = (properties.major, properties.minor)
        found |= {
            "device": properties.name,
            "capability": capability,
            "multiprocessors": properties.multi_processor_count,
            "GiB": round(properties.total_memory / 2**30, 1),
            "configurations": {f"D = {dim}": tuning.choose(capability, dim, "half") for dim in (64, 128, 256)},
        }
    found["tuning file"] = f"{tuning.tuning_file().name}: {'there' if tuning.tuning_file().exists() else 'none'}"
    found["tools"] = {tool: bool(shutil.which(tool)) for tool in ("gcc", "compute-sanitizer", "ncu", "nvidia-smi")}
    return found


def run(name: str, part: Part, out: Path, *, dry: bool) -> dict[str, Any]:
    """Run a part, its output to the screen and to a log; return how it ended."""
    if part.tool and not dry and not shutil.which(part.tool):
        return {"part": name, "status": f"left out: {part.tool} is not installed"}
    program = (
        [part.tool, *part.command] if part.tool and not dry else [sys.executable, *(part.dry if dry else part.command)]
    )
    start = time.monotonic()
    before = _records()
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    if part.tool:  # the caching allocator would hide reads beyond the end of a tensor
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    late = False
    with (
        (out / f"{name}.log").open("wb") as log,
        subprocess.Popen(
            program, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as process,
    ):
        shown = threading.Thread(target=_show, args=(process, log))
        shown.start()
        try:
            process.wait(part.limit)
        except subprocess.TimeoutExpired:
            late = True
            process.kill()
        shown.join()
    for file in sorted(_records() - before, key=str):
        shutil.copy(file[0], out)
    status = (
        f"stopped after {part.limit} s" if late else "done" if process.returncode == 0 else f"exit {process.returncode}"
    )
    return {"part": name, "status": status, "seconds": round(time.monotonic() - start, 1)}


def _show(process: subprocess.Popen[bytes], log: BinaryIO) -> None:
    """Copy what a process prints to its log and to the screen, as it comes."""
    assert process.stdout is not None
    for line in process.stdout:
        log.write(line)
        log.flush()
        print(line.decode(errors="replace"), end="", flush=True)


def _records() -> set[tuple[Path, int]]:
    """Return the records of runs, with the times at which they were written."""
    return {(path, path.stat().st_mtime_ns) for path in records.RUNS.glob("*/*.json")}


def carry(folder: Path) -> None:
    """Fetch the wheels that a bare machine lacks."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    subprocess.run([*command, *CARRIED], check=True)


def install(folder: Path) -> None:
    """Install the wheels of a folder, without an index."""
    command = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--quiet"]
    subprocess.run([*command, *map(str, sorted(folder.glob("*.whl")))], check=True)


def main() -> int:
    """Run the command line; return 1 if a part failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (default: all)")
    parser.add_argument("--out", type=Path, default=records.RUNS / "gpu", help="folder of logs and records")
    parser.add_argument("--dry", action="store_true", help="try everything on a CPU; nothing is measured")
    parser.add_argument(
        "--carry", type=Path, metavar="FOLDER", help="fetch the wheels that a bare machine lacks, and end"
    )
    parser.add_argument("--wheels", type=Path, metavar="FOLDER", help="install the wheels of that folder first")
    options = parser.parse_args()
    unknown = sorted(set(options.parts) - set(PARTS))
    if unknown:
        parser.error(f"parts must be among {', '.join(PARTS)}, got {', '.join(unknown)}")
    if options.carry is not None:
        carry(options.carry)
        return 0
    if not options.dry and not torch.cuda.is_available():
        parser.error("these parts need a GPU, and torch sees none: write --dry to try them on a CPU")
    if options.wheels is not None:
        install(options.wheels)
    options.out.mkdir(parents=True, exist_ok=True)
    print(json.dumps(about(), indent=1), flush=True)
    (options.out / "about.json").write_text(json.dumps(about(), indent=1) + "\n")
    ended = []
    for name in options.parts or PARTS:
        print(f"\n==> {name}", flush=True)
        ended.append(run(name, PARTS[name], options.out, dry=options.dry))
        print(f"<== {json.dumps(ended[-1])}", flush=True)
        (options.out / "summary.json").write_text(json.dumps(ended, indent=1) + "\n")
    archive = options.out.with_name(options.out.name + ".tar.gz")
    with tarfile.open(archive, "w:gz") as packed:
        packed.add(options.out, options.out.name)
    failed = [each["part"] for each in ended if each["status"] != "done" and not each["status"].startswith("left out")]
    print(f"\nall in {archive.name}; failed: {', '.join(failed) or 'none'}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
