"""``python -m vqssl.health`` on files that it cannot measure, and on codebooks whose counts deceive."""

import os
import subprocess
import sys
import tempfile
import textwrap
import zipfile
from pathlib import Path
from typing import Any

import torch

import vqssl
from benchmarks.attempts.attempt import ROOT, Outcome, attempt


def _state() -> dict[str, Any]:
    codebook = vqssl.EMACodebook(codebook_size=8, dim=4)
    codebook(torch.randn(64, 4))
    return codebook.state_dict()


def _command(path: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-P", "-m", "vqssl.health", str(path), *options]
    everything = {**os.environ, "PYTHONPATH": os.environ.get("PYTHONPATH", str(ROOT)), **environment}
    return subprocess.run(command, env=everything, capture_output=True, check=False)


def _refused(content: bytes | dict[str, Any], *options: str) -> Outcome:
    """Say whether the command ends with 2 and one line."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file.pt"
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        done = _command(path, "--strict", "--json", *options)
    lines = done.stderr.decode(errors="replace").strip().splitlines()
    last = textwrap.shorten(lines[-1], 120) if lines else "nothing printed"
    return Outcome(done.returncode == 2 and len(lines) == 1, f"status {done.returncode}, {len(lines)} lines: {last}")


@attempt("health of an empty file", right="status 2 (1 means act) and one line")
def empty_file() -> Outcome:
    return _refused(b"")


@attempt("health of codes in a sparse tensor", right="status 2 and one line")
def sparse_codes() -> Outcome:
    return _refused({"embed": torch.randn(8, 4).to_sparse(), "cluster_size": torch.ones(8)})


@attempt("health of codes of float8", right="status 2 and one line")
def float8_codes() -> Outcome:
    return _refused({"embed": torch.randn(8, 4).to(torch.float8_e4m3fn), "cluster_size": torch.ones(8)})


@attempt("health of complex counts", right="status 2 and one line")
def complex_counts() -> Outcome:
    return _refused({"embed": torch.randn(8, 4), "cluster_size": torch.ones(8, dtype=torch.complex64)})


@attempt("health of a file of 1 KB that says it holds 2^40 codes", right="status 2 and one line, without the memory")
def repeated_codes() -> Outcome:
    codes = torch.zeros(1, 1).expand(2**40, 1)
    return _refused({"embed": codes, "cluster_size": torch.ones(1).expand(2**40)})


@attempt("health of a compressed archive that unpacks to 1 GiB", right="status 2 and one line, without unpacking")
def archive_bomb() -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        small, bomb = Path(folder) / "small.pt", Path(folder) / "bomb.pt"
        torch.save({**_state(), "filling": torch.zeros(16)}, small)
        with zipfile.ZipFile(small) as source, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
            for entry in source.infolist():
                archive.writestr(entry.filename, source.read(entry))
            archive.writestr("small/data/99", bytes(2**30))
        return _refused(bomb.read_bytes())


@attempt("health of a codebook whose name holds commands for the terminal", right="they are printed as escapes")
def name_with_escapes() -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file.pt"
        torch.save({"red\x1b[31m\x07": _state(), "other": _state()}, path)
        done = _command(path)
    raw = done.stdout.count(b"\x1b") + done.stdout.count(b"\x07")
    return Outcome(done.returncode == 0 and raw == 0, f"status {done.returncode}, {raw} commands in the output")


@attempt("health on a terminal without Unicode", right="a report")
def ascii_terminal() -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file.pt"
        torch.save(_state(), path)
        done = _command(path, PYTHONIOENCODING="ascii")
    return Outcome(done.returncode == 0 and b"verdict" in done.stdout, f"status {done.returncode}")


@attempt("64 codes of which 56 are copies, with even counts", right="usage and health call 56 dead")
def copies_that_look_alive() -> Outcome:
    torch.manual_seed(0)
    codebook = vqssl.EMACodebook(codebook_size=64, dim=8, decay=0.9)
    codebook(torch.randn(4096, 8))
    codebook.set_codes_(torch.randn(8, 8).repeat(8, 1))
    dead = int(codebook.usage().dead)
    (health,) = vqssl.health.examine(codebook).values()
    return Outcome(dead == health.dead == 56, f"usage says {dead}, health {health.dead}")
