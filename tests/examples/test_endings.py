"""Whatever ends a command is said in one line that names the file, what is safe and how to go on."""

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from examples.pretrain import __main__ as command
from examples.pretrain import checkpoint, last_word, startup
from examples.pretrain.data import Reading, cache_of
from examples.pretrain.devices import check_device
from examples.pretrain.divergence import Diverged
from examples.pretrain.endings import RankGone, Stopped, told
from examples.pretrain.kept import kept, note_of
from examples.pretrain.last_word import LastWord
from examples.pretrain.launcher import check_environment
from examples.pretrain.lock import hold
from examples.pretrain.phantoms import make_phantoms
from examples.pretrain.presets import Experiment
from examples.pretrain.reports import pictures
from examples.pretrain.reports.outputs import Outputs
from examples.pretrain.train import Run
from examples.pretrain.unwritten import Unwritten
from tests.examples.tiny import ENCODER, OPTIONS, QUICK, pretraining

FULL = OSError(errno.ENOSPC, "No space left on device")


def raising(error):
    def function(*_, **__):
        raise error

    return function


def ending(error, capfd, monkeypatch=None):
    """Return the exit status and the line of a command that ends by an error."""
    with pytest.raises(SystemExit) as end, told(go_on="it goes on", start="it starts again"):
        raise error
    said = capfd.readouterr().err.strip()
    return (1, end.value.code) if isinstance(end.value.code, str) else (end.value.code, said)


# ---- one line ----


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ValueError("a rule"), 1, "error: a rule"),
        (Diverged("training diverged"), 1, "error: training diverged"),
        (FileNotFoundError(2, "No such file or directory", "a.npz"), 1, "error: a.npz: No such file or directory"),
        (FileNotFoundError("no file at a.npz: give another"), 1, "error: no file at a.npz: give another"),
        (
            Unwritten(errno.ENOSPC, "No space left on device", "a.pt"),
            1,
            "error: a.pt cannot be written: No space left on device. Make room on its disk, then it starts again",
        ),
        (KeyboardInterrupt(), 130, "interrupted; it starts again"),
        (Stopped(signal.SIGTERM), 143, "ended by SIGTERM; it starts again"),
        (Stopped(signal.SIGHUP), 129, "ended by SIGHUP; it starts again"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 141, ""),
        (RankGone("rank 1 ended"), 1, "error: rank 1 ended. It starts again"),
    ],
)
def test_line_and_status(error, status, line, capfd):
    assert ending(error, capfd) == (status, line)


@pytest.mark.parametrize(
    "error",
    [MemoryError("Unable to allocate 7 TiB"), RuntimeError("DefaultCPUAllocator: can't allocate memory:\n 9 bytes")],
)
def test_lack_of_memory_is_one_line(error, capfd):
    status, line = ending(error, capfd)
    assert status == 1
    assert line.startswith("error: not enough memory (")
    assert "\n" not in line


def test_fault_of_the_program_keeps_its_traceback():
    with pytest.raises(KeyError), told():
        raise KeyError("a fault")


def test_real_allocation_that_fails_is_recognised(capfd):
    with pytest.raises(RuntimeError) as found:
        torch.empty(2**60)
    assert ending(found.value, capfd)[1].startswith("error: not enough memory")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_signal_ends_the_block_and_handlers_come_back(number, capfd):
    before = signal.getsignal(number)

    def wait():
        os.kill(os.getpid(), number)
        signal.pause()

    with pytest.raises(SystemExit) as end, told():
        wait()
    assert end.value.code == 128 + number
    assert signal.getsignal(number) is before
    assert len(capfd.readouterr().err.strip().splitlines()) == 1


def test_signal_that_is_ignored_while_the_block_ends_stays_ignored():
    before = signal.getsignal(signal.SIGTERM)
    try:
        with told():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with told():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_signal_in_the_imports_prints_one_line(name, status):
    # An import that never ends, so that the signal always finds it.
    code = (
        "import importlib.abc, os, runpy, signal, sys\n"
        "class Waiting(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        f"        if name == 'numpy': os.kill(os.getpid(), signal.{name}); signal.pause()\n"
        "sys.meta_path.insert(0, Waiting())\n"
        "sys.argv = ['-m']\n"
        "runpy.run_module('examples.pretrain', run_name='__main__', alter_sys=False)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path.cwd(), check=False)
    assert done.returncode == status
    assert done.stderr.strip() == f"{startup.word_of(getattr(signal, name))} before anything was written"


def test_library_that_cannot_be_imported_is_one_line():
    code = "from examples.pretrain import startup; startup.guard(); raise ImportError('libtorch.so:\\n no memory')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path.cwd(), check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: a library cannot be imported: libtorch.so: no memory. Free memory")
    assert len(done.stderr.splitlines()) == 1


# ---- files ----


def test_file_that_cannot_be_written_keeps_what_it_held(tmp_path, monkeypatch):
    path = tmp_path / "table.md"
    path.write_text("before")
    monkeypatch.setattr(os, "fsync", raising(FULL))
    with pytest.raises(Unwritten, match=r"table\.md cannot be written: No space left on device$"):
        checkpoint.write_whole(path, b"after")
    assert [each.name for each in tmp_path.iterdir()] == ["table.md"]
    assert path.read_text() == "before"


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_folder_that_cannot_be_made_is_named(tmp_path, place):
    (tmp_path / "file").touch()
    with pytest.raises(Unwritten, match=f"{place} cannot be written: "):
        hold(tmp_path / place)


@pytest.fixture
def decoded(tmp_path):
    """Return a cache of four pictures that are not decoded yet."""
    (tmp_path / "images").mkdir()
    for number, image in enumerate(make_phantoms(4, 16, seed=0).images):
        Image.fromarray(image).save(tmp_path / "images" / f"{number}.png")
    return cache_of(tmp_path / "images", 16, Reading(cache=tmp_path / "cache"))


def test_cache_asks_for_its_room_before_it_writes_to_memory(decoded, monkeypatch):
    """Writing to mapped memory without room under it would end the process by SIGBUS."""
    monkeypatch.setattr(os, "posix_fallocate", raising(FULL))
    with pytest.raises(Unwritten, match=r"images\.npy cannot be written"):
        list(decoded.fill(progress=False, workers=0))
    assert not list(decoded.place.glob("*.partial"))


def test_full_disk_under_a_process_that_decodes_is_one_error(decoded, monkeypatch):
    monkeypatch.setattr(np, "savez", raising(FULL))  # the workers are forked, and have it too
    with pytest.raises(Unwritten, match=r"shard-\S+ cannot be written: No space left on device$"):
        list(decoded.fill(progress=False, workers=1))
    assert not list(decoded.place.glob("*.partial"))


def test_note_says_which_epoch_is_whole(tmp_path):
    run = Run(make_phantoms(48, 32, seed=0), pretraining("byol"), tmp_path)
    assert note_of(tmp_path) is None
    run.train(until=2, quiet=True)
    assert note_of(tmp_path) == f"{tmp_path}/checkpoint.pt of epoch 2 is whole"
    content = bytearray((tmp_path / "checkpoint.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "checkpoint.pt").write_bytes(content)
    assert note_of(tmp_path) is None


def test_training_that_cannot_write_says_what_is_whole(tmp_path, monkeypatch):
    run = Run(make_phantoms(48, 32, seed=0), pretraining("byol"), tmp_path)
    run.train(until=1, quiet=True)
    monkeypatch.setattr(checkpoint, "save", lambda path, state: checkpoint.write_whole(Path("/dev/full/x"), b""))
    with pytest.raises(Unwritten) as error:
        run.train(until=2, quiet=True)
    assert error.value.__notes__ == [f"{tmp_path}/checkpoint.pt of epoch 1 is whole"]


@pytest.mark.parametrize("error", [ValueError("a rule"), Diverged("a reason"), FileNotFoundError("log is gone")])
def test_refusals_get_no_note(error, tmp_path):
    Run(make_phantoms(48, 32, seed=0), pretraining("byol"), tmp_path).save()
    with pytest.raises(type(error)) as found, kept(tmp_path):
        raise error
    assert not hasattr(found.value, "__notes__")


def test_outputs_are_written_beside_one_that_cannot_be(tmp_path, capsys):
    outputs = Outputs()
    outputs.add(raising(Unwritten(errno.ENOSPC, "No space left on device", "a.png")), tmp_path / "a.png")
    outputs.add(raising(ImportError("matplotlib cannot be imported")), tmp_path / "b.png")
    outputs.add(lambda: None, tmp_path / "c.png")
    assert outputs.written == [tmp_path / "c.png"]
    assert capsys.readouterr().err.splitlines() == [
        "left out: a.png cannot be written: No space left on device",
        f"left out: {tmp_path}/b.png: matplotlib cannot be imported",
    ]
    with pytest.raises(Unwritten, match=r"a\.png"):
        outputs.check()


def test_picture_that_cannot_be_drawn_does_not_cost_the_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pictures, "curves", raising(ImportError("matplotlib cannot be imported")))
    config = Experiment("t", out=tmp_path, methods=("byol",), image_size=32, phantoms=96, subsets=1, encoder=ENCODER,
                        options=OPTIONS, optimization=QUICK)  # fmt: skip
    assert command.experiment(config)["auc"]
    assert (tmp_path / "table.md").exists()
    printed = capsys.readouterr()
    assert "pictures: none" in printed.out
    assert "curves.png: matplotlib cannot be imported" in printed.err


# ---- devices ----


@pytest.mark.parametrize("device", ["meta", "nonsense", "", "cuda:99", "cpu:3", "hpu", "CPU"])
def test_devices_that_cannot_train_are_refused(device):
    with pytest.raises(ValueError, match=r"--device must be one that this machine can train on \(cpu"):
        check_device(device)


# ---- ranks ----


def settled(errors, monkeypatch, *, grace=0.6):
    """Return what each rank raises, if it ends by these errors; a rank with None has been killed."""
    monkeypatch.setattr(last_word, "GRACE", grace)
    store = torch.distributed.HashStore()
    found = {}

    def end(rank):
        last = LastWord(store, rank, len(errors))
        last.listen()
        found[rank] = last.settle(errors[rank])

    threads = [threading.Thread(target=end, args=(rank,)) for rank, error in enumerate(errors) if error is not None]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


ECHO = RuntimeError("[gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:4")
LATE = RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv")


def test_rank_with_the_reason_speaks_and_others_end_with_its_status(monkeypatch):
    for reason, status in ((ValueError("bad data"), 1), (KeyboardInterrupt(), 130), (Stopped(15), 143)):
        found = settled([ECHO, reason, ECHO], monkeypatch)
        assert found[1] is reason
        assert [(type(found[rank]), found[rank].code) for rank in (0, 2)] == [(SystemExit, status)] * 2


def test_one_of_several_with_a_reason_speaks(monkeypatch):
    errors = [ValueError("alike"), ValueError("alike")]
    found = settled(errors, monkeypatch)
    assert sorted(type(each).__name__ for each in found.values()) == ["SystemExit", "ValueError"]


def test_killed_rank_is_named_once(monkeypatch):
    found = settled([ECHO, None, ECHO], monkeypatch)
    assert isinstance(found[0], RankGone)
    assert str(found[0]).startswith("rank 1 ended without a word")
    assert found[2].code == 1


def test_stalled_rank_is_named_with_the_time(monkeypatch):
    found = settled([LATE, ECHO, None], monkeypatch)
    assert str(found[0]).startswith("rank 2 did not answer for 1800 s")
    assert found[1].code == 1


def test_interrupted_rank_names_those_that_were_gone(monkeypatch):
    found = settled([Stopped(15), None], monkeypatch)
    assert found[0].__notes__ == ["rank 1 had ended without a word"]


RIGHT = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"RANK": ""}, "got no RANK: start with `torchrun"),
        ({"MASTER_ADDR": "", "MASTER_PORT": ""}, "got no MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "2"}, "RANK must be below WORLD_SIZE, got 2 of 2"),
        ({"RANK": "-1"}, "RANK must be the number of this process"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE must be the number of processes, got two"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT must be from 1 to 65535"),
    ],
)
def test_variables_of_ranks_are_checked(monkeypatch, changes, sentence):
    for name, value in {**RIGHT, **changes}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=sentence):
        check_environment()


def test_right_variables_pass(monkeypatch):
    for name, value in RIGHT.items():
        monkeypatch.setenv(name, value)
    check_environment()
