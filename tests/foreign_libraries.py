"""Fetch libraries that cannot be in the environment of the tests into a folder of pytest's cache, once.

A torchvision that was built for another torch breaks every package that imports it, and trackers bring dozens of
packages. So only single processes get a folder on their path. Without a package index the tests that need it are
skipped, and say so.
"""

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
FETCH_TIMEOUT = 180  # seconds


class Libraries(NamedTuple):
    """Packages of one folder. pip installs them without dependencies: the environment has some, the list the rest."""

    names: str
    wanted: tuple[str, ...]


NEIGHBOURS = Libraries(
    "torchvision, timm, lightly, Lightning, Accelerate, transformers",
    (  # torchvision's minor version is torch's plus 15; transformers needs the last six for its hub
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
        "accelerate==1.15.0",
        "psutil==7.2.2",
        "pyarrow==26.0.1",
    ),
)
TRACKERS = Libraries(
    "W&B, MLflow, trackio",
    (  # the three, and what of their dependencies a run without a network imports
        "wandb==0.31.0",
        "mlflow-skinny==3.17.2",
        "trackio==0.43.0",
        "alembic==1.20.1",
        "annotated-doc==0.0.7",
        "annotated-types==0.8.0",
        "anyio==4.16.0",
        "cachetools==8.0.2",
        "click==8.5.1",
        "databricks-sdk==0.162.0",
        "fastapi==0.165.0",
        "gitdb==4.0.12",
        "gitpython==3.2.1",
        "gradio-client==2.7.2",
        "h11==0.16.0",
        "httpcore2==2.16.2",
        "httpx==0.28.1",
        "httpx2==2.16.2",
        "huggingface-hub==2.4.0",
        "mako==1.4.3",
        "opentelemetry-api==1.45.2",
        "opentelemetry-proto==1.45.2",
        "opentelemetry-sdk==1.45.2",
        "opentelemetry-semantic-conventions==0.66b2",
        "orjson==3.13.0",
        "platformdirs==4.14.8",
        "pydantic==2.14.4",
        "pydantic-core==2.50.5",
        "smmap==5.0.3",
        "sqlalchemy==2.1.9",
        "sqlparse==0.6.1",
        "starlette==1.10.0",
        "truststore==0.10.5",
        "typing-inspection==0.4.5",
        "uvicorn==0.54.0",
        "xxhash==4.1.0",
        "certifi==2026.10.19.post1",
        "charset-normalizer==3.5.3",
        "importlib-metadata==10.2.0",
        "cryptography==50.0.2",
        "cffi==2.1.1",
        "pycparser==3.12",
        "lazy-importer==0.1.0",
        "backports.tarfile==1.2.0",
        "zipp==4.1.2",
        "idna==3.20",
        "PyYAML==6.0.4",
        "requests==2.34.2",
        "urllib3==2.8.0",
    ),
)


def fetched(cache: pytest.Cache, libraries: Libraries) -> Path:
    """Return a folder with the libraries alone; pytest's cache keeps it for the next run."""
    key = hashlib.sha256("\n".join([sys.version, *libraries.wanted]).encode()).hexdigest()[:12]
    folder = cache.mkdir("libraries") / key
    if folder.exists():
        return folder
    partial = folder.with_suffix(f".{os.getpid()}")
    options = ["--quiet", "--no-input", "--disable-pip-version-check", "--no-deps", "--retries", "0"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(partial), *libraries.wanted]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=FETCH_TIMEOUT)
        if answer.returncode:
            why = (answer.stderr.strip() or "pip did not say why")[-2000:]
            # pip's message if it reaches no index.
            missing = "(from versions: none)" in why
            reason = f"NOT CHECKED with {libraries.names}: {why.splitlines()[-1]}"
            (pytest.skip if missing or not os.environ.get("CI") else pytest.fail)(reason)
        with contextlib.suppress(OSError):  # another process of the tests was faster
            partial.rename(folder)
    except subprocess.TimeoutExpired:
        pytest.skip(f"NOT CHECKED with {libraries.names}: none in {FETCH_TIMEOUT} s")
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def run_beside(cache: pytest.Cache, module: str, *arguments: str, libraries: Libraries = NEIGHBOURS) -> tuple[str, str]:
    """Run `python -m MODULE ARGUMENTS...` with the libraries on its path; return its stdout and stderr."""
    # Threads that spin while they wait slow torch down as soon as another process uses the cores.
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    environment["PYTHONPATH"] = os.pathsep.join([str(fetched(cache, libraries)), str(ROOT)])
    command = [sys.executable, "-W", "ignore", "-m", module, *arguments]
    answer = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    return answer.stdout, answer.stderr
