"""Where and how a figure was made: command, commit, machine and versions, for every record of this project."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    "vqssl",
    "torch",
    "triton",
    "numpy",
    "monai",
    "kornia",
    "scikit-learn",
    "vector-quantize-pytorch",
    "faiss-cpu",
    "pykeops",
    "flash-kmeans",
)


def provenance(command: str, device: str = "cpu") -> dict[str, Any]:
    """Return what every record says about its making.

    Args:
        command: what makes the record again, with the names of files but not their folders.
        device: ``"cpu"`` or a CUDA device. The same seed on another CPU or GPU model is another run, so the model
            belongs to the record, and runs are only paired within one model.

    Returns:
        ``command``, ``date``, ``commit``, ``device`` (the model), ``cores`` (threads; None on a GPU), ``versions``.
    """
    on_gpu = device.startswith("cuda")
    return {
        "command": command,
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "device": torch.cuda.get_device_name(device) if on_gpu else cpu_model(),
        "cores": None if on_gpu else torch.get_num_threads(),
        "versions": versions(),
    }


def commit() -> str | None:
    """Return what `git describe` says of this checkout; None without git, which no figure needs."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return described.stdout.strip() or None


def versions() -> dict[str, str]:
    """Return the versions of Python and of those packages that are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def cpu_model() -> str:
    """Return the CPU's name with its family and model numbers, which names alone do not tell apart."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or "unknown"
    name = re.search(r"model name\s*: (.*)", text)
    numbers = [re.search(rf"{field}\s*: (\d+)", text) for field in ("cpu family", r"model\t")]
    return f"{name[1] if name else '?'} (family {', model '.join(n[1] for n in numbers if n)})"


def command_line(module: str) -> str:
    """Return ``python -m MODULE`` with the arguments of this process."""
    return " ".join([f"python -m {module}", *sys.argv[1:]])
