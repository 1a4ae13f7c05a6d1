"""tokens: shards of codes with names; a run that is killed anywhere ends with the bytes of one that is not."""

import itertools
import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import vqssl
from vqssl import atomic_file
from vqssl.tokenising import TokenFiles, tokens

COUNT, SIZE = 23, 7


class Encoder(nn.Module):
    """A convolution and a codebook: codes `(B, H, W)`."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(1, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.quantizer = vqssl.ChannelsFirst(vqssl.EMACodebook(codebook_size=16, dim=8, seed=seed))
        for _ in range(2):
            self(torch.randn(8, 1, 6, 6))

    def forward(self, x):
        return self.quantizer(self.norm(self.conv(x)))


def images(count=COUNT, seed=0):
    return torch.randn(count, 1, 6, 6, generator=torch.Generator().manual_seed(seed))


class Named(torch.utils.data.Dataset):
    def __init__(self, x):
        self.x = x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, number):
        return self.x[number], f"image-{number}"


def loader_of(x, batch_size=4, **options):
    return DataLoader(Named(x), batch_size=batch_size, **options)


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def read(path):
    with np.load(path) as shard:
        return dict(shard)


@pytest.fixture(scope="module")
def model():
    return Encoder()


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """Return the files of a run without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    tokens(model, loader_of(images()), folder, shard_size=SIZE)
    return bytes_of(folder)


# ---- what is written ----


def test_shards_hold_names_and_codes_in_order(model, tmp_path):
    written = tokens(model, loader_of(images()), tmp_path, shard_size=SIZE)
    assert isinstance(written, TokenFiles)
    assert written.samples == COUNT
    assert [path.name for path in written.files] == ["00000.npz", "00001.npz", "00002.npz"]
    shards = [read(path) for path in written.files]
    assert [len(shard["names"]) for shard in shards] == [8, 8, 7]  # full batches of 4, at least 7
    assert np.concatenate([shard["names"] for shard in shards]).tolist() == [f"image-{n}" for n in range(COUNT)]
    expected = model.eval()(images()).indices
    model.train()
    assert np.array_equal(np.concatenate([shard["codes"] for shard in shards]), expected.numpy())
    assert all(shard["codes"].dtype == np.int32 for shard in shards)


def test_model_is_unchanged_and_in_its_mode_again(model, tmp_path):
    model.norm.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [part.training for part in model.modules()]
    tokens(model, loader_of(images()), tmp_path)
    assert [part.training for part in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.norm.train()
    with pytest.raises(ZeroDivisionError):
        tokens(model, ((x / (1 // 0), names) for x, names in loader_of(images())), tmp_path / "other")
    assert model.training


@pytest.mark.parametrize(
    ("quantizer", "x", "shapes"),
    [
        (vqssl.ResidualQuantizer(codebook_size=8, dim=4, num_levels=3), torch.randn(3, 5, 4), {"codes": (3, 5, 3)}),
        (vqssl.RandomProjectionQuantizer(in_dim=4, codebook_size=8, dim=2), torch.randn(3, 5, 4), {"codes": (3, 5, 1)}),
        (
            vqssl.MultiScaleQuantizer([4, 6], codebook_size=8, dim=4),
            [torch.randn(3, 4, 5, 5), torch.randn(3, 6, 2, 2)],
            {"codes_0": (3, 5, 5), "codes_1": (3, 2, 2)},
        ),
        (lambda x: x.argmax(-1), torch.randn(3, 5, 4), {"codes": (3, 5)}),
        (lambda x: [x.argmax(-1), x.argmin(1)], torch.randn(3, 5, 4), {"codes_0": (3, 5), "codes_1": (3, 4)}),
    ],
    ids=["residual", "random projection", "scales", "function", "list"],
)
@pytest.mark.filterwarnings("ignore:.*quantises by random codes")
def test_results_of_all_quantisers_are_taken(quantizer, x, shapes, tmp_path):
    written = tokens(quantizer, [(x, torch.tensor([5, 6, 7]))], tmp_path)
    shard = read(written.files[0])
    assert shard["names"].tolist() == ["5", "6", "7"]
    assert {name: shard[name].shape for name in shard if name != "names"} == shapes


def test_batches_of_other_shapes_are_padded_with_minus_one(tmp_path):
    batches = [(torch.ones(2, 3, dtype=torch.long), ["a", "b"]), (torch.zeros(1, 5, dtype=torch.long), ["c"])]
    written = tokens(lambda x: x, batches, tmp_path)
    assert read(written.files[0])["codes"].tolist() == [[1, 1, 1, -1, -1], [1, 1, 1, -1, -1], [0, 0, 0, 0, 0]]
    (tmp_path / "tokens.json").write_text(
        (tmp_path / "tokens.json").read_text().replace('"finished": true', '"finished": false')
    )
    assert tokens(lambda x: x, batches, tmp_path) == written


def test_progress_wraps_the_loader(model, tmp_path):
    seen = []

    def progress(batches):
        seen.append(len(batches))
        return batches

    tokens(model, loader_of(images()), tmp_path, progress=progress)
    assert seen == [6]


# ---- resume ----


def test_repeated_run_gives_the_same_bytes(model, whole, tmp_path):
    tokens(model, loader_of(images()), tmp_path, shard_size=SIZE)
    assert bytes_of(tmp_path) == whole


@pytest.mark.parametrize("stops", list(itertools.product(range(8), ["before", "within", "after"])))
def test_run_that_stops_at_any_write_resumes_to_the_same_bytes(stops, model, whole, tmp_path, monkeypatch):
    """A kill between two system calls leaves what these leave: nothing, half of a file, or all of it."""
    number, when = stops
    write, calls = atomic_file.write_atomically, itertools.count()

    def stopping(path, data):
        if next(calls) == number:
            if when == "within":
                path.with_name(f".{path.name}.0123456789ab.partial").write_bytes(data[: len(data) // 2])
            if when == "after":
                write(path, data)
            raise KeyboardInterrupt
        write(path, data)

    with monkeypatch.context() as patched:
        patched.setattr("vqssl.token_folder.write_atomically", stopping)
        with pytest.raises(KeyboardInterrupt):
            tokens(model, loader_of(images()), tmp_path, shard_size=SIZE)
    tokens(model, loader_of(images()), tmp_path, shard_size=SIZE)
    assert bytes_of(tmp_path) == whole


def test_finished_shards_are_not_computed_again(model, whole, tmp_path):
    def stop_at(number):
        for count, batch in enumerate(loader_of(images())):
            if count == number:
                raise KeyboardInterrupt
            yield batch

    with pytest.raises(KeyboardInterrupt):
        tokens(model, stop_at(5), tmp_path, shard_size=SIZE)
    calls = []
    hook = model.register_forward_hook(lambda *_: calls.append(1))
    tokens(model, loader_of(images()), tmp_path, shard_size=SIZE)
    assert len(calls) == 2 + 2  # the first batch of each of two shards, and the two batches that were left
    calls.clear()
    assert tokens(model, loader_of(images()), tmp_path, shard_size=SIZE).samples == COUNT
    assert len(calls) == 1
    hook.remove()
    assert bytes_of(tmp_path) == whole


KILLED = """
import os, signal, sys
import torch
from tests.test_tokenising import SIZE, Encoder, images, loader_of
from vqssl import tokens

calls = 0
def kill_at_fifth(*_):
    global calls
    calls += 1
    if calls == 5:
        os.kill(os.getpid(), signal.SIGKILL)

model = Encoder()
model.register_forward_hook(kill_at_fifth)
tokens(model, loader_of(images()), sys.argv[1], shard_size=SIZE)
"""


@pytest.mark.thorough
def test_killed_process_resumes_to_the_same_bytes(model, whole, tmp_path):
    root = Path(__file__).parent.parent
    answer = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=root, capture_output=True, text=True)
    assert answer.returncode == -signal.SIGKILL, answer.stderr
    assert 0 < len(list(tmp_path.glob("*.npz"))) < 3
    tokens(model, loader_of(images()), tmp_path, shard_size=SIZE)
    assert bytes_of(tmp_path) == whole


# ---- refusals ----


def unfinished(model, folder):
    tokens(model, loader_of(images()), folder, shard_size=SIZE)
    listed = json.loads((folder / "tokens.json").read_text())
    (folder / listed["shards"].pop()["file"]).unlink()
    (folder / "tokens.json").write_text(json.dumps({**listed, "finished": False}, indent=1) + "\n")


@pytest.mark.parametrize("finish", [True, False])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"loader": loader_of(images(), batch_size=3)}, "finished folder|names in another order or batch size"),
        ({"loader": [*loader_of(images())][1:]}, "finished folder|names in another order"),
        ({"loader": loader_of(images(seed=1))}, "other codes of the same names: give the same model, data and device"),
        ({"model": Encoder(seed=1)}, "of another model: give another folder"),
        ({"model": lambda x: x[:, 0].long()}, "of another model"),
        ({"shard_size": 8}, "shard_size 7, not 8: give another folder"),
        ({"file_format": "parquet"}, "file_format 'npz', not 'parquet'|needs pyarrow"),
    ],
    ids=["batch size", "batches", "data", "model", "function", "shard size", "format"],
)
def test_folder_of_another_call_is_refused(change, words, finish, model, tmp_path):
    if finish:
        tokens(model, loader_of(images()), tmp_path, shard_size=SIZE)
    else:
        unfinished(model, tmp_path)
    before = bytes_of(tmp_path)
    call = {"model": model, "loader": loader_of(images()), "out": tmp_path, "shard_size": SIZE, **change}
    with pytest.raises((ValueError, ImportError), match=words):
        tokens(**call)
    assert bytes_of(tmp_path) == before


@pytest.mark.parametrize("batch_size", [4, 1])
def test_labels_for_names_are_refused_and_nothing_is_written(batch_size, model, tmp_path):
    """A loader of (images, labels): whole numbers would pass for names."""
    x, labels = images(), torch.arange(COUNT) % 3
    loader = [*zip(x.split(batch_size), labels.split(batch_size), strict=True)]
    with pytest.raises(ValueError, match=r"names must tell samples apart, got '\d' twice: .* not its label"):
        tokens(model, loader, tmp_path / "new", shard_size=SIZE)
    assert not list(tmp_path.glob("new/*.npz"))
    numbered = [*zip(x.split(batch_size), torch.arange(COUNT).split(batch_size), strict=True)]
    assert tokens(model, numbered, tmp_path / "numbered", shard_size=SIZE).samples == COUNT


def test_later_batch_of_another_loader_is_refused(model, tmp_path):
    unfinished(model, tmp_path)
    batches = [*loader_of(images())]
    batches[1] = (batches[1][0], ["other", *batches[1][1][1:]])
    with pytest.raises(ValueError, match="names in another order"):
        tokens(model, batches, tmp_path, shard_size=SIZE)


def test_folder_with_other_files_is_refused(model, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="with other files in it"):
        tokens(model, loader_of(images()), tmp_path)
    (tmp_path / "tokens.json").write_text("{}")
    with pytest.raises(ValueError, match="must be a list that vqssl"):
        tokens(model, loader_of(images()), tmp_path)


@pytest.mark.parametrize(
    ("model", "loader", "options", "error", "words"),
    [
        (
            None,
            DataLoader(TensorDataset(images())),
            {},
            TypeError,
            r"batch 0 must be a pair of input and names, got a list of 1",
        ),
        (None, [(images(2), 3)], {}, TypeError, "names of batch 0 must be strings or integers"),
        (None, [(images(2), ["a"])], {}, ValueError, r"one entry for each of the 1 names.*\(2, 4, 4\)"),
        (
            lambda x: x,
            [(images(2), ["a", "b"])],
            {},
            TypeError,
            r"codes must be an integer tensor.*such as the \.indices",
        ),
        (lambda x: x.long() + 2**31, [(images(1), ["a"])], {}, ValueError, "must fit 32 bits"),
        (None, [], {"file_format": "csv"}, ValueError, "file_format must be one of 'npz', 'parquet', got 'csv'"),
        (None, [], {"shard_size": 0}, ValueError, "shard_size must be at least 1"),
    ],
)
def test_refusals_say_what_to_write(model, loader, options, error, words, tmp_path):
    with pytest.raises(error, match=words):
        tokens(Encoder() if model is None else model, loader, tmp_path, **options)


def test_call_that_failed_before_its_first_shard_leaves_the_folder_to_another(model, whole, tmp_path):
    with pytest.raises(TypeError, match="pair of input and names"):
        tokens(Encoder(seed=1), [images(2)], tmp_path, shard_size=3)
    tokens(model, loader_of(images()), tmp_path, shard_size=SIZE)
    assert bytes_of(tmp_path) == whole


def test_empty_loader_gives_no_shard(model, tmp_path):
    assert tokens(model, [], tmp_path) == TokenFiles((), 0)
