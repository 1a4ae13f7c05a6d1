"""States of version 2, of version 1 and of other libraries load, and training goes on as when they were written.

Version 0.1.0 (state version 2) wrote the files in `tests/states/`: a state, the tokens that followed, and the result of
that version.
"""

from pathlib import Path

import pytest
import torch

import vqssl
from tests.laws import assert_same_bits

FOLDER = Path(__file__).parent / "states"
OURS = sorted(path.stem for path in FOLDER.glob("version*_*.pt") if "multiscale" not in path.stem)
AGES = {"untrained": 0, "trained": 3, "codes_set": -1, "version1": -1}


def read(name):
    return torch.load(FOLDER / f"{name}.pt", weights_only=True)


def assert_goes_on_as_then(codebook, kept):
    """Indices, codes, counts, sums and draws are those that version 0.1.0 came to."""
    for x, indices in zip(kept["tokens"], kept["indices"], strict=True):
        assert torch.equal(codebook(x).indices, indices)
    found = codebook.state_dict()
    for name, value in kept["after"].items():
        assert torch.equal(found[name], value), name


def build(options):
    options = dict(options)
    revival = vqssl.BatchRevival(threshold=options.pop("revival_threshold"))
    return vqssl.EMACodebook(revival=revival, **options)


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("versions", [True, False])
def test_an_older_state_loads_and_training_goes_on(name, versions):
    """Also where the file keeps no version numbers, as safetensors does."""
    kept = read(name)
    codebook = build(kept["options"])
    codebook.load_state_dict(kept["state"] if versions else dict(kept["state"]))
    for key, value in kept["state"].items():
        assert torch.equal(codebook.state_dict()[key], value)
    age = next(age for part, age in AGES.items() if part in name.split("_", 2) or name.endswith(part))
    assert codebook.num_updates.item() == age
    assert_goes_on_as_then(codebook, kept)
    updates = len(kept["tokens"])
    assert codebook.num_updates.item() == (-1 if age < 0 else age + updates)


def test_an_older_multi_scale_state_loads_and_training_goes_on():
    kept = read("version2_multiscale")
    quantizer = vqssl.MultiScaleQuantizer(
        [2, 3], codebook_size=6, dim=2, decay=0.8, revival=vqssl.BatchRevival(threshold=0.5), seed=5
    )
    quantizer.load_state_dict(kept["state"])
    assert [quantizer.codebook(scale).num_updates.item() for scale in range(2)] == [3, 3]
    for maps, indices in zip(kept["maps"], kept["indices"], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(quantizer(maps).indices, indices, strict=True))
    found = quantizer.state_dict()
    for name, value in kept["after"].items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("library", ["vector_quantize_pytorch", "encodec"])
def test_a_state_of_another_library_loads_and_training_goes_on(library):
    kept = read(library)
    load = getattr(vqssl.interop, f"codebook_from_{library}")
    codebook = load(kept["state"], revival=vqssl.BatchRevival(threshold=0.5))
    for name, value in kept["loaded"].items():
        assert torch.equal(codebook.state_dict()[name], value), name
    assert codebook.num_updates.item() == -1
    assert_goes_on_as_then(codebook, kept)


def test_todays_state_loads_to_the_bit():
    codebook = vqssl.EMACodebook(codebook_size=6, dim=2, seed=4)
    for _ in range(3):
        codebook(torch.randn(20, 2))
    other = vqssl.EMACodebook(codebook_size=6, dim=2)
    other.load_state_dict(codebook.state_dict())
    assert_same_bits(other.state_dict(), codebook.state_dict())
    assert other.num_updates.item() == 3


def test_num_updates_counts_since_the_counts_started_at_one():
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
