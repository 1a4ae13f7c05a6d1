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
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
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


# ---- ranks ----

RANK = """
import os, runpy, signal, sys
signal.alarm(int(os.environ["ALARM"]))  # a rank that waits for ever must not outlive the attempt
rank = os.environ["RANK"] if "RANK" in os.environ else "none"
exec(os.environ.get("CODE" + rank, ""))
sys.argv = ["examples.pretrain", *sys.argv[1:], *os.environ.get("MORE" + rank, "").split()]
status = 0
try:
    runpy.run_module("examples.pretrain", run_name="__main__")
except SystemExit as end:
    status = end.code if isinstance(end.code, int) else int(end.code is not None)
    raise
except BaseException:
    status = 1
    raise
finally:
    open(os.environ["FOLDER"] + "/status" + rank, "w").write(str(status))
"""
"""A rank of the example that runs some code first, and writes its exit status to a file."""
AT_STEP = """
import examples.pretrain.train as train
def fault(run):
    pass
step = train.Run._step
def with_fault(run, *args):
    if run.epoch == 1:
        fault(run)
    return step(run, *args)
train.Run._step = with_fault
"""
"""Code that calls a function ``fault``, to be defined after it, before each step of the second epoch."""


class Ranks(NamedTuple):
    """The end of a run of several ranks."""

    ranks: list[Ended]
    status: int
    """Of the launcher."""

    def seen(self) -> str:
        """Return statuses and lines of all ranks in a line."""
        statuses = " and ".join(str(each.status) for each in self.ranks)
        said = " / ".join(f"rank {n}: {line}" for n, each in enumerate(self.ranks) for line in each.lines[-1:])
        return f"statuses {statuses}, {'' if self.clean else 'traceback, '}{said or 'nothing said'}"

    @property
    def clean(self) -> bool:
        """True if no rank has shown anything of its insides."""
        return all(each.clean for each in self.ranks)

    @property
    def lines(self) -> list[str]:
        """Error lines of all ranks."""
        return [line for each in self.ranks for line in each.lines]


def started_by_hand(
    folder: Path,
    *arguments: str | Path,
    codes: Sequence[str] = ("", ""),
    more: Sequence[str] = ("", ""),
    environments: Sequence[dict[str, str | None]] = ({}, {}),
    send: tuple[int, int, str] | None = None,
    timeout: float = 60,
) -> Ranks:
    """Start ranks as ``torch.multiprocessing`` does, each a process with variables of its own, and wait for all.

    Args:
        folder: for what they write.
        arguments: of the example.
        codes: what each rank runs first.
        more: further arguments of each rank.
        environments: variables of each rank; None removes one.
        send: a rank, a signal for it, and the word of rank 0's output after which it is sent.
        timeout: seconds after which what is left is killed.
    """
    (folder / "rank.py").write_text(RANK)
    port = _free_port()
    processes = []
    for rank, changes in enumerate(environments):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(len(environments))}
        own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **_variables(folder, codes, more, timeout)}
        merged = {**os.environ, **own, **changes}
        command = [str(folder / "rank.py"), *SMALL, "--methods", "byol", *map(str, arguments)]
        environment = {name: value for name, value in merged.items() if value is not None}
        with (folder / f"out{rank}").open("w") as out, (folder / f"err{rank}").open("w") as err:
            processes.append(Started(command, out.fileno(), err.fileno(), environment))
    until = time.monotonic() + timeout
    if send is not None:
        while send[2] not in (folder / "out0").read_text() and time.monotonic() < until:
            time.sleep(0.02)
        processes[send[0]].send(send[1])
    late = not all(process.wait(max(until - time.monotonic(), 0.1)) for process in processes)
    for process in processes:
        process.kill()
    return _ranks(folder, [-1 if one.returncode is None else one.returncode for one in processes], int(late))


def started_by_torchrun(
    folder: Path,
    *arguments: str | Path,
    codes: Sequence[str] = ("", ""),
    more: Sequence[str] = ("", ""),
    send: tuple[int, str] | None = None,
    timeout: float = 80,
) -> Ranks:
    """Start two ranks by torchrun and wait for it; ``send`` is a signal for torchrun, and the word of rank 0 before."""
    (folder / "rank.py").write_text(RANK)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--redirects", "3"]
    command = [sys.executable, "-P", *launch, "--log-dir", folder / "logs", folder / "rank.py"]
    environment = {**os.environ, **_variables(folder, codes, more, timeout)}
    process = subprocess.Popen(
        [*map(str, command), *SMALL, "--methods", "byol", *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    until = time.monotonic() + timeout

    def printed(rank: int, name: str) -> str:
        found = list((folder / "logs").rglob(f"{rank}/{name}.log"))
        return found[0].read_text() if found else ""

    if send is not None:
        while send[1] not in printed(0, "stdout") and time.monotonic() < until:
            time.sleep(0.02)
        os.killpg(process.pid, send[0]) if send[0] == signal.SIGINT else process.send_signal(send[0])
    try:
        status = process.wait(max(until - time.monotonic(), 1))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        status = process.wait()
    for rank in range(2):
        (folder / f"out{rank}").write_text(printed(rank, "stdout"))
        (folder / f"err{rank}").write_text(printed(rank, "stderr"))
    files = [folder / f"status{rank}" for rank in range(2)]  # of a rank that was killed there is none
    statuses = [int(file.read_text()) if file.exists() and file.read_text() else 137 for file in files]
    return _ranks(folder, statuses, status)


def _variables(folder: Path, codes: Sequence[str], more: Sequence[str], timeout: float) -> dict[str, str]:
    found = {"FOLDER": str(folder), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    found["ALARM"] = str(int(timeout + 5))
    for rank, (code, arguments) in enumerate(zip(codes, more, strict=True)):
        found |= {f"CODE{rank}": code, f"MORE{rank}": arguments}
    return found


def _ranks(folder: Path, statuses: Sequence[int], status: int) -> Ranks:
    ends = [
        Ended(own, (folder / f"out{rank}").read_text(), (folder / f"err{rank}").read_text())
        for rank, own in enumerate(statuses)
    ]
    return Ranks(ends, status)


def _free_port() -> int:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
