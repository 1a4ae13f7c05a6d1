"""States of version 3, 2 and 1 and of other libraries load, and training continues as when they were written.

Version 0.1.0 (state version 2) wrote the files in `tests/states/`: a state, the tokens that followed, and what that
version made of them.
"""

import copy
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import vqssl
from tests.laws import assert_same_bits

FOLDER = Path(__file__).parent / "states"
OURS = sorted(path.stem for path in FOLDER.glob("version*_*.pt") if "multiscale" not in path.stem)
AGES = {"untrained": 0, "trained": 3, "codes_set": -1, "version1": -1}


def read(name):
    return torch.load(FOLDER / f"{name}.pt", weights_only=True)


def age_in(name):
    """Return the `num_updates` that the state of this file has to get; -1 is unknown."""
    return next(age for part, age in AGES.items() if part in name.split("_", 2) or name.endswith(part))


def assert_continues_as_before(codebook, kept):
    """Assert that indices, codes, counts, sums and draws are those of version 0.1.0."""
    for x, indices in zip(kept["tokens"], kept["indices"], strict=True):
        assert torch.equal(codebook(x).indices, indices)
    found = codebook.state_dict()
    for name, value in kept["after"].items():
        assert torch.equal(found[name], value), name


def build(options):
    options = dict(options)
    revival = vqssl.BatchRevival(threshold=options.pop("revival_threshold"))
    return vqssl.EMACodebook(revival=revival, **options)


def build_multiscale():
    return vqssl.MultiScaleQuantizer(
        [2, 3], codebook_size=6, dim=2, decay=0.8, revival=vqssl.BatchRevival(threshold=0.5), seed=5
    )


def without_versions(state):
    """Return a plain dictionary: torch keeps version numbers in an attribute of its own."""
    return dict(state)


def through_safetensors(state):
    return safetensors.torch.load(safetensors.torch.save(dict(state)))


# ---- older versions ----


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("form", [lambda state: state, without_versions, through_safetensors])
def test_older_state_loads_and_training_continues(name, form):
    kept = read(name)
    codebook = build(kept["options"])
    codebook.load_state_dict(form(kept["state"]))
    for key, value in kept["state"].items():
        assert torch.equal(codebook.state_dict()[key], value)
    age = age_in(name)
    assert codebook.num_updates.item() == age
    assert codebook.births.tolist() == [0] * 6
    assert_continues_as_before(codebook, kept)
    assert codebook.num_updates.item() == (-1 if age < 0 else age + len(kept["tokens"]))


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize(("form", "assign"), [(without_versions, False), (through_safetensors, True)])
def test_older_state_loads_strictly_inside_a_larger_model(name, form, assign):
    kept = read(name)
    model = nn.ModuleDict({"encoder": nn.Linear(3, 2), "vq": nn.Sequential(build(kept["options"]))})
    state = {f"encoder.{key}": torch.ones_like(value) for key, value in model["encoder"].state_dict().items()}
    state |= {f"vq.0.{key}": value for key, value in kept["state"].items()}
    state = form(state)
    names = set(state)
    found = model.load_state_dict(state, strict=True, assign=assign)
    assert (found.missing_keys, found.unexpected_keys) == ([], [])
    assert set(state) == names, "the caller's dictionary has changed"
    assert torch.equal(model["encoder"].weight, torch.ones(2, 3))
    assert model["vq"][0].num_updates.item() == age_in(name)
    assert_continues_as_before(model["vq"][0], kept)


@pytest.mark.parametrize("inside", [False, True])
def test_older_multi_scale_state_loads_and_training_continues(inside):
    kept = read("version2_multiscale")
    quantizer = build_multiscale()
    if inside:
        model = nn.ModuleDict({"quantizer": quantizer})
        model.load_state_dict({f"quantizer.{key}": value for key, value in kept["state"].items()}, strict=True)
    else:
        quantizer.load_state_dict(kept["state"])
    assert [quantizer.codebook(scale).num_updates.item() for scale in range(2)] == [3, 3]
    for maps, indices in zip(kept["maps"], kept["indices"], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(quantizer(maps).indices, indices, strict=True))
    found = quantizer.state_dict()
    for name, value in kept["after"].items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("library", ["vector_quantize_pytorch", "encodec"])
def test_state_of_another_library_loads_and_training_continues(library):
    kept = read(library)
    load = getattr(vqssl.interop, f"codebook_from_{library}")
    codebook = load(kept["state"], revival=vqssl.BatchRevival(threshold=0.5))
    for name, value in kept["loaded"].items():
        assert torch.equal(codebook.state_dict()[name], value), name
    assert codebook.num_updates.item() == -1
    assert_continues_as_before(codebook, kept)


# ---- versions 3 and 4 ----


@pytest.mark.parametrize("form", [lambda state: state, without_versions, through_safetensors])
@pytest.mark.parametrize("assign", [False, True])
def test_version_3_loads_without_births(form, assign):
    """Version 3 has all of version 4 but the births, which start at zero."""
    codebook = vqssl.EMACodebook(codebook_size=6, dim=2, decay=0.5, revival=vqssl.BatchRevival(threshold=0.9))
    for _ in range(4):
        codebook(torch.randn(20, 2))
    assert codebook.births.sum() > 0
    state = copy.deepcopy(codebook.state_dict())  # assigned tensors are shared
    del state["births"]
    state._metadata[""]["version"] = 3
    other = vqssl.EMACodebook(codebook_size=6, dim=2, decay=0.5, revival=vqssl.BatchRevival(threshold=0.9))
    other(torch.randn(20, 2))
    other.load_state_dict(form(state), assign=assign)
    assert other.births.tolist() == [0] * 6
    codebook.births.zero_()
    x = torch.randn(20, 2)
    codebook(x)
    other(x)
    assert_same_bits(other.state_dict(), codebook.state_dict())


@pytest.mark.parametrize("form", [lambda state: state, without_versions, through_safetensors])
def test_state_of_today_loads_to_the_bit(form):
    codebook = vqssl.EMACodebook(codebook_size=6, dim=2, seed=4)
    for _ in range(3):
        codebook(torch.randn(20, 2))
    other = vqssl.EMACodebook(codebook_size=6, dim=2)
    other.load_state_dict(form(codebook.state_dict()))
    assert_same_bits(other.state_dict(), codebook.state_dict())
    assert other.num_updates.item() == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embed": None}, "Missing key.*embed"),
        ({"cluster_size": None}, "Missing key.*cluster_size"),
        ({"embed_avg": None}, "Missing key.*embed_avg"),
        ({"embed_average": torch.ones(6, 2)}, "Unexpected key.*embed_average"),
    ],
)
@pytest.mark.parametrize("version", [2, 3])
def test_strict_loading_refuses_missing_statistics_and_unknown_names(version, change, message):
    codebook = vqssl.EMACodebook(codebook_size=6, dim=2)
    state = {**codebook.state_dict(), **change}
    state = {name: value for name, value in state.items() if value is not None}
    if version == 2:
        del state["num_updates"]
    with pytest.raises(RuntimeError, match=message):
        codebook.load_state_dict(state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_assigned_half_precision_state_is_float32(dtype):
    codebook = vqssl.EMACodebook(codebook_size=6, dim=2)
    codebook(torch.randn(20, 2))
    state = {
        name: value.to(dtype) if value.is_floating_point() else value for name, value in codebook.state_dict().items()
    }
    codebook.load_state_dict(state, assign=True)
    assert codebook.embed.dtype == torch.float32
    codebook(torch.randn(20, 2))


def test_num_updates_counts_updates_since_the_counts_started_at_one():
    codebook, x = vqssl.EMACodebook(codebook_size=4, dim=2), torch.randn(9, 2)
    assert codebook.num_updates.item() == 0
    for step in range(3):
        codebook(x)
        assert codebook.num_updates.item() == step + 1
    codebook(x[:0])  # no valid token: no update
    codebook.eval()(x)
    codebook.train().freeze()(x)
    assert codebook.num_updates.item() == 3
    codebook.set_codes_(x[:4])
    assert codebook.num_updates.item() == 0
    codebook.freeze(False)(x)
    assert codebook.num_updates.item() == 1
    codebook.reset_parameters()
    assert codebook.num_updates.item() == 0


@pytest.mark.parametrize("name", ["version1_euclidean", "version2_euclidean_trained"])
def test_older_state_is_assigned_to_a_module_on_the_meta_device(name):
    kept = read(name)
    with torch.device("meta"):
        codebook = build(kept["options"])
    codebook.load_state_dict(kept["state"], assign=True)
    assert {tensor.device.type for tensor in codebook.state_dict().values()} == {"cpu"}
    assert_continues_as_before(codebook, kept)
