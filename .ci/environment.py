"""Make and use the virtual environment of this repository.

Needs only Python 3.11. `python3 examples`, `python3 tests` and `.ci/run` all use this file::

    python3 .ci/environment.py NAME[,NAME...] ARG...  # .venv/bin/python ARG...

Each NAME is a file of packages, `.ci/requirements/NAME.txt`. The environment holds this checkout, editable, and the
packages of every NAME so far. It is created when missing and brought up to date when its recipe changes. It is `.venv`
at the root of the repository; the variable VQSSL_VENV names another place.
"""

# An older Python must be able to parse this file, to be told that it is too old: hence the quoted annotations.
import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

OLDEST = (3, 11)
ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / ".ci" / "requirements"
CONSTRAINTS = ROOT / ".ci" / "constraints.txt"
KERNELS = ROOT / ".ci" / "kernels.txt"
STAMP = "vqssl-installed.json"  # written last, so that it is true
MARK = "vqssl-unfinished"  # present during the work, and after a kill


def ensure(names: "Iterable[str]") -> Path:
    """Return the Python of an environment that holds this checkout and at least the packages of `names`."""
    if sys.version_info < OLDEST:
        found = f"{sys.executable} is {dotted(sys.version_info[:3])}"
        fail(f"needs Python {dotted(OLDEST)} or newer, but {found}; call this command with a newer one")
    known = {path.stem for path in REQUIREMENTS.glob("*.txt")}
    names = set(names)
    if names - known:
        fail(f"names must be among {', '.join(sorted(known))}, got {', '.join(sorted(names - known))}")
    venv = Path(os.environ.get("VQSSL_VENV") or ROOT / ".venv").expanduser().absolute()
    python = venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    with locked() as lock:
        installed = read_stamp(venv)
        wanted = sorted(names | (known & set(installed.get("names", []))))
        if installed.get("recipe") == recipe(venv) and installed["names"] == wanted and python.exists():
            return python
        start = time.monotonic()
        make(venv, python, lock)
        install(venv, python, wanted, lock)
        say(f"environment ready in {time.monotonic() - start:.0f} s")
    return python


def run(names: "Iterable[str]", argv: "Sequence[str]", cwd: "str | Path | None" = ROOT) -> NoReturn:
    """Replace this process by `python ARGV...` of the environment, in `cwd` (None: the user's current folder).

    The repository's root is importable; the current folder is not, unless it is the root.
    """
    python = ensure(names)
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    # Threads that spin while they wait slow torch down twentyfold as soon as another process uses the cores.
    env.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    command = [str(python), "-P", *argv]
    if cwd is not None:
        os.chdir(cwd)
    sys.stdout.flush()
    sys.stderr.flush()
    if os.name != "nt":  # one process: Ctrl-C, signals and the exit status need no forwarding
        os.execve(python, command, env)
    with subprocess.Popen(command, env=env) as child:
        while True:
            # Ctrl-C reaches the child too, and the child decides how to end.
            with contextlib.suppress(KeyboardInterrupt):
                sys.exit(child.wait())


def make(venv: Path, python: Path, lock: "int | None") -> None:
    """Create `venv`, or replace it if it cannot be used."""
    reason = unusable(venv, python)
    if reason is None:
        return
    if venv.exists() and (not venv.is_dir() or any(venv.iterdir())):
        usual = venv == ROOT / ".venv" and (venv / "pyvenv.cfg").exists()
        if not (usual or (venv / STAMP).exists() or (venv / MARK).exists()):
            fail(f"{venv} {reason}, and was not made by this command: remove it, or set VQSSL_VENV to another place")
        say(f"{venv} {reason}: making it again")
        shutil.rmtree(venv)
    say(f"making {venv} with Python {dotted(sys.version_info[:3])}")
    venv.mkdir(parents=True, exist_ok=True)
    (venv / MARK).touch()
    if call([sys.executable, "-m", "venv", str(venv)], lock):
        fail("could not make the environment; on Debian and Ubuntu the package python3-venv may be missing")


def install(venv: Path, python: Path, names: "Sequence[str]", lock: "int | None") -> None:
    """Install this checkout and the packages of `names` into `venv`, and stamp it."""
    say(f"installing vqssl and packages for {', '.join(names)} into {venv} (new: a minute or more, about 1 GB)")
    (venv / STAMP).unlink(missing_ok=True)
    (venv / MARK).touch()
    # -I: ignore packages from the user's PYTHONPATH and home folder.
    pip = [str(python), "-I", "-m", "pip", "install", "--no-input", "--disable-pip-version-check"]
    if not sys.stderr.isatty():
        pip.append("--quiet")
    files = [argument for name in names for argument in ("--requirement", str(REQUIREMENTS / f"{name}.txt"))]
    status = call([*pip, "--constraint", str(CONSTRAINTS), "--editable", str(ROOT), *files], lock)
    if status == 0 and {"test", "dev"} & set(names):
        status = call([*pip, "--no-deps", "--requirement", str(KERNELS)], lock)
    if status >= 0:
        (venv / MARK).unlink()  # pip ended by itself, and cleans up after itself
    if status:
        fail("pip could not install the packages, see above; the same command tries again")
    partial = venv / (STAMP + ".partial")
    partial.write_text(json.dumps({"recipe": recipe(venv), "names": list(names)}))
    partial.replace(venv / STAMP)


def unusable(venv: Path, python: Path) -> "str | None":
    """Return why `venv` cannot be used, or None."""
    if not (venv / "pyvenv.cfg").exists():
        return "is not a virtual environment"
    if (venv / MARK).exists():
        return "was left half-installed"
    try:
        code = "import sys, pip; print(*sys.version_info[:2], sep='.')"
        command = [str(python), "-I", "-c", code]
        version = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "has no working Python and pip"
    if version.strip() != dotted(sys.version_info[:2]):
        return f"was made by Python {version.strip()}, not {dotted(sys.version_info[:2])}"
    return None


def recipe(venv: Path) -> str:
    """Return a fingerprint of everything, besides the names, that the environment is made from."""
    files = [ROOT / "pyproject.toml", CONSTRAINTS, KERNELS, *sorted(REQUIREMENTS.glob("*.txt"))]
    parts = [path.read_bytes() for path in files]
    parts += [str(ROOT).encode(), str(venv).encode(), dotted(sys.version_info[:2]).encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def read_stamp(venv: Path) -> dict:
    """Return what the last complete installation wrote; empty if there is none."""
    try:
        stamp = json.loads((venv / STAMP).read_text())
        return stamp if isinstance(stamp["names"], list) else {}
    except (OSError, ValueError, TypeError, KeyError):
        return {}


@contextlib.contextmanager
def locked() -> "Iterator[int | None]":
    """Allow one process at a time to change the environment, where the system can lock a file."""
    try:
        import fcntl
    except ImportError:
        yield None
        return
    with open(__file__, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another command that is working on the environment")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # some network file systems
            pass
        yield file.fileno()


def call(command: "Sequence[str]", lock: "int | None") -> int:
    """Run `command`, which keeps the lock until it ends, even if this process is killed."""
    with subprocess.Popen(command, pass_fds=[] if lock is None else [lock]) as child:
        try:
            return child.wait()
        except KeyboardInterrupt:
            child.wait()
            say("interrupted; the same command starts over")
            sys.exit(130)


def dotted(version: "Iterable[int]") -> str:
    """Return (3, 11) as '3.11'."""
    return ".".join(map(str, version))


def say(message: str) -> None:
    """Print a line of progress to stderr."""
    print(f"vqssl: {message}", file=sys.stderr, flush=True)


def fail(message: str) -> NoReturn:
    """Exit with an error message."""
    sys.exit(f"vqssl: {message}")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    run(sys.argv[1].split(","), sys.argv[2:])
