"""Libraries that cannot be in the environment of the tests, fetched once into a folder of pytest's cache.

A torchvision that was built for another torch breaks what else imports it, so the folder is put on the path of single
processes and never into this environment. A machine without a package index skips what needs it, and says so.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 180  # seconds to fetch

# torchvision's minor version runs 15 ahead of torch's. What these depend on and is needed is here already, or in the
# second half: transformers talks to its hub through the last six.
WANTED = (
    f"torchvision==0.{int(torch.__version__.split('.')[1]) + 15}.*",
    "timm==1.0.31",
    "lightly==1.6.0",
    "encodec==0.1.1",
    "vector-quantize-pytorch==0.7.3",
    "lightning==2.6.6",
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
)


def fetched(cache: pytest.Cache) -> Path:
    """A folder with nothing but the libraries; pytest's cache keeps it for the next run."""
    key = hashlib.sha256("\n".join([sys.version, *WANTED]).encode()).hexdigest()[:12]
    folder = cache.mkdir("libraries") / key
    if folder.exists():
        return folder
    partial = folder.with_suffix(f".{os.getpid()}")
    options = ["--quiet", "--no-input", "--disable-pip-version-check", "--no-deps", "--retries", "0"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(partial), *WANTED]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
        if answer.returncode:
            why = (answer.stderr.strip() or "pip did not say why")[-2000:]
            # What pip finds of a package where it reaches no index: nothing, of any version.
            missing = "(from versions: none)" in why
            reason = f"NOT CHECKED beside torchvision, timm, lightly, Lightning, transformers: {why.splitlines()[-1]}"
            (pytest.skip if missing or not os.environ.get("CI") else pytest.fail)(reason)
        partial.rename(folder)
    except subprocess.TimeoutExpired:
        pytest.skip(f"NOT CHECKED beside torchvision, timm, lightly, Lightning, transformers: none in {PATIENCE} s")
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def run_beside(cache: pytest.Cache, module: str, *arguments: str) -> tuple[str, str]:
    """What `python -m MODULE ARGUMENTS...` prints and complains of, with the libraries on its path."""
    # Threads that spin while they wait are slow as soon as anything else wants the cores.
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    environment["PYTHONPATH"] = os.pathsep.join([str(fetched(cache)), str(ROOT)])
    command = [sys.executable, "-W", "ignore", "-m", module, *arguments]
    answer = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    return answer.stdout, answer.stderr
