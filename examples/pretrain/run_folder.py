"""The folder of a run: a new one, or the one to continue; never another run's, and never among the images."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from pathlib import Path

from examples.pretrain import lock


def folder_to_start(name: str, out: Path | None) -> Path:
    """Return the folder for a new run: `out`, or the next number under runs/. Creates nothing.

    Raises:
        ValueError: `out` holds a run already.
    """
    if out is None:
        return Path("runs") / f"{name}-{max(_numbers(name), default=0) + 1}"
    refuse_run(out)
    return out


def folder_to_resume(name: str, out: Path | None) -> Path:
    """Return the folder of the run to continue, held: `out`, or the latest under runs/.

    Raises:
        ValueError: there is no run, or another process holds it.
    """
    if out is None:
        numbers = [number for number in _numbers(name) if holds_run(Path("runs") / f"{name}-{number}")]
        if not numbers:
            raise ValueError(f"nothing to resume under {Path('runs').absolute()}: say where the run is with --out")
        out = Path("runs") / f"{name}-{max(numbers)}"
    if not holds_run(out):
        runs = {path.name: path for path in _folders(out.absolute().parent) if holds_run(path)}
        near = [str(out.parent / name) for name in difflib.get_close_matches(out.name, runs, n=3, cutoff=0.4)]
        raise ValueError(
            f"nothing to resume in {out}: "
            + (f"did you mean {' or '.join(near)}?" if near else "give the --out of the run, or leave out --resume")
        )
    lock.hold(out)
    return out


def hold_new(folder: Path) -> None:
    """Hold the folder of a new run against other processes; create it if needed.

    Raises:
        ValueError: another process holds it, or has put a run there since the folder was chosen.
    """
    lock.hold(folder)
    refuse_run(folder)


def refuse_run(folder: Path) -> None:
    """Raise ValueError if the folder holds a run: it is continued, never overwritten."""
    if any(folder.glob("*/checkpoint.pt")):
        raise ValueError(f"{folder} already holds a run: continue it with --resume, or give another --out")


def holds_run(folder: Path) -> bool:
    """Return True if a run was started in a folder, even if it was killed before its first checkpoint."""
    return (folder / lock.NAME).is_file() or any(folder.glob("*/metrics.csv")) or any(folder.glob("*/checkpoint.pt"))


def refuse_among_images(data: Path | None, folders: Iterable[Path]) -> None:
    """Raise ValueError if results would be written among the images, and be read as images the next time."""
    if data is None or not data.is_dir():
        return
    for folder in folders:
        if folder.resolve().is_relative_to(data.resolve()):
            raise ValueError(
                f"results must be kept apart from the images, got {folder} inside {data}, which is searched with its "
                "sub-folders: give an --out elsewhere"
            )


def _numbers(name: str) -> list[int]:
    """Return the numbers of the runs of a preset under runs/; other names are left alone."""
    found = [re.fullmatch(rf"{re.escape(name)}-([0-9]+)", path.name) for path in _folders(Path("runs"))]
    return [int(match[1]) for match in found if match]


def _folders(parent: Path) -> list[Path]:
    return sorted(path for path in parent.iterdir() if path.is_dir()) if parent.is_dir() else []
