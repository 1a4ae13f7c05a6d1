"""Codebooks are found in modules, states and files, each once and under one name."""

import argparse
import copy
from typing import Any

import pytest
import torch
from torch import nn

from tests.laws import through_file
from vqssl import BatchRevival, EMACodebook, MultiScaleQuantizer, NoRevival, save
from vqssl.health import examine, find_codebooks, read_checkpoint


class Model(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.encoder = nn.Linear(4, 4)
        self.quantizer = MultiScaleQuantizer([4, 4], codebook_size=[8, 5], dim=4, **options)
        self.alone = EMACodebook(codebook_size=3, dim=2)


NAMES = ["quantizer.codebooks.0", "quantizer.codebooks.1", "alone"]


class Wrapped(nn.Module):
    """A wrapper like DataParallel and DistributedDataParallel."""

    def __init__(self, module):
        super().__init__()
        self.module = module


def compiled(module) -> Any:
    return torch.compile(module)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch.compile's own
@pytest.mark.parametrize(
    "wrap",
    [
        lambda m: m,
        lambda m: m.state_dict(),
        lambda m: {
            "model": m.state_dict(),
            "epoch": 3,
            "optimizer": {"state": {0: {"step": torch.ones(())}}, "groups": [{}]},
        },
        lambda m: {"outer": {"state_dict": m.state_dict()}, "rows": [{"embed": 1.0}], "none": None},
        lambda m: [{"model": m.state_dict()}][0],
        lambda m: {"models": [m.state_dict()]},
        lambda m: through_file({"model": m.state_dict(), "config": "{}"}),
        Wrapped,
        lambda m: {"model": Wrapped(m).state_dict()},
        compiled,
        lambda m: {"model": m, "epoch": 3},
        lambda m: {"models": [Wrapped(m)]},
        lambda m: {"state_dict": compiled(Wrapped(m)).state_dict()},
    ],
    ids=[
        "module",
        "state",
        "checkpoint",
        "deep",
        "list",
        "listed",
        "file",
        "wrapped",
        "wrapped state",
        "compiled",
        "held",
        "listed modules",
        "both",
    ],
)
def test_names_and_values_are_those_of_the_module(wrap):
    model = Model()
    found = find_codebooks(wrap(model))
    assert list(found) == NAMES
    for name, codebook in find_codebooks(model).items():
        assert found[name].embed.equal(codebook.embed)
        assert found[name].cluster_size.equal(codebook.cluster_size)
        assert found[name].initialized == codebook.initialized
        assert found[name].updates == codebook.updates


def test_codebooks_in_ddp_are_found(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(Model())
        assert list(find_codebooks(model)) == NAMES
        assert list(find_codebooks(model.state_dict())) == NAMES
    finally:
        torch.distributed.destroy_process_group()


def test_file_of_save_holds_the_options(tmp_path):
    file = tmp_path / "codes.safetensors"
    model = MultiScaleQuantizer([4, 4], codebook_size=8, dim=4, decay=0.8, metric="cosine", revival=BatchRevival(0.2))
    save(model, file)
    found = find_codebooks(read_checkpoint(file))
    assert list(found) == ["codebooks.0", "codebooks.1"]
    for name, codebook in find_codebooks(model).items():
        assert found[name][2:] == codebook[2:]
        assert (found[name].decay, found[name].threshold, found[name].metric) == (0.8, 0.2, "cosine")
    assert examine(read_checkpoint(file), since=read_checkpoint(file), decay=0.5)["codebooks.1"].decay == 0.8


def test_damaged_file_of_save_is_measured_without_options(tmp_path):
    codebook = EMACodebook(codebook_size=8, dim=4, decay=0.8)
    codebook.set_codes_(torch.randn(8, 4))
    codebook.embed[0] = torch.nan
    save(codebook, tmp_path / "codes.safetensors")
    report = examine(read_checkpoint(tmp_path / "codes.safetensors"))["codebook"]
    assert (report.not_finite, report.level, report.decay) == (1, "act", 0.99)


def test_codebook_itself_is_named_codebook():
    codebook = EMACodebook(codebook_size=8, dim=4)
    for source in (codebook, codebook.state_dict(), {"model": codebook.state_dict()}, Wrapped(codebook)):
        assert list(find_codebooks(source)) == ["codebook"]


def test_shared_codebooks_are_found_once():
    model = nn.ModuleDict({"a": EMACodebook(codebook_size=8, dim=4)})
    model["b"] = model["a"]
    assert list(find_codebooks(model)) == ["a"]
    assert list(find_codebooks(model.state_dict())) == ["a"]
    assert list(find_codebooks(through_file(model.state_dict()))) == ["a"]
    assert list(find_codebooks(MultiScaleQuantizer([4, 4], codebook_size=8, dim=4, shared=True))) == ["codebooks.0"]
    # A copy is equal but not shared.
    model["b"] = copy.deepcopy(model["a"])
    assert list(find_codebooks(model)) == list(find_codebooks(model.state_dict())) == ["a", "b"]


def test_two_containers_keep_their_names():
    model = EMACodebook(codebook_size=8, dim=4)
    assert list(find_codebooks({"model": model.state_dict(), "ema": copy.deepcopy(model).state_dict()})) == [
        "model",
        "ema",
    ]


def test_wrapper_names_stay_if_they_distinguish_codebooks():
    state = EMACodebook(codebook_size=8, dim=4).state_dict()
    both = {f"{prefix}.{key}": value.clone() for prefix in ("q", "_orig_mod.q") for key, value in state.items()}
    assert list(find_codebooks(both)) == ["q", "_orig_mod.q"]


@pytest.mark.parametrize(
    ("tree", "names"),
    [
        (lambda s: {1: s(), "1": s()}, ["1", "1#2"]),
        (lambda s: {"a": {"b": s()}, "a.b": s()}, ["a.b", "a.b#2"]),
        (lambda s: {"a": {"b": s()}, "a.b": s(), "a.b#2": s()}, ["a.b", "a.b#3", "a.b#2"]),
        (lambda s: {"x": [s()], "x.0": s()}, ["x.0", "x.0#2"]),
        (lambda s: {"a": {"module": s()}, "b": {"_orig_mod": s()}, "b.": s()}, None),
    ],
)
def test_equal_names_are_numbered(tree, names):
    made = []

    def state():
        made.append(EMACodebook(codebook_size=8, dim=4, seed=len(made)).state_dict())
        return made[-1]

    found = find_codebooks(tree(state))
    assert len(found) == len(made)
    assert names is None or list(found) == names
    for codebook, one in zip(found.values(), made, strict=True):
        assert codebook.embed.equal(one["embed"])


def test_updates_are_counted_since_the_first_codes():
    codebook = EMACodebook(codebook_size=8, dim=4)
    assert find_codebooks(codebook)["codebook"].updates == 0
    for step in range(4):
        codebook(torch.randn(16, 4))
        assert find_codebooks(codebook)["codebook"].updates == step + 1
    codebook.eval()(torch.randn(16, 4))
    assert find_codebooks(codebook.state_dict())["codebook"].updates == 4


@pytest.mark.parametrize(
    ("entries", "updates"),
    [
        ({"num_updates": 7, "rng": [0, 3]}, 7),  # version 3: the buffer, whatever was drawn
        ({"num_updates": 0, "rng": [0, 900]}, 0),
        ({"num_updates": -1, "rng": [0, 900]}, None),
        ({"num_updates": 7}, 7),
        ({"rng": [0, 9]}, 7),  # version 2: draws, less those of construction and of the first codes
        ({"rng": [0, 2]}, 0),
        ({"rng": [0, 1]}, None),  # trained counts that no draw of this state accounts for
        ({"rng": [0, 3 - 2**62]}, None),
        ({}, None),  # version 1
    ],
)
def test_updates_are_read_from_every_version_of_the_state(entries, updates):
    state = {"embed": torch.randn(8, 4), "cluster_size": torch.arange(8.0), "initialized": torch.tensor(True)}
    state |= {key: torch.tensor(value) for key, value in entries.items()}
    assert find_codebooks(state)["codebook"].updates == updates
    assert find_codebooks({f"q.{key}": value for key, value in state.items()})["q"].updates == updates
    # Counts of one each had no update, even if the state does not say so.
    assert find_codebooks(state | {"cluster_size": torch.ones(8)})["codebook"].updates == (updates or 0)


def test_updates_of_a_module_are_those_of_its_buffer():
    codebook = EMACodebook(codebook_size=8, dim=4)
    codebook(torch.randn(16, 4))
    for value, updates in ((7, 7), (-1, None)):
        codebook.register_buffer("num_updates", torch.tensor(value))
        assert find_codebooks(codebook)["codebook"].updates == updates


@pytest.mark.parametrize(
    ("revival", "revives", "threshold"),
    [(None, False, None), (NoRevival(), False, None), (BatchRevival(0.3), True, 0.3)],
)
def test_module_knows_what_a_state_does_not(revival, revives, threshold):
    codebook = EMACodebook(codebook_size=8, dim=4, decay=0.7, revival=revival)
    found = find_codebooks(codebook)["codebook"]
    assert (found.decay, found.revives, found.threshold) == (0.7, revives, threshold)
    silent = find_codebooks(codebook.state_dict())["codebook"]
    assert (silent.decay, silent.revives, silent.threshold) == (None, None, None)
    assert examine(codebook)["codebook"].dead_below == (threshold or 0.1)
    assert examine(codebook.state_dict(), decay=0.5)["codebook"].decay == 0.5


@pytest.mark.parametrize(("heads", "names"), [(1, ["vq._codebook"]), (2, ["vq._codebook.head0", "vq._codebook.head1"])])
def test_heads_of_other_libraries_are_separate_codebooks(heads, names):
    state = {
        "vq._codebook.initted": torch.tensor([True]),
        "vq._codebook.embed": torch.randn(heads, 8, 4),
        "vq._codebook.cluster_size": torch.rand(heads, 8),
        "vq._codebook.embed_avg": torch.randn(heads, 8, 4),
    }
    found = find_codebooks(state)
    assert list(found) == names
    for head, codebook in enumerate(found.values()):
        assert codebook.embed.equal(state["vq._codebook.embed"][head])
        assert codebook.cluster_size.equal(state["vq._codebook.cluster_size"][head])
        assert (codebook.initialized, codebook.updates) == (True, None)
    state["vq._codebook.initted"] = torch.tensor([0.0])
    assert not any(codebook.initialized for codebook in find_codebooks(state).values())


def test_module_of_another_library_is_searched_by_its_state():
    peer = pytest.importorskip("vector_quantize_pytorch")
    module = nn.Sequential(peer.VectorQuantize(4, codebook_size=8))
    module(torch.randn(1, 50, 4))
    found = find_codebooks(module)
    assert list(found) == ["0._codebook"]
    assert found["0._codebook"].embed.shape == (8, 4)


def test_state_without_flags_counts_as_initialised():
    whole = EMACodebook(codebook_size=8, dim=4).state_dict()
    state = {key: value for key, value in whole.items() if key not in ("initialized", "rng", "num_updates")}
    found = find_codebooks(state)["codebook"]
    assert (found.initialized, found.updates) == (True, 0)  # counts of one each are new
    state["cluster_size"] = torch.arange(8.0)
    found = find_codebooks(state)["codebook"]
    assert (found.initialized, found.updates) == (True, None)


# ---- files ----


def test_checkpoint_files_are_read(tmp_path):
    model = Model()
    torch.save({"model": model.state_dict(), "epoch": 2}, tmp_path / "checkpoint.pt")
    assert list(find_codebooks(read_checkpoint(tmp_path / "checkpoint.pt"))) == NAMES
    assert list(find_codebooks(read_checkpoint(str(tmp_path / "checkpoint.pt")))) == NAMES
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file(model.state_dict(), tmp_path / "codes.safetensors")
    found = find_codebooks(read_checkpoint(tmp_path / "codes.safetensors"))
    assert sorted(found) == sorted(NAMES)
    assert all(found[name].embed.equal(codebook.embed) for name, codebook in find_codebooks(model).items())


def test_unreadable_files_are_refused_with_the_reason(tmp_path, monkeypatch):
    def refused(name, says, error=ValueError):
        with pytest.raises(error, match=says):
            read_checkpoint(tmp_path / name)

    refused("nowhere.pt", "must be a file, got .*nowhere.pt.*check the path")
    refused("", "must be a file, got .* which is a folder")
    (tmp_path / "text.pt").write_text("no checkpoint")
    refused("text.pt", r"must be a file of torch.save, .*text.pt.*write it as torch.save\(model.state_dict\(\), path\)")
    torch.save({"model": Model().state_dict(), "config": argparse.Namespace(lr=0.1)}, tmp_path / "config.pt")
    refused("config.pt", r"got objects of argparse.Namespace in .*torch.save\(model.state_dict\(\), path\): tensors")
    torch.save(
        {"model": Model().state_dict(), "config": argparse.Namespace()},
        tmp_path / "old.pt",
        _use_new_zipfile_serialization=False,
    )
    refused("old.pt", r"torch.save\(model.state_dict\(\), path\)")
    torch.save(Model(), tmp_path / "whole.pt")
    refused("whole.pt", "tensors, not the module itself")
    torch.save([torch.ones(2)], tmp_path / "list.pt")
    refused("list.pt", "must hold a dictionary, got list")
    (tmp_path / "text.safetensors").write_text("no checkpoint")
    pytest.importorskip("safetensors")
    refused("text.safetensors", "safetensors.torch.save_file")
    monkeypatch.setitem(__import__("sys").modules, "safetensors.torch", None)
    refused("text.safetensors", "pip install safetensors", ImportError)


# ---- refusals ----


@pytest.mark.parametrize(
    ("error", "says", "source"),
    [
        (TypeError, "module or a state dict, got str: .*read_checkpoint", "checkpoint.pt"),
        (TypeError, "got list", [EMACodebook(codebook_size=8, dim=4)]),
        (ValueError, "a Linear with none", nn.Linear(2, 2)),
        (ValueError, "a dict of 'a', 1 with none", {"a": 1, 1: {}}),
        (ValueError, "a dict of nothing with none", {}),
        (ValueError, "with none", {"embed": torch.ones(8, 4)}),
        (ValueError, "with none", {"embed": [1], "cluster_size": torch.ones(1)}),
        (ValueError, "with none", {"pos_embed": torch.ones(8, 4), "pos_cluster_size": torch.ones(8)}),
        (ValueError, r"cluster_size \(7,\)", {"embed": torch.ones(8, 4), "cluster_size": torch.ones(7)}),
        (ValueError, r"embed \(2, 8, 4\)", {"embed": torch.ones(2, 8, 4), "cluster_size": torch.ones(8)}),
        (ValueError, "torch.int64", {"embed": torch.ones(8, 4).long(), "cluster_size": torch.ones(8)}),
        (ValueError, r"\(0, 4\)", {"embed": torch.ones(0, 4), "cluster_size": torch.ones(0)}),
        (ValueError, "meta device: load a state first", EMACodebook(codebook_size=8, dim=4, device="meta")),
    ],
)
def test_source_without_codebook_is_refused(error, says, source):
    with pytest.raises(error, match=says):
        find_codebooks(source)
