"""A folder of results has one writer at a time, and its files are whole and stay in the folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from examples.pretrain import lock
from examples.pretrain.checkpoint import write_whole
from examples.pretrain.log import Log
from examples.pretrain.run_folder import folder_to_resume, folder_to_start, hold_new, refuse_among_images

ROOT = Path(__file__).resolve().parents[2]
HOLDER = "import sys; from pathlib import Path; from examples.pretrain.lock import hold; hold(Path(sys.argv[1])); "


def other_process(folder, then=""):
    """Let another process hold a folder, and do something more."""
    command = [sys.executable, "-P", "-c", HOLDER + then, str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


posix = pytest.mark.skipif(os.name != "posix", reason="no lock elsewhere")


@posix
def test_folder_is_refused_while_another_process_holds_it_and_free_when_that_is_killed(tmp_path):
    with other_process(tmp_path, "print('held', flush=True); sys.stdin.read()") as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=rf"one writer, and process {holder.pid} on .* is writing there") as error:
            lock.hold(tmp_path)
        assert "\n" not in str(error.value)
        holder.kill()
    lock.hold(tmp_path)
    lock.hold(tmp_path)  # the same process may hold it several times
    refused = other_process(tmp_path)
    assert f"process {os.getpid()} on" in refused.communicate()[1]
    assert refused.returncode


@posix
def test_lock_that_was_removed_is_taken_again(tmp_path):
    lock.hold(tmp_path)
    (tmp_path / lock.NAME).unlink()
    lock.hold(tmp_path)
    refused = other_process(tmp_path)
    refused.communicate()
    assert refused.returncode


@posix
def test_lock_follows_no_link(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / lock.NAME).symlink_to(tmp_path / "mine")
    with pytest.raises(ValueError, match="got a symbolic link"):
        lock.hold(tmp_path / "run")
    assert (tmp_path / "mine").read_text() == "mine"


def test_half_written_files_of_a_killed_run_are_removed(tmp_path):
    (tmp_path / "checkpoint.pt.12-ab.partial").write_bytes(b"half")
    (tmp_path / "checkpoint.pt").write_bytes(b"whole")
    lock.hold(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint.pt", lock.NAME}


def test_write_whole_replaces_links_and_leaves_nothing_half_written(tmp_path):
    (tmp_path / "mine").write_text("mine")
    path = tmp_path / "table.json"
    path.symlink_to(tmp_path / "mine")
    (tmp_path / "table.json.partial").symlink_to(tmp_path / "mine")
    write_whole(path, b"new")
    assert path.read_bytes() == b"new"
    assert not path.is_symlink()
    with pytest.raises(TypeError):
        write_whole(path, "text")
    assert path.read_bytes() == b"new"
    assert (tmp_path / "mine").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 3


def test_log_follows_no_link(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.csv").symlink_to(tmp_path / "mine")
    with Log(tmp_path / "run", [{"epoch": 1, "loss": 0.5}]) as log:
        log.write({"epoch": 2, "loss": 0.25})
    assert (tmp_path / "mine").read_text() == "mine"
    assert (tmp_path / "run" / "metrics.csv").read_text().split() == ["epoch,loss", "1,0.5", "2,0.25"]


# ---- which folder ----


def test_nothing_to_resume_lists_near_names_and_creates_nothing(tmp_path):
    for name in ("chest-64", "other"):
        (tmp_path / name / "byol").mkdir(parents=True)
        (tmp_path / name / "byol" / "metrics.csv").touch()
    (tmp_path / "chest-65").mkdir()  # holds no run
    with pytest.raises(ValueError, match=r"nothing to resume in .*chest-46: did you mean \S*/chest-64\?$"):
        folder_to_resume("demo", tmp_path / "chest-46")
    with pytest.raises(ValueError, match=r"nothing to resume in .*zzz: give the --out"):
        folder_to_resume("demo", tmp_path / "zzz")
    assert not (tmp_path / "chest-46").exists()
    assert folder_to_resume("demo", tmp_path / "chest-64") == tmp_path / "chest-64"


def test_new_run_takes_the_next_number_whatever_else_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert folder_to_start("demo", None) == Path("runs/demo-1")
    for name in ("demo-2", "demo-old9", "demo-²", "demo-1b", "demo-"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    (tmp_path / "runs" / "demo-8").touch()
    (tmp_path / "runs" / "demo-9").symlink_to("nowhere")
    assert folder_to_start("demo", None) == Path("runs/demo-3")


def test_run_that_appeared_meanwhile_is_not_overwritten(tmp_path):
    out = folder_to_start("demo", tmp_path / "run")
    (out / "byol").mkdir(parents=True)
    (out / "byol" / "checkpoint.pt").touch()
    with pytest.raises(ValueError, match="already holds a run"):
        hold_new(out)


@pytest.mark.parametrize("out", ["images", "images/run", "link/run", "images/../images/x"])
def test_results_are_refused_among_the_images(tmp_path, out):
    (tmp_path / "images").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "images")
    with pytest.raises(ValueError, match="kept apart from the images"):
        refuse_among_images(tmp_path / "images", [tmp_path / "fine", tmp_path / out])
    refuse_among_images(tmp_path / "images", [tmp_path / "images-run", tmp_path])
    refuse_among_images(None, [tmp_path])
