"""What the attempts with failing machines share: small disks, limits, commands that are stopped, and ranks.

A command is a process of its own. Where the example is imported already (see :data:`PRELOADED`), it is forked from
this process, which spares the imports; ``fresh`` ones are started as a user starts them. Faults come from the system,
or from code that runs before the example.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.attempts.attempt import ROOT, Outcome

SMALL = (
    *("demo", "--image-size", "32", "--phantoms", "96", "--subsets", "1", "--encoder.width", "8"),
    *("--byol.dim", "8", "--byol.hidden-dim", "16", "--dissect.byol.dim", "8", "--dissect.byol.hidden-dim", "16"),
    *("--dissect.codebook-size", "16", "--optimization.epochs", "2", "--optimization.batch-size", "16"),
)
"""Options of a run of a second, once everything is imported; its checkpoint takes 3 MB."""
FAULTS = ("Traceback (most recent call last)", "terminate called", "Exception ignored", "Fatal Python error")
"""What a user must not see."""


PRELOADED = "examples.pretrain.__main__"
"""What a process imports before it forks commands."""


class Started:
    """A process: forked from this one to run a module of the example, or begun as a new Python.

    Args:
        arguments: of Python: ``"-m"`` and a module, or a script, and their arguments.
        out: file descriptor for what is printed.
        err: file descriptor for errors.
        environment: all variables.
        setup: called in the new process first.
        fresh: never fork.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        out: int,
        err: int,
        environment: dict[str, str],
        setup: Callable[[], None] | None = None,
        *,
        fresh: bool = False,
    ) -> None:
        self.returncode: int | None = None

        def prepare() -> None:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # as a terminal has them
                signal.signal(number, signal.SIG_DFL)
            if setup is not None:
                setup()

        if fresh or PRELOADED not in sys.modules:
            command = [sys.executable, "-P", *arguments]
            # Its status is collected by `poll`, as that of a forked process.
            self.pid = subprocess.Popen(command, env=environment, stdout=out, stderr=err, preexec_fn=prepare).pid
            return
        sys.stdout.flush()
        self.pid = os.fork()
        if not self.pid:
            status = 70
            try:
                os.dup2(out, 1)
                os.dup2(err, 2)
                prepare()
                signal.signal(signal.SIGINT, signal.default_int_handler)  # as a new Python has it
                os.environ.clear()
                os.environ.update(environment)
                status = _as_python(arguments)
            finally:
                os._exit(status)

    def poll(self) -> int | None:
        """Return the status as a shell shows it, None while the process runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                code = os.waitstatus_to_exitcode(status)
                self.returncode = code if code >= 0 else 128 - code
        return self.returncode

    def wait(self, timeout: float) -> bool:
        """Return True if the process ends within some seconds."""
        until = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > until:
                return False
            time.sleep(0.02)
        return True

    def send(self, number: int) -> None:
        """Send a signal."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End the process for certain."""
        self.send(signal.SIGKILL)
        self.wait(30)


def _as_python(arguments: Sequence[str]) -> int:
    """Run a module or script as the main program, and return the exit status of a Python that does."""
    sys.stdout, sys.stderr = open(1, "w", buffering=1, closefd=False), open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    status = 0
    try:
        if arguments[0] == "-m":
            sys.argv = [arguments[1], *arguments[2:]]
            with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # it is imported already
                runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = list(arguments)
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        traceback.print_exc()
        status = 130
    except BaseException:
        traceback.print_exc()
        status = 1
    try:
        sys.stdout.flush()
    except OSError as error:
        print(f"Exception ignored in: stdout: {error}", file=sys.stderr)
        status = 120
    return status


class Ended(NamedTuple):
    """The end of a process."""

    status: int
    """As a shell shows it: 128 and the number of the signal that killed it."""
    out: str
    errors: str

    @property
    def lines(self) -> list[str]:
        """Lines of the error stream: no warnings of libraries, no bars."""
        there = [line.rpartition("\r")[2].strip() for line in self.errors.splitlines()]
        words = ("Warning", "%|", "/s]")
        return [
            line
            for line in there
            if line and not any(word in line for word in words) and not line.startswith(("[W", "warnings."))
        ]

    @property
    def clean(self) -> bool:
        """True if nothing of Python's or a library's insides was shown."""
        return not any(fault in self.errors for fault in FAULTS)

    def seen(self) -> str:
        """Return the status and what was said, in a line."""
        shown = self.lines[-1] if self.lines else "nothing said"
        return f"status {self.status}, {'' if self.clean else 'traceback, '}{len(self.lines)} lines: {shown}"


def command(
    *arguments: str | Path,
    setup: Callable[[], None] | None = None,
    stop: tuple[int, float | str] | None = None,
    timeout: float = 100,
    stdout: int | None = None,
    fresh: bool = False,
    **environment: str,
) -> Ended:
    """Run ``python ARGUMENTS`` and return how it ended.

    Args:
        arguments: as in ``"-m", "examples.pretrain", "demo"``.
        setup: called in the new process before anything else.
        stop: a signal, and when to send it: seconds after the start, or a word that the command has printed.
        timeout: seconds.
        stdout: file descriptor for the output; None keeps it.
        fresh: start a new Python.
        environment: variables to set beside those of this process.
    """
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **environment}
    with tempfile.TemporaryFile("w+") as printed, tempfile.TemporaryFile("w+") as errors:
        out = printed.fileno() if stdout is None else stdout
        process = Started([*map(str, arguments)], out, errors.fileno(), variables, setup, fresh=fresh)
        if stop is not None:
            _await(stop[1], printed.fileno(), process, timeout)
            process.send(stop[0])
        late = not process.wait(timeout)
        process.kill()
        texts = []
        for file in (printed, errors):
            file.seek(0)
            texts.append(file.read())
    status = -1 if process.returncode is None else process.returncode
    return Ended(status, texts[0], texts[1] + (f"\nno end within {timeout:g} s" if late else ""))


def _await(moment: float | str, printed: int, process: Started, timeout: float) -> None:
    """Wait for some seconds, or until the process has printed a word."""
    if not isinstance(moment, str):
        time.sleep(moment)
        return
    until = time.monotonic() + timeout
    while process.poll() is None and time.monotonic() < until:
        if moment.encode() in os.pread(printed, 2**20, 0):
            return
        time.sleep(0.02)


def example(*arguments: str | Path, **options: object) -> Ended:
    """Run the example with small settings and one method."""
    return command("-m", "examples.pretrain", *SMALL, "--methods", "byol", *arguments, **options)  # type: ignore[arg-type]


def one_line(ended: Ended, *words: str, status: int = 1, also: bool = True, note: str = "") -> Outcome:
    """Return the outcome of a command that should end in one line with these words.

    Args:
        ended: the end of the command.
        words: all of them must be in the line.
        status: the right one.
        also: what else must hold.
        note: what to add to what was seen.
    """
    told = len(ended.lines) == 1 and all(word in ended.lines[0] for word in words)
    return Outcome(ended.clean and told and ended.status == status and also, ended.seen() + note)


def finished(ended: Ended, *words: str, status: int = 0, also: bool = True, note: str = "") -> Outcome:
    """Return the outcome of a command that should show its table; the words must be on the error stream."""
    table = "| BYOL |" in ended.out
    told = all(word in ended.errors for word in words)
    seen = ended.seen() + (", table shown" if table else ", no table") + note
    return Outcome(ended.clean and table and told and ended.status == status and also, seen)


# ---- what the system does ----


def file_limit(size: int) -> Callable[[], None]:
    """Return a set-up after which no file can grow beyond ``size`` bytes; Python ignores SIGXFSZ."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def memory_limit(size: int) -> Callable[[], None]:
    """Return a set-up after which the process cannot have more than ``size`` bytes of address space."""
    return lambda: resource.setrlimit(resource.RLIMIT_AS, (size, size))


def without_rights() -> None:
    """Let permissions count for root too: this process, and what it starts, lose the right to read and write all."""
    if os.geteuid():
        return
    library = ctypes.CDLL(None, use_errno=True)
    override, search = 1, 2  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    for capability in (override, search):
        library.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP: for programs that it becomes
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    library.capget(header, sets)
    for place in (0, 1):  # effective and permitted, of the first 32 capabilities
        sets[place] &= ~(1 << override | 1 << search)
    if library.capset(header, sets):
        raise OSError(ctypes.get_errno(), "the rights of root cannot be given up here")


@contextlib.contextmanager
def small_disk(size: str, *, read_only: bool = False) -> Iterator[Path]:
    """Mount a file system of ``size`` bytes that this process and its children alone see, and give its folder."""
    library = ctypes.CDLL(None, use_errno=True)
    new_user, new_mounts, private = 0x10000000, 0x20000, 0x44000
    user, group = os.geteuid(), os.getegid()
    if library.unshare(new_mounts if user == 0 else new_mounts | new_user):
        raise OSError(ctypes.get_errno(), "no file system of its own can be mounted here")
    if user:
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
            Path(f"/proc/self/{name}").write_text(text)
    library.mount(b"none", b"/", None, private, None)
    with tempfile.TemporaryDirectory() as name:
        options = f"size={size}".encode()
        if library.mount(b"tmpfs", name.encode(), b"tmpfs", int(read_only), options):
            raise OSError(ctypes.get_errno(), "no file system of its own can be mounted here")
        try:
            yield Path(name)
        finally:
            library.umount2(name.encode(), 2)
