"""Codebooks of Mimi: sums over counts, as a loop. foreign.py tests transformers' model itself."""

from typing import Any

import pytest
import torch

from tests.laws import assert_same_bits, state_of
from vqssl import EMACodebook
from vqssl.interop import codebook_from_mimi, residual_quantizer_from_mimi

LEVEL = "quantizer.acoustic_residual_vector_quantizer.layers.{}.codebook."
SEMANTIC = "quantizer.semantic_residual_vector_quantizer.layers.0.codebook."
MOSHI = "quantizer.rvq_rest.vq.layers.{}._codebook."


def layer(seed=0, size=8, dim=4, initialized=True):
    generator = torch.Generator().manual_seed(seed)
    counts = torch.rand(size, generator=generator) * 9
    counts[:2] = torch.tensor([0.0, 1e-7])
    return {
        "initialized": torch.tensor([float(initialized)]),
        "cluster_usage": counts,
        "embed_sum": torch.randn(size, dim, generator=generator),
    }


def at(prefix, values):
    return {prefix + name: value for name, value in values.items()}


def test_codes_are_sums_over_counts_and_state_is_kept():
    theirs = layer()
    codebook = codebook_from_mimi(theirs)
    for k in range(8):
        count = max(theirs["cluster_usage"][k].item(), 1e-5)
        torch.testing.assert_close(codebook.embed[k], theirs["embed_sum"][k] / count)
    assert_same_bits(codebook.cluster_size, theirs["cluster_usage"])
    assert_same_bits(codebook.embed_avg, theirs["embed_sum"])
    assert bool(codebook.initialized)
    assert (codebook.decay, codebook.eps, codebook.commitment_weight) == (0.99, 1e-5, 1.0)


def test_training_moves_sums_and_counts_as_theirs():
    """Where counts are far from 0, smoothing and clamping do not matter."""
    theirs = layer(size=6)
    theirs["cluster_usage"].fill_(30.0)
    theirs["embed_sum"] *= 30
    codebook, x = codebook_from_mimi(theirs), torch.randn(200, 4)
    indices = torch.cdist(x, theirs["embed_sum"] / 30).argmin(1)
    assert codebook(x).indices.equal(indices)
    one_hot = torch.nn.functional.one_hot(indices, 6).float()
    counts = 0.99 * theirs["cluster_usage"] + 0.01 * one_hot.sum(0)
    sums = 0.99 * theirs["embed_sum"] + 0.01 * one_hot.T @ x
    torch.testing.assert_close(codebook.cluster_size, counts)
    torch.testing.assert_close(codebook.embed_avg, sums)
    torch.testing.assert_close(codebook.embed, sums / counts[:, None], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("names", ["transformers", "moshi"])
def test_levels_are_read_in_the_order_of_their_numbers(names):
    where = LEVEL if names == "transformers" else MOSHI
    layers = [layer(seed) for seed in range(12)]
    state = {"encoder.weight": torch.ones(2), **at(SEMANTIC, layer(99))}
    for number in sorted(range(12), key=str):  # as safetensors sorts them
        values = layers[number]
        if names == "moshi":
            values = {
                "_initialized": values["initialized"],
                "cluster_usage": values["cluster_usage"],
                "embedding_sum": values["embed_sum"],
            }
        state |= at(where.format(number), values)
    quantizer = residual_quantizer_from_mimi(state, where.partition("layers")[0], seed=5)
    assert quantizer.num_levels == 12
    for number, codebook in enumerate(quantizer.codebooks):
        assert_same_bits(codebook.embed_avg, layers[number]["embed_sum"])
        assert_same_bits(state_of(codebook)["embed"], codebook_from_mimi(layers[number]).embed)
        assert codebook.seed == 5 + number


def test_state_that_was_not_trained_waits_for_its_first_batch():
    codebook = codebook_from_mimi(layer(initialized=False))
    assert not codebook.initialized
    x = torch.randn(30, 4)
    codebook(x)
    assert codebook.initialized


read: Any = codebook_from_mimi  # these calls are wrong on purpose


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: read(layer), TypeError, "must be a state dict"),
        (lambda: read({"a": 1}), ValueError, "got 'a': codebook_from_encodec where they are"),
        (lambda: read(EMACodebook(codebook_size=8, dim=4).state_dict()), ValueError, r"or codebook\.set_codes_"),
        (lambda: read({**at("a.", layer()), **at("b.", layer())}), ValueError, "'a.', 'b.', got none"),
        (lambda: read(at("a.", layer()), "b."), ValueError, "'a.', got 'b.'"),
        (lambda: read({**layer(), "cluster_usage": torch.ones(3)}), ValueError, r"\(K,\) and the sums \(K, D\)"),
        (lambda: read({**layer(), "cluster_usage": -torch.ones(8)}), ValueError, "counts not negative"),
        (lambda: read({**layer(), "embed_sum": torch.full((8, 4), torch.nan)}), ValueError, "must be finite"),
        (lambda: read({**layer(), "embed_sum": torch.ones(8, 4).int()}), TypeError, "floating"),
        (lambda: read(layer(), metric="cosine"), TypeError, "metric"),
        (
            lambda: residual_quantizer_from_mimi({**at(SEMANTIC, layer()), **at(LEVEL.format(0), layer())}),
            ValueError,
            "must lead to the levels of one residual quantiser",
        ),
    ],
)
def test_refusals_say_what_to_write(call, error, words):
    with pytest.raises(error, match=words):
        call()
