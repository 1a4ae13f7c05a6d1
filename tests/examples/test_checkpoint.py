"""Checkpoints are verified before anything of the run changes."""

import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch

from examples.pretrain import checkpoint
from examples.pretrain.phantoms import make_phantoms
from examples.pretrain.train import Run
from tests.examples.tiny import pretraining
from tests.laws import assert_same_bits
from tests.profiles import few


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    run = Run(make_phantoms(48, 32, seed=0), pretraining("dissect"), tmp_path_factory.mktemp("run"))
    run.train(until=2, quiet=True)
    return run


@pytest.fixture
def fresh(trained, tmp_path):
    """A run that has trained nothing, in an empty folder."""
    return Run(trained.data, trained.config, tmp_path)


def state_of(run):
    return checkpoint.load(run.folder / "checkpoint.pt", "cpu")


def tensors_of(run):
    return {name: value for name, value in run.method.state_dict().items() if isinstance(value, torch.Tensor)}


def refused(run, *words):
    """Assert that the run refuses its checkpoint in one line, and is as it was."""
    before = {name: value.clone() for name, value in tensors_of(run).items()}
    with pytest.raises(ValueError, match=r"checkpoint\.pt") as error:
        run.resume()
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    assert_same_bits(tensors_of(run), before)
    assert run.epoch == 0


@pytest.mark.parametrize("part", few(range(5)))
def test_every_flipped_bit_of_a_value_is_found(trained, fresh, part):
    whole = (trained.folder / "checkpoint.pt").read_bytes()
    with zipfile.ZipFile(trained.folder / "checkpoint.pt") as archive:
        entries = [entry for entry in archive.infolist() if entry.file_size]
    rng = np.random.default_rng(0)
    for entry in rng.permutation(np.array(entries, dtype=object))[5 * part : 5 * part + 5]:
        with zipfile.ZipFile(trained.folder / "checkpoint.pt") as archive:
            content = archive.read(entry)
        damaged = bytearray(whole)
        start = whole.index(content, entry.header_offset + 30)
        damaged[start + rng.integers(len(content))] ^= 1 << rng.integers(8)
        (fresh.folder / "checkpoint.pt").write_bytes(damaged)
        refused(fresh, "not a readable checkpoint")


def first(state, ending):
    return next(name for name in state["model"] if name.endswith(ending))


def fill(ending, value):
    def change(state):
        state["model"][first(state, ending)].view(-1)[0] = value

    return change


def half(ending):
    def change(state):
        state["model"][first(state, ending)] = state["model"][first(state, ending)].half()

    return change


def in_moment(change):
    def changed(state):
        moments = state["optimizer"]["state"][3]
        moments["exp_avg"] = change(moments["exp_avg"])

    return changed


@pytest.mark.parametrize(
    ("change", "words"),
    few([
        (fill("cluster_size", float("nan")), ("cluster_size", "finite", "earlier copy")),
        (fill(".weight", float("-inf")), (".weight", "finite")),
        (half("cluster_size"), ("cluster_size", "float16")),
        (lambda state: state.update(epoch=-1), ("entry epoch", "at least 0", "got -1")),
        (lambda state: state.update(epoch=True), ("entry epoch", "type int", "got True")),
        (lambda state: state.update(epoch=2.0), ("entry epoch", "type int", "got 2.0")),
        (lambda state: state.update(epoch=1), ("entry rows", "epochs 1 to 1")),
        (lambda state: state.update(epoch=9, rows=[{"epoch": n} for n in range(1, 10)]), ("entry epoch", "at most 3")),
        (lambda state: state.update(seconds=float("nan")), ("entry seconds", "finite")),
        (lambda state: state["rows"][0].update(loss="0.5"), ("entry rows", "numbers", "loss")),
        (lambda state: state.pop("devices"), ("entry devices", "type list", "got None")),
        (lambda state: state.update(config="{"), ("entry config", "JSON")),
        (lambda state: state.update(data="mine"), ("entry data", "fingerprint")),
        (in_moment(lambda moment: moment.flatten()[:1].clone()), ("optimizer.state.3.exp_avg", "(1,)")),
        (in_moment(torch.Tensor.half), ("optimizer.state.3.exp_avg", "float16")),
        (in_moment(lambda moment: moment * float("nan")), ("optimizer.state.3.exp_avg", "finite")),
        (lambda state: state["optimizer"]["param_groups"].pop(), ("optimizer.param_groups",)),
        (lambda state: state["optimizer"]["param_groups"][0].update(lr=float("inf")), ("param_groups.0.lr", "finite")),
        (lambda state: state["scheduler"].update(last_epoch=5), ("scheduler.last_epoch", "be 6", "got 5")),
    ], 8),
)  # fmt: skip
def test_impossible_value_is_refused_by_the_name_of_its_entry(trained, fresh, change, words):
    state = state_of(trained)
    change(state)
    torch.save(state, fresh.folder / "checkpoint.pt")
    refused(fresh, *words)


def test_checkpoint_without_a_change_resumes(trained, fresh):
    torch.save(state_of(trained), fresh.folder / "checkpoint.pt")
    assert fresh.resume()
    assert fresh.epoch == 2


def test_checkpoint_before_the_first_epoch_resumes(fresh):
    fresh.save()
    assert fresh.resume()


def test_compressed_or_oversized_archive_is_refused_before_it_is_unpacked(trained, fresh, monkeypatch):
    path = fresh.folder / "checkpoint.pt"
    with (
        zipfile.ZipFile(trained.folder / "checkpoint.pt") as old,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    refused(fresh, "compressed")
    monkeypatch.setattr(checkpoint, "MOST_PICKLED", 2**20)
    state = state_of(trained)
    for bomb, words in ((torch.zeros(2**22)[:1], "its tensors need"), (list(range(2**20)), "beside the values")):
        torch.save({**state, "bomb": bomb}, path)
        refused(fresh, words)


def test_checkpoint_of_format_2_resumes_on_its_images(trained, fresh):
    state = state_of(trained)
    images = trained.data.images
    state["format"], state["data"] = 2, f"{images.shape} {images.dtype} {int(images.sum(dtype='uint64'))}"
    torch.save(state, fresh.folder / "checkpoint.pt")
    refused(Run(make_phantoms(48, 32, seed=1), fresh.config, fresh.folder), "images are others")
    assert fresh.resume()


def test_other_labels_are_refused_for_training_and_allowed_for_evaluation(trained):
    data = replace(trained.data, labels=np.roll(trained.data.labels, 1, axis=0))
    run = Run(data, trained.config, trained.folder)
    refused(run, "their labels are others")
    assert run.resume(images_only=True)


def test_link_to_a_checkpoint_that_is_gone_is_refused(fresh):
    (fresh.folder / "checkpoint.pt").symlink_to("gone.pt")
    refused(fresh, "not a readable checkpoint")
