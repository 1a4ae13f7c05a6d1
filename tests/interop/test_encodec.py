"""Codebooks of encodec: every bit in both directions, and its step as a loop. foreign.py tests the package itself."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.laws import assert_same_bits
from vqssl import EMACodebook, KMeansInit
from vqssl.interop import codebook_from_encodec, codebook_prefixes, codebook_to_encodec

META = "quantizer.vq.layers.{}._codebook."
TRANSFORMERS = "quantizer.layers.{}.codebook."
NAMES = ("embed", "cluster_size", "embed_avg")


def foreign(size=8, dim=4, inited=True, dtype=torch.float32):
    counts = torch.rand(size) * 9 + 0.1
    embed = torch.randn(size, dim)
    return {
        "inited": torch.tensor([float(inited)]),
        "cluster_size": counts.to(dtype),
        "embed": embed.to(dtype),
        "embed_avg": (embed * counts[:, None]).to(dtype),
    }


def slow_step(state, x, decay=0.99, eps=1e-5, threshold=2):
    """Return what encodec makes of a training batch, number by number: expiry first, then the averages."""
    embed, counts, sums = (state[name].double().clone() for name in NAMES)
    indices = [min(range(len(embed)), key=lambda k: float((token - embed[k]).square().sum())) for token in x.double()]
    quantized = embed[indices]
    for k in range(len(embed)):
        if counts[k] < threshold:
            embed[k] = x[torch.randint(len(x), ())]  # codes alone
    for k in range(len(embed)):
        mine = [token for token, chosen in zip(x.double(), indices, strict=True) if chosen == k]
        counts[k] = decay * counts[k] + (1 - decay) * len(mine)
        sums[k] = decay * sums[k] + (1 - decay) * sum(mine, torch.zeros(x.shape[1], dtype=torch.float64))
    total = counts.sum()
    for k in range(len(embed)):
        embed[k] = sums[k] / ((counts[k] + eps) / (total + len(embed) * eps) * total)
    return quantized, torch.tensor(indices), dict(zip(NAMES, (embed, counts, sums), strict=True))


@given(
    size=st.integers(1, 9),
    dim=st.integers(1, 5),
    inited=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16]),
    where=st.sampled_from(["", META.format(0), TRANSFORMERS.format(0)]),
)
def test_round_trip_of_their_state_is_bit_exact(size, dim, inited, dtype, where):
    state = {where + name: tensor for name, tensor in foreign(size, dim, inited, dtype).items()}
    codebook = codebook_from_encodec(state)
    assert bool(codebook.initialized) == inited
    assert_same_bits(codebook_to_encodec(codebook, like=state), state)
    if dtype != torch.float16:
        back = codebook_to_encodec(codebook, where)
        assert_same_bits({name: back[name] for name in state}, state)


@given(size=st.integers(1, 9), dim=st.integers(1, 5), steps=st.integers(0, 1))
def test_round_trip_of_our_state_is_bit_exact(size, dim, steps):
    ours = EMACodebook(codebook_size=size, dim=dim, decay=0.7)
    for _ in range(steps):
        ours(torch.randn(20, dim))
    again = codebook_from_encodec(codebook_to_encodec(ours))
    for name in (*NAMES, "initialized"):
        assert getattr(again, name).equal(getattr(ours, name)), name


def test_training_equals_theirs_with_expiry():
    state = foreign(12, 4)
    state["cluster_size"][:4] *= 0.05  # these expire
    ours = codebook_from_encodec(state)
    for _ in range(4):
        x = torch.randn(30, 4)
        quantized, indices, state = slow_step(state, x)
        found = ours(x)
        assert found.indices.equal(indices)
        torch.testing.assert_close(found.quantized, quantized.float(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found.commitment_loss, (quantized.float() - x).square().mean())
        for name in NAMES:
            torch.testing.assert_close(getattr(ours, name), state[name].float(), rtol=1e-5, atol=1e-6)


def test_set_codes_corrects_sums_that_are_means():
    """Encodec's k-means writes means to embed_avg: the next steps pull used codes to zero."""
    state = foreign(4, 2)
    state["cluster_size"].fill_(10.0)
    state["embed_avg"] = state["embed"].clone()
    shrunk, corrected = codebook_from_encodec(state), codebook_from_encodec(state)
    corrected.set_codes_(corrected.embed)
    x = state["embed"].repeat(10, 1)  # every token is a code: nothing should move
    shrunk(x)
    corrected(x)
    assert (shrunk.embed.norm(dim=-1) < 0.3 * state["embed"].norm(dim=-1)).all()
    torch.testing.assert_close(corrected.embed, state["embed"], rtol=1e-3, atol=1e-5)


def test_each_layer_of_a_model_is_read_and_written_by_its_prefix():
    layers = [foreign() for _ in range(3)]
    state = {"encoder.weight": torch.ones(2)}
    state |= {META.format(n) + name: tensor for n, layer in enumerate(layers) for name, tensor in layer.items()}
    assert codebook_prefixes(state) == [META.format(n) for n in range(3)]
    codebooks = [codebook_from_encodec(state, prefix) for prefix in codebook_prefixes(state)]
    assert all(book.embed.equal(layer["embed"]) for book, layer in zip(codebooks, layers, strict=True))
    moved = codebook_to_encodec(codebooks[2], META.format(1), like=state)
    assert moved[META.format(1) + "embed"].equal(layers[2]["embed"])
    assert moved.keys() == state.keys()
    assert all(moved[name] is state[name] for name in state if not name.startswith(META.format(1)))


def test_defaults_are_theirs_unless_given():
    ours = codebook_from_encodec(foreign())
    assert (ours.decay, ours.eps, ours.commitment_weight, ours.metric) == (0.99, 1e-5, 1.0, "euclidean")
    assert ours.initialization == KMeansInit(iterations=50, few_tokens="sample")
    assert codebook_from_encodec(foreign(), decay=0.9).decay == 0.9


read: Any = codebook_from_encodec  # these calls are wrong on purpose
write: Any = codebook_to_encodec


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: read(foreign), TypeError, "weights_only=True"),
        (lambda: read({"a": 1}), ValueError, "got 'a'"),
        (
            lambda: read({**foreign(), "initted": torch.tensor(True)}),
            ValueError,
            "codebook_from_vector_quantize_pytorch where the flag is 'initted'",
        ),
        (lambda: read(EMACodebook(codebook_size=8, dim=4).state_dict()), ValueError, "'rng'"),
        (lambda: read({k: v[None] for k, v in foreign().items()}), ValueError, r"must be \(K, D\)"),
        (lambda: read(foreign(), metric="cosine"), TypeError, "metric"),
        (
            lambda: write(EMACodebook(codebook_size=8, dim=4, metric="cosine")),
            ValueError,
            "the only one that encodec has",
        ),
        (lambda: write(EMACodebook(codebook_size=9, dim=4), like=foreign()), ValueError, "room for"),
        (lambda: write(torch.zeros(3)), TypeError, "EMACodebook"),
    ],
)
def test_refusals_say_what_to_write(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_state_that_was_not_trained_trains_on_fewer_frames_than_codes():
    state = foreign()
    prefix = next(iter(state)).rpartition(".")[0]
    state[f"{prefix}.inited" if prefix else "inited"] = torch.tensor([0.0])
    ours = codebook_from_encodec(state)
    ours(torch.randn(ours.codebook_size // 2, ours.dim))
    assert ours.initialized
