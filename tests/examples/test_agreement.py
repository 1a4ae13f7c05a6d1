"""Two processes compare what they run: what differs is named, in the same sentence on both."""

import datetime
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from examples.pretrain import ranks
from examples.pretrain.agreement import check_equal, on_all
from examples.pretrain.data.stored import StoredImages
from examples.pretrain.endings import told
from examples.pretrain.phantoms import make_phantoms
from examples.pretrain.train import Run
from tests.examples.tiny import pretraining
from tests.rank_processes import run_ranks

RANKS = 2


class Unpicklable(ValueError):
    def __reduce__(self):
        raise TypeError("cannot be pickled")


def raise_on(bad, error):
    def function():
        if ranks.rank() in bad:
            raise error
        return ranks.rank()

    return function


def outcome(function):
    """Return the result of a call, or kind and text of its error."""
    try:
        return function()
    except ValueError as error:
        return f"{type(error).__name__}: {error}"


def work(rank, folder):
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS, timeout=timeout)
    found = {}
    found["equal"] = outcome(lambda: check_equal({"seed": 1, "options": {"lr": 0.1}}))
    found["other"] = outcome(lambda: check_equal({"seed": rank, "options": {"lr": 0.1 + rank, "same": 0}}))
    kept = torch.__version__
    torch.__version__ = f"{rank}.0"
    found["version"] = outcome(lambda: check_equal({}))
    torch.__version__ = kept
    found["result"] = outcome(lambda: on_all(lambda: rank))
    found["one raises"] = outcome(lambda: on_all(raise_on([1], ValueError("a reason"))))
    found["both raise"] = outcome(lambda: on_all(raise_on([0, 1], Unpicklable("a reason"))))
    found["cannot be pickled"] = outcome(lambda: on_all(raise_on([0], Unpicklable("a reason"))))

    images = make_phantoms(48, 32, seed=0)
    runs = {
        "images": Run(make_phantoms(48, 32, seed=rank), pretraining("byol"), folder / "images"),
        "settings": Run(images, pretraining("byol", momentum=0.5 + rank / 10), folder / "settings"),
        "folder": Run(images, pretraining("byol"), folder / f"folder {rank}"),
        "epoch": Run(images, pretraining("byol"), folder / "epoch"),
    }
    runs["epoch"].epoch = rank
    for name, run in runs.items():
        found[f"{name} of a run"] = outcome(lambda run=run: run.train(quiet=True))
    found["same steps on stored images"] = stored_images_train_alike(images, folder.with_name("stored"))
    dist.barrier()
    dist.destroy_process_group()

    # The time-out of a collective is far shorter than the work of the first rank.
    short = datetime.timedelta(seconds=2)
    dist.init_process_group("gloo", init_method=f"file://{folder}/again", rank=rank, world_size=RANKS, timeout=short)
    begin = time.monotonic()
    found["waits"] = outcome(lambda: ranks.while_first_works(steps(4.5), every=0.3))
    found["waited"] = time.monotonic() - begin
    found["first fails"] = outcome(lambda: ranks.while_first_works(steps(0.1, ValueError("a reason")), every=0.3))
    torch.save(found, folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def steps(seconds, error=None):
    """Yield ten steps of work, then raise the error."""
    for number in range(10):
        time.sleep(seconds / 10)
        yield number
    if error is not None:
        raise error


def stored_images_train_alike(images, place):
    """Train an epoch on images in memory, and on the same in a file; return whether all weights are the same bits."""
    place.mkdir(exist_ok=True)
    path = place / "images.npy"
    ranks.decided_by_first(lambda: np.save(path, images.images))
    runs = [
        Run(data, pretraining("byol"), place / name)
        for name, data in (("memory", images), ("file", replace(images, images=StoredImages(path))))
    ]
    for run in runs:
        run.train(until=1, quiet=True)
    ours, theirs = (run.method.state_dict() for run in runs)
    return all(torch.equal(ours[name], theirs[name]) for name in ours if isinstance(ours[name], torch.Tensor))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("agreement")
    run_ranks(work, (folder,), RANKS, seconds=120)
    written = sorted(path.name for path in folder.iterdir() if path.is_dir())
    return written, [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(RANKS)]


def test_equal_facts_pass(found):
    _, both = found
    assert [each["equal"] for each in both] == [None, None]
    assert [each["result"] for each in both] == [0, 1]


@pytest.mark.parametrize(
    ("case", "sentence"),
    [
        ("other", "options.lr is 0.1 on rank 0 and 1.1 on rank 1; seed is 0 on rank 0 and 1 on rank 1"),
        ("version", "version.torch is 0.0 on rank 0 and 1.0 on rank 1"),
        ("images of a run", "images is "),
        ("settings of a run", "config.options.momentum is 0.5 on rank 0 and 0.6 on rank 1"),
        ("folder of a run", "folder 0 on rank 0 and "),
        ("epoch of a run", "epoch reached is 0 on rank 0 and 1 on rank 1"),
    ],
)
def test_what_differs_is_named_alike_on_all_ranks(found, case, sentence):
    written, both = found
    first, second = (each[case] for each in both)
    assert first == second
    assert first.startswith("ValueError: all ranks must run the same: ")
    assert sentence in first
    assert "\n" not in first
    assert "options.same" not in first  # what is equal
    assert written == []


def test_error_of_one_rank_is_raised_on_all(found):
    _, both = found
    assert [each["one raises"] for each in both] == ["ValueError: rank 1: a reason"] * 2
    assert [each["both raise"] for each in both] == ["Unpicklable: a reason"] * 2
    assert [each["cannot be pickled"] for each in both] == ["ValueError: rank 0: a reason"] * 2


def test_others_wait_for_the_first_beyond_any_time_out(found):
    _, both = found
    assert [each["waits"] for each in both] == [None, None]
    assert min(each["waited"] for each in both) > 4
    assert [each["first fails"] for each in both] == ["ValueError: a reason", "ValueError: rank 0: a reason"]


def test_two_ranks_train_on_stored_images_to_the_same_bits(found):
    _, both = found
    assert [each["same steps on stored images"] for each in both] == [True, True]


def test_error_is_one_line_and_status_one(monkeypatch, capfd):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(SystemExit) as alone, told():
        raise ValueError("a reason")
    assert alone.value.code == "error: a reason"  # Python writes it, and ends with status 1
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(SystemExit) as one_of_many, told():
        raise ValueError("a reason")
    assert one_of_many.value.code == 1
    assert capfd.readouterr().err == "error: a reason\n"


def test_one_process_agrees_with_itself():
    check_equal({"lr": float("nan")})
    assert on_all(lambda: 3) == 3


# ---- launchers ----

OURS = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "SLURM_NNODES",
        "SLURM_STEP_NUM_NODES", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")  # fmt: skip


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, "`srun --ntasks=1 torchrun --standalone --nproc-per-node=4 "),
        (
            {"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_NNODES": "2"},
            "`srun --ntasks=2 --ntasks-per-node=1 torchrun --nnodes=2 --nproc-per-node=4 ",
        ),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "need LOCAL_RANK"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE=2 of MPI"),
        ({"PMI_SIZE": "3"}, "--nproc-per-node=3"),
    ],
)
def test_processes_that_are_no_ranks_are_refused(monkeypatch, environment, sentence):
    for name in OURS:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="torchrun") as error, ranks.joined("cpu"):
        pass
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"},
        {"SLURM_NTASKS": "4"},  # a shell in an allocation
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1"},  # one task of it
        {"WORLD_SIZE": "1", "RANK": "0"},
        {"OMPI_COMM_WORLD_SIZE": "1"},
    ],
)
def test_single_process_runs_anywhere(monkeypatch, environment):
    for name in OURS:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with ranks.joined("cpu"):
        assert ranks.world_size() == 1


def test_ranks_of_torchrun_pass_under_slurm(monkeypatch):
    for name, value in {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    ranks.check_launcher()
