"""Fetch libraries that cannot be in the environment of the tests into a folder of pytest's cache, once.

A torchvision that was built for another torch breaks every package that imports it. So only single processes get the
folder on their path. Without a package index the tests that need it are skipped, and say so.
"""

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
FETCH_TIMEOUT = 180  # seconds

# torchvision's minor version is torch's plus 15. pip installs these without dependencies: the environment has some, and
# the second half of the list the rest (transformers needs the last six for its hub).
WANTED = (
    f"torchvision==0.{int(torch.__version__.split('.')[1]) + 15}.*",
    "timm==1.0.31",
    "lightly==1.6.0",
    "encodec==0.1.1",
    "vector-quantize-pytorch==0.7.3",
    "lightning==2.6.6",
    "lightning-utilities==0.15.3",
    "torchmetrics==1.9.0",
    "transformers==5.24.0",
    "tokenizers==0.23.3",
    "regex==2026.11.19",
    "PyYAML==6.0.4",
    "huggingface-hub==2.4.0",
    "httpx2==2.16.2",
    "httpcore2==2.16.2",
    "anyio==4.16.0",
    "h11==0.16.0",
    "truststore==0.10.5",
    "idna==3.20",
    "pyarrow==26.0.1",
)


def fetched(cache: pytest.Cache) -> Path:
    """Return a folder with the libraries alone; pytest's cache keeps it for the next run."""
    key = hashlib.sha256("\n".join([sys.version, *WANTED]).encode()).hexdigest()[:12]
    folder = cache.mkdir("libraries") / key
    if folder.exists():
        return folder
    partial = folder.with_suffix(f".{os.getpid()}")
    options = ["--quiet", "--no-input", "--disable-pip-version-check", "--no-deps", "--retries", "0"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(partial), *WANTED]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=FETCH_TIMEOUT)
        if answer.returncode:
            why = (answer.stderr.strip() or "pip did not say why")[-2000:]
            # pip's message if it reaches no index.
            missing = "(from versions: none)" in why
            reason = f"NOT CHECKED with torchvision, timm, lightly, Lightning, transformers: {why.splitlines()[-1]}"
            (pytest.skip if missing or not os.environ.get("CI") else pytest.fail)(reason)
        with contextlib.suppress(OSError):  # another process of the tests was faster
            partial.rename(folder)
    except subprocess.TimeoutExpired:
        pytest.skip(f"NOT CHECKED with torchvision, timm, lightly, Lightning, transformers: none in {FETCH_TIMEOUT} s")
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def run_beside(cache: pytest.Cache, module: str, *arguments: str) -> tuple[str, str]:
    """Run `python -m MODULE ARGUMENTS...` with the libraries on its path; return its stdout and stderr."""
    # Threads that spin while they wait slow torch down as soon as another process uses the cores.
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    environment["PYTHONPATH"] = os.pathsep.join([str(fetched(cache)), str(ROOT)])
    command = [sys.executable, "-W", "ignore", "-m", module, *arguments]
    answer = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    return answer.stdout, answer.stderr
