"""Codebooks of vector-quantize-pytorch: every bit in both directions, and training equals the package's own."""

import copy
from typing import Any

import pytest
import torch
import vector_quantize_pytorch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from tests.laws import assert_same_bits, state_of, through_file
from vqssl import BatchRevival, EMACodebook, KMeansInit, MultiScaleQuantizer
from vqssl.interop import (
    codebook_from_vector_quantize_pytorch,
    codebook_prefixes,
    codebook_to_vector_quantize_pytorch,
)

NAMES = ("embed", "cluster_size", "embed_avg")
METRICS = ("euclidean", "cosine")


def trained(dim=8, size=16, steps=3, tokens=60, **options):
    """Return their module after a few steps: codes, counts and sums differ from their first values."""
    theirs = vector_quantize_pytorch.VectorQuantize(dim=dim, codebook_size=size, **options)
    with torch.no_grad():
        for step in range(steps):
            theirs(torch.randn(2, tokens // 2, dim) + 0.1 * step)
    return theirs


def assert_same_state(ours, theirs, head=0, **tolerances):
    for name in NAMES:
        found, expected = getattr(ours, name), getattr(theirs, name).detach()[head]
        torch.testing.assert_close(found, expected, **(tolerances or {"rtol": 0, "atol": 0}))


# ---- states ----


@st.composite
def foreign_states(draw):
    """Draw states of all releases: with and without a heads axis, flags of both kinds, sums missing, any dtype."""
    size, dim = draw(st.integers(1, 9)), draw(st.integers(1, 5))
    heads = draw(st.sampled_from([None, 1, 3]))
    metric = draw(st.sampled_from(METRICS))
    dtypes = st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16])
    initted = draw(st.booleans())
    lead = () if heads is None else (heads,)
    embed = torch.randn(*lead, size, dim)
    if metric == "cosine":
        embed = F.normalize(embed, dim=-1)
    state = {
        "initted": torch.tensor(initted) if draw(st.booleans()) else torch.tensor([float(initted)]),
        "cluster_size": (torch.rand(*lead, size) * 9).to(draw(dtypes)),
        "embed_avg": torch.randn(*lead, size, dim).to(draw(dtypes)),
        "embed": embed.to(draw(dtypes)),
    }
    if metric == "cosine" and draw(st.booleans()):
        del state["embed_avg"]
    return state, heads, metric, draw(st.sampled_from(["", "_codebook.", "model.vq.layers.3._codebook."]))


def wide(state):
    return any(tensor.dtype == torch.float64 for tensor in state.values())


@given(foreign_states())
def test_round_trip_of_their_state_is_bit_exact(drawn):
    state, heads, metric, prefix = drawn
    state = {prefix + name: tensor for name, tensor in state.items()}
    others = {"project_in.weight": torch.randn(2, 2)} if prefix else {}
    codebooks = [
        codebook_from_vector_quantize_pytorch({**others, **state}, head=head, metric=metric)
        for head in ([None] if heads is None else range(heads))
    ]
    for codebook in codebooks:
        assert codebook.embed.dtype == (torch.float64 if wide(state) else torch.float32)
        assert bool(codebook.initialized) == bool(state[prefix + "initted"])
    back = codebook_to_vector_quantize_pytorch(codebooks, like={**others, **state})
    assert_same_bits(back, {**others, **state})
    assert all(back[name].data_ptr() != tensor.data_ptr() for name, tensor in state.items())


@given(
    metric=st.sampled_from(METRICS),
    size=st.integers(1, 12),
    dim=st.integers(1, 6),
    heads=st.integers(1, 3),
    steps=st.integers(0, 1),
)
def test_round_trip_of_our_state_is_bit_exact(metric, size, dim, heads, steps):
    ours = [EMACodebook(codebook_size=size, dim=dim, decay=0.7, metric=metric, seed=head) for head in range(heads)]
    for codebook in ours:
        for _ in range(steps):
            codebook(torch.randn(20, dim))
    theirs = vector_quantize_pytorch.VectorQuantize(
        dim=dim * heads,
        codebook_size=size,
        codebook_dim=dim,
        heads=heads,
        separate_codebook_per_head=heads > 1,
        use_cosine_sim=metric == "cosine",
    )
    theirs.load_state_dict(codebook_to_vector_quantize_pytorch(ours))
    for head, codebook in enumerate(ours):
        assert_same_state(codebook, theirs._codebook, head)
        again = codebook_from_vector_quantize_pytorch(through_file(theirs.state_dict()), head=head, metric=metric)
        for name in (*NAMES, "initialized"):
            assert getattr(again, name).equal(getattr(codebook, name)), name


def test_missing_sums_of_old_cosine_codebooks_are_counts_times_codes():
    codes, counts = F.normalize(torch.randn(4, 3), dim=-1), torch.tensor([0.5, 1.0, 2.0, 8.0])
    state = {"initted": torch.tensor([1.0]), "embed": codes, "cluster_size": counts}
    ours = codebook_from_vector_quantize_pytorch(state, metric="cosine")
    assert ours.embed_avg.equal(codes * counts[:, None])


def test_codebook_holds_copies_of_the_state():
    state = trained().state_dict()
    before = {name: tensor.clone() for name, tensor in state.items()}
    codebook = codebook_from_vector_quantize_pytorch(state)
    codebook(torch.randn(50, 8))
    assert not codebook.embed.equal(before["_codebook.embed"][0])
    assert_same_bits(dict(state), before)


# ---- training ----


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("estimator", ["rotation", "straight_through"])
def test_training_continues_as_theirs(metric, estimator):
    theirs = trained(size=48, use_cosine_sim=metric == "cosine", rotation_trick=estimator == "rotation")
    options = {} if estimator == "rotation" else {"estimator": estimator}  # theirs is the default here
    ours = codebook_from_vector_quantize_pytorch(through_file(theirs.state_dict()), metric=metric, **options)
    start = state_of(ours)
    for step in range(10):
        x1 = (torch.randn(3, 20, 8) + 0.5 * step).requires_grad_()
        x2 = x1.detach().clone().requires_grad_()
        mask = torch.rand(3, 20) < 0.8 if step % 3 == 2 else None
        kept = torch.ones(3, 20, dtype=torch.bool) if mask is None else mask
        theirs_quantized, theirs_indices, theirs_loss = theirs(x1, mask=mask)
        found = ours(x2, mask)
        assert found.indices.equal(theirs_indices)  # -1 where masked, in both
        torch.testing.assert_close(found.quantized, theirs_quantized, rtol=1e-5, atol=1e-6)
        assert_same_state(ours, theirs._codebook, rtol=1e-6, atol=1e-6)
        if metric == "cosine" and mask is not None:
            # Theirs measures commitment from the token as given, ours from the token at length 1.
            codes = theirs_quantized.detach()
            torch.testing.assert_close(theirs_loss.squeeze(), F.mse_loss(codes[kept], x1[kept]))
            compared = F.normalize(x2, dim=-1)
            torch.testing.assert_close(found.commitment_loss, F.mse_loss(codes[kept], compared[kept]))
            assert (theirs_loss - found.commitment_loss).abs() > 0.1
            continue
        torch.testing.assert_close(found.commitment_loss, theirs_loss.squeeze(), rtol=1e-5, atol=1e-6)
        weights = torch.randn(3, 20, 8)
        ((theirs_quantized * weights).sum() + theirs_loss.sum()).backward()
        ((found.quantized * weights).sum() + found.commitment_loss).backward()
        torch.testing.assert_close(x2.grad, x1.grad, rtol=1e-4, atol=1e-5)
    assert not any(start[name].equal(getattr(ours, name)) for name in NAMES)
    assert BatchRevival().dead(ours.state()).any()  # and none was revived, as there


def test_training_of_our_state_continues_in_their_module():
    ours = EMACodebook(codebook_size=16, dim=8, decay=0.9, revival=None)
    ours(torch.randn(100, 8))
    theirs = vector_quantize_pytorch.VectorQuantize(dim=8, codebook_size=16, decay=0.9)
    theirs.load_state_dict(codebook_to_vector_quantize_pytorch(ours))
    for _ in range(5):
        x = torch.randn(4, 25, 8)
        assert ours(x).indices.equal(theirs(x)[1])
        assert_same_state(ours, theirs._codebook, rtol=1e-6, atol=1e-6)


def test_one_codebook_a_head_equals_their_separate_codebooks():
    theirs = trained(dim=12, heads=3, separate_codebook_per_head=True, codebook_dim=4)
    ours = [codebook_from_vector_quantize_pytorch(theirs.state_dict(), head=head) for head in range(3)]
    x = torch.randn(2, 30, 12)
    _, indices, _ = theirs(x)
    for head, (codebook, part) in enumerate(zip(ours, x.chunk(3, dim=-1), strict=True)):
        assert codebook(part).indices.equal(indices[..., head])
        assert_same_state(codebook, theirs._codebook, head, rtol=1e-6, atol=1e-6)


def test_one_codebook_for_all_heads_takes_a_heads_axis():
    theirs = trained(dim=12, heads=3, codebook_dim=4)
    ours = codebook_from_vector_quantize_pytorch(theirs.state_dict())
    x = torch.randn(2, 30, 12)
    assert ours(x.reshape(2, 30, 3, 4)).indices.equal(theirs(x)[1])
    assert_same_state(ours, theirs._codebook, rtol=1e-6, atol=1e-6)


def test_codebook_quantises_the_output_of_their_projection():
    theirs = trained(dim=8, codebook_dim=3)
    ours = codebook_from_vector_quantize_pytorch(theirs.state_dict())
    x = torch.randn(2, 30, 8)
    assert ours(theirs.project_in(x)).indices.equal(theirs(x)[1])


def test_layers_of_a_residual_quantiser_convert_one_by_one():
    theirs = vector_quantize_pytorch.ResidualVQ(dim=6, num_quantizers=3, codebook_size=10)
    theirs(torch.randn(2, 40, 6))
    state = theirs.state_dict()
    prefixes = codebook_prefixes(state)
    assert prefixes == [f"layers.{n}._codebook." for n in range(3)]
    layers = [codebook_from_vector_quantize_pytorch(state, prefix) for prefix in prefixes]
    x = residual = torch.randn(2, 40, 6)
    quantized, indices, _ = theirs(x)
    for n, layer in enumerate(layers):
        found = layer(residual)
        assert found.indices.equal(indices[..., n])
        residual = residual - found.quantized.detach()
        assert_same_state(layer, theirs.layers[n]._codebook, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(x - residual, quantized, rtol=1e-5, atol=1e-5)
    # And back, a layer at a time.
    for prefix, layer in zip(prefixes, layers, strict=True):
        state = codebook_to_vector_quantize_pytorch(layer, prefix, like=state)
    theirs.load_state_dict(state)
    for n, layer in enumerate(layers):
        assert_same_state(layer, theirs.layers[n]._codebook)


def test_shared_codebook_is_the_same_under_each_prefix():
    theirs = vector_quantize_pytorch.ResidualVQ(dim=6, num_quantizers=2, codebook_size=10, shared_codebook=True)
    state = theirs.state_dict()
    first, second = (codebook_from_vector_quantize_pytorch(state, prefix) for prefix in codebook_prefixes(state))
    assert_same_bits(state_of(first), state_of(second))


def test_converted_codebook_loads_into_a_multi_scale_quantizer():
    theirs = trained(dim=4)
    loaded = codebook_from_vector_quantize_pytorch(theirs.state_dict())
    quantizer = MultiScaleQuantizer([4, 4], codebook_size=16, dim=4)
    quantizer.codebook(1).load_state_dict(loaded.state_dict())
    assert_same_bits(state_of(quantizer.codebook(1)), state_of(loaded))


# ---- differences ----


def test_first_codes_need_training_mode_here_and_any_mode_there():
    theirs = vector_quantize_pytorch.VectorQuantize(dim=4, codebook_size=8, kmeans_init=True)
    ours = codebook_from_vector_quantize_pytorch(theirs.state_dict())
    assert not ours.initialized
    assert ours.initialization == KMeansInit(10)
    x = torch.randn(1, 64, 4)
    theirs.eval()(x)
    with pytest.warns(UserWarning, match="random codes"):
        ours.eval()(x)
    assert theirs._codebook.initted  # in eval mode
    assert not ours.initialized
    ours.train()(x)
    assert ours.initialized


@pytest.mark.parametrize("threshold", [1, 2, 4])
def test_their_threshold_t_is_t_k_over_tokens_here(threshold):
    tokens, size = 64, 16
    plain = trained(dim=2, size=size, steps=60, tokens=tokens, threshold_ema_dead_code=0)
    expiring = copy.deepcopy(plain)
    expiring._codebook.threshold_ema_dead_code = expiring._codebook.reset_cluster_size = threshold
    expiring._codebook.has_dead_code_replacement = True
    x = torch.randn(2, tokens // 2, 2)
    plain(x)
    expiring(x)
    expired = (plain._codebook.embed != expiring._codebook.embed).any(dim=-1)[0]
    assert 0 < expired.sum() < size
    ours = codebook_from_vector_quantize_pytorch(plain.state_dict(), revival=BatchRevival(threshold * size / tokens))
    assert ours.revival.dead(ours.state()).equal(expired)


def test_unused_cosine_codes_shrink_there_and_keep_length_one_here():
    theirs = vector_quantize_pytorch.VectorQuantize(dim=4, codebook_size=8, use_cosine_sim=True, decay=0.5)
    ours = codebook_from_vector_quantize_pytorch(theirs.state_dict(), metric="cosine", decay=0.5)
    place = torch.randn(4)
    for step in range(50):
        x = place + 0.01 * torch.randn(1, 32, 4)
        theirs(x)
        ours(x)
        if step == 20:
            assert_same_state(ours, theirs._codebook, rtol=1e-5, atol=1e-6)
    assert (theirs._codebook.embed[0].norm(dim=-1) < 1e-3).sum() == 7
    torch.testing.assert_close(ours.embed.norm(dim=-1), torch.ones(8))


def test_sums_of_learned_codes_are_stale_until_set_codes():
    theirs = vector_quantize_pytorch.VectorQuantize(
        dim=4, codebook_size=8, learnable_codebook=True, ema_update=False, rotation_trick=False
    )
    optimizer = torch.optim.SGD(theirs.parameters(), lr=1.0)
    theirs(torch.randn(1, 64, 4))[2].backward()
    optimizer.step()
    ours = codebook_from_vector_quantize_pytorch(theirs.state_dict())
    assert ours.embed.equal(theirs._codebook.embed.detach()[0])
    assert not torch.allclose(ours.embed, ours.embed_avg / ours.cluster_size[:, None], atol=1e-3)
    ours.set_codes_(ours.embed)
    assert ours.embed.equal(ours.embed_avg / ours.cluster_size[:, None])


def test_defaults_are_theirs_unless_given():
    state = trained().state_dict()
    ours = codebook_from_vector_quantize_pytorch(state)
    assert (ours.decay, ours.eps, ours.commitment_weight) == (0.8, 1e-5, 1.0)
    ours = codebook_from_vector_quantize_pytorch(state, decay=0.95, seed=7, dtype=torch.float64)
    assert (ours.decay, ours.seed, ours.embed.dtype) == (0.95, 7, torch.float64)
    fresh = EMACodebook(codebook_size=16, dim=8, seed=7)
    assert ours.rng[0].equal(fresh.rng[0])


# ---- refusals ----


def state_with(**changes):
    """Return a good state with names replaced, or removed by None."""
    state = {
        "initted": torch.tensor(True),
        "cluster_size": torch.ones(1, 4),
        "embed_avg": torch.randn(1, 4, 3),
        "embed": torch.randn(1, 4, 3),
        **changes,
    }
    return {f"_codebook.{name}": value for name, value in state.items() if value is not None}


read: Any = codebook_from_vector_quantize_pytorch  # these calls are wrong on purpose
write: Any = codebook_to_vector_quantize_pytorch
NAN = torch.full((1, 4, 3), float("nan"))
TWO = {f"layers.{n}.{name}": value for n in range(2) for name, value in state_with().items()}
HEADS = {"embed": torch.ones(2, 4, 3), "embed_avg": torch.ones(2, 4, 3), "cluster_size": torch.ones(2, 4)}
BAD_STATES = {
    "a module": (lambda: read(trained()), TypeError, r"state_dict\(\)"),
    "a path": (lambda: read("vq.pt"), TypeError, "weights_only=True"),
    "other keys": (lambda: read({0: NAN}), TypeError, "keys other than strings"),
    "no codebook": (lambda: read({"w": NAN}), ValueError, "got 'w'"),
    "two": (lambda: read(TWO), ValueError, "prefix='layers.0._codebook.'"),
    "which of two": (lambda: read(TWO, "layers.2."), ValueError, "got 'layers.2.'"),
    "encodec's": (
        lambda: read(state_with(initted=None, inited=torch.ones(1))),
        ValueError,
        "codebook_from_encodec where the flag is 'inited'",
    ),
    "affine": (
        lambda: read(vector_quantize_pytorch.VectorQuantize(dim=4, codebook_size=8, affine_param=True).state_dict()),
        ValueError,
        "without affine_param",
    ),
    "no sums": (lambda: read(state_with(embed_avg=None)), ValueError, "'cosine'"),
    "integers": (
        lambda: read(state_with(embed=torch.ones(1, 4, 3).long())),
        TypeError,
        "floating",
    ),
    "shapes": (
        lambda: read(state_with(cluster_size=torch.ones(1, 5))),
        ValueError,
        r"\(1, 4, 3\), \(1, 4, 3\) and \(1, 5\)",
    ),
    "axes": (
        lambda: read(
            {
                "initted": torch.tensor(True),
                "embed": torch.ones(1, 1, 4, 3),
                "embed_avg": torch.ones(1, 1, 4, 3),
                "cluster_size": torch.ones(1, 1, 4),
            }
        ),
        ValueError,
        r"\(K, D\) or \(heads, K, D\)",
    ),
    "NaN codes": (
        lambda: read(state_with(embed=NAN)),
        ValueError,
        "embed must be fin",
    ),
    "NaN sums": (lambda: read(state_with(embed_avg=NAN)), ValueError, "embed_avg"),
    "negative": (
        lambda: read(state_with(cluster_size=-torch.ones(1, 4))),
        ValueError,
        "must not be negative, got -1",
    ),
    "not cosine": (
        lambda: read(state_with(embed=torch.ones(1, 4, 3)), metric="cosine"),
        ValueError,
        "metric='euclidean'",
    ),
    "which head": (lambda: read(state_with(**HEADS)), ValueError, "head=0"),
    "no such head": (
        lambda: read(state_with(**HEADS), head=2),
        ValueError,
        "from 0 to 1, got 2",
    ),
    "no metric": (lambda: read(state_with(), metric="l1"), ValueError, "metric"),
    "no option": (lambda: read(state_with(), decy=0.9), TypeError, "decy"),
    "not a codebook": (lambda: write(torch.nn.Linear(2, 2)), TypeError, "EMACodebook"),
    "no head": (lambda: write([]), ValueError, "one for each head"),
    "sizes of heads": (
        lambda: write([EMACodebook(codebook_size=4, dim=3), EMACodebook(codebook_size=5, dim=3)]),
        ValueError,
        "one codebook_size and dim",
    ),
    "metrics of heads": (
        lambda: write([EMACodebook(codebook_size=4, dim=3), EMACodebook(codebook_size=4, dim=3, metric="cosine")]),
        ValueError,
        "one metric",
    ),
    "no room": (
        lambda: write(EMACodebook(codebook_size=5, dim=3), like=state_with()),
        ValueError,
        r"room for \(1, 5\), got \(1, 4\)",
    ),
    "heads that look like codes": (
        lambda: write(
            [EMACodebook(codebook_size=1, dim=3)] * 2,
            like={name: tensor[0, :2] if tensor.ndim else tensor for name, tensor in state_with().items()},
        ),
        ValueError,
        "room for",
    ),
    "like a module": (
        lambda: write(EMACodebook(codebook_size=4, dim=3), like=trained()),
        TypeError,
        "like",
    ),
    "like two": (lambda: write(EMACodebook(codebook_size=4, dim=3), like=TWO), ValueError, "prefix="),
}


@pytest.mark.parametrize("case", BAD_STATES)
def test_refusals_say_what_to_write(case):
    call, error, words = BAD_STATES[case]
    with pytest.raises(error, match=words):
        call()


def test_initialised_and_uninitialised_heads_are_refused():
    started = EMACodebook(codebook_size=4, dim=3)
    started(torch.randn(9, 3))
    with pytest.raises(ValueError, match="one flag, all initialised or all uninitialised"):
        codebook_to_vector_quantize_pytorch([started, EMACodebook(codebook_size=4, dim=3)])


def test_values_beyond_their_half_precision_are_refused():
    codebook = EMACodebook(codebook_size=4, dim=3)
    codebook.set_codes_(torch.full((4, 3), 1e5))
    like = {name: tensor.half() for name, tensor in state_with().items()}
    with pytest.raises(ValueError, match=r"float\(\) first"):
        codebook_to_vector_quantize_pytorch(codebook, like=like)


def test_codes_that_a_network_changes_are_refused():
    """QINCo: the first level has codes of its own, later ones depend on what came before."""
    peer = vector_quantize_pytorch.ResidualVQ(dim=8, num_quantizers=3, codebook_size=16, implicit_neural_codebook=True)
    state = {f"audio.{name}": value for name, value in peer.state_dict().items()}
    first = codebook_from_vector_quantize_pytorch(state, "audio.layers.0._codebook.")
    assert torch.equal(first.embed, state["audio.layers.0._codebook.embed"][0])
    for level in (1, 2):
        with pytest.raises(ValueError, match="implicit_neural_codebook=True, whose networks change the codes"):
            codebook_from_vector_quantize_pytorch(state, f"audio.layers.{level}._codebook.")
    plain = vector_quantize_pytorch.ResidualVQ(dim=8, num_quantizers=3, codebook_size=16).state_dict()
    codebook_from_vector_quantize_pytorch(plain, "layers.2._codebook.")


def test_cosine_state_without_metric_gives_a_warning():
    state = vector_quantize_pytorch.VectorQuantize(dim=8, codebook_size=16, use_cosine_sim=True).state_dict()
    with pytest.warns(UserWarning, match="write metric='cosine', or metric='euclidean' if it is so") as caught:
        codebook_from_vector_quantize_pytorch(state)
    assert caught[0].filename == __file__
    for metric in ("cosine", "euclidean"):
        codebook_from_vector_quantize_pytorch(state, metric=metric)  # a warning would be an error here
    codebook_from_vector_quantize_pytorch(vector_quantize_pytorch.VectorQuantize(dim=8, codebook_size=16).state_dict())


def test_wrong_prefix_lists_what_is_under_it_and_names_set_codes():
    state = vector_quantize_pytorch.ResidualVQ(dim=8, num_quantizers=2, codebook_size=16).state_dict()
    state = {**{f"encoder.{n}.weight": torch.zeros(1) for n in range(9)}, **state}
    with pytest.raises(ValueError, match=r"got '_codebook.initted', .* there; codebooks are at 'layers.0._codebook.'"):
        codebook_from_vector_quantize_pytorch(state, "layers.1.")
    with pytest.raises(ValueError, match=r"codebook.set_codes_\(codes\)"):
        codebook_from_vector_quantize_pytorch({"quantize.embedding.weight": torch.zeros(4, 2)})
