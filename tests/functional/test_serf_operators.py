"""The refinement operators: each against its formula in Python, then the laws of all."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vqssl.functional import (
    OPERATORS,
    batch_attention,
    channel_attention,
    masked_mean,
    spatial_attention,
    spatial_attention_weights,
)

seeds = st.integers(0, 2**31 - 1)
HALVES = (torch.float16, torch.bfloat16)


def softmax(values):
    exponentials = [math.exp(v - max(values)) for v in values]
    return [e / sum(exponentials) for e in exponentials]


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def slow_channel(z_c, keys, b):
    c, q = z_c[b], keys[b]
    rows = [softmax([ci * qj / math.sqrt(len(c)) for qj in q]) for ci in c]
    return [dot(weights, q) for weights in rows]


def slow_batch(z_c, keys, b):
    weights = softmax([dot(z_c[b], q) / math.sqrt(len(q)) for q in keys])
    return [dot(weights, column) for column in zip(*keys, strict=True)]


def slow_spatial(z_c, keys, b):
    c, tokens = z_c[b], keys[b]
    weights = softmax([math.sqrt(len(c)) * dot(c, t) / math.hypot(*c) / math.hypot(*t) for t in tokens])
    return [dot(weights, column) for column in zip(*tokens, strict=True)]


# By name: the formula for one sample of a batch, and whether the samples of a batch are independent.
CASES = {
    "channel": (slow_channel, True),
    "batch": (slow_batch, False),
    "spatial": (slow_spatial, True),
    "pooled": (lambda z_c, keys, b: keys[b], True),
    "concat": (lambda z_c, keys, b: z_c[b] + keys[b], True),
}
WITH_TOKENS = [name for name, operator in OPERATORS.items() if operator.keys == "tokens"]


def inputs(name, seed, batch=3, dim=4, places=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, dim) if OPERATORS[name].keys == "anchor" else (batch, places, dim)
    draws = (torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in ((batch, dim), shape))
    return tuple(draws)


def test_every_operator_has_a_case():
    assert OPERATORS.keys() == CASES.keys()
    assert "spatial" in WITH_TOKENS


@pytest.mark.parametrize("name", CASES)
@given(seed=seeds, batch=st.integers(1, 4), dim=st.integers(1, 6), places=st.integers(1, 7))
def test_operator_equals_formula(name, seed, batch, dim, places):
    z_c, keys = inputs(name, seed, batch, dim, places)
    found = OPERATORS[name].function(z_c, keys, None)
    expected = [CASES[name][0](z_c.tolist(), keys.tolist(), b) for b in range(batch)]
    assert found.shape == (batch, OPERATORS[name].width * dim)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_samples_are_independent_except_for_batch(name):
    z_c, keys = inputs(name, 0)
    apply = OPERATORS[name].function
    alone = torch.cat([apply(z_c[b : b + 1], keys[b : b + 1], None) for b in range(len(z_c))])
    difference = (alone - apply(z_c, keys, None)).abs().max()
    if CASES[name][1]:
        assert difference < 1e-14
    else:
        assert difference > 0.1


@pytest.mark.parametrize("name", CASES)
def test_permuting_the_batch_permutes_the_output(name):
    z_c, keys = inputs(name, 0)
    order = torch.tensor([2, 0, 1])
    apply = OPERATORS[name].function
    torch.testing.assert_close(apply(z_c[order], keys[order], None), apply(z_c, keys, None)[order])


@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_finite_differences(name):
    z_c, keys = (t.requires_grad_() for t in inputs(name, 0))
    # 0 * c.sum() gives a zero gradient to operators that do not depend on z_c (pooled); gradcheck needs one.
    assert torch.autograd.gradcheck(lambda c, k: OPERATORS[name].function(c, k, None) + 0 * c.sum(), (z_c, keys))


@pytest.mark.parametrize("name", WITH_TOKENS)
def test_masked_gradients_equal_finite_differences(name):
    z_c, keys = (t.requires_grad_() for t in inputs(name, 0))
    mask = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 1, 0, 0], [0, 0, 0, 0, 0]]) > 0
    assert torch.autograd.gradcheck(lambda c, k: OPERATORS[name].function(c, k, mask), (z_c, keys))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", CASES)
def test_half_precision_is_close_to_float64(name, dtype):
    z_c, keys = inputs(name, 0, dtype=dtype)
    found = OPERATORS[name].function(z_c, keys, None)
    assert found.dtype == dtype
    expected = OPERATORS[name].function(z_c.double(), keys.double(), None)
    torch.testing.assert_close(
        found.double(), expected, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps
    )


@pytest.mark.parametrize("name", CASES)
def test_wrong_shapes_and_dtypes_are_refused(name):
    z_c, keys = inputs(name, 0)
    for c, k in [(z_c[:2], keys), (z_c[:, :3], keys), (z_c, keys[..., :3]), (z_c[0], keys), (z_c, keys[0])]:
        with pytest.raises(ValueError, match=r"z_c and z_q must both be|z_c must be \(B, D\)"):
            OPERATORS[name].function(c, k, None)
    with pytest.raises(TypeError, match="floating"):
        OPERATORS[name].function(z_c.long(), keys, None)


# ---- channel and batch: known values ----


def test_zero_query_gives_the_mean():
    q = torch.randn(3, 4, dtype=torch.float64)
    nothing = torch.zeros_like(q)
    torch.testing.assert_close(channel_attention(nothing, q), q.mean(1, keepdim=True).expand(3, 4))
    torch.testing.assert_close(batch_attention(nothing, q), q.mean(0).expand(3, 4))


# ---- spatial: positions, masks, weights ----


def masked_inputs(seed, batch=4, dim=3, places=6):
    z_c, tokens = inputs("spatial", seed, batch, dim, places)
    return z_c, tokens, torch.rand(batch, places, generator=torch.Generator().manual_seed(seed)) < 0.5


@given(seed=seeds)
def test_permuting_positions_changes_nothing(seed):
    z_c, tokens, mask = masked_inputs(seed)
    order = torch.randperm(tokens.shape[1])
    weights = spatial_attention_weights(z_c, tokens, mask)
    torch.testing.assert_close(spatial_attention_weights(z_c, tokens[:, order], mask[:, order]), weights[:, order])
    found = spatial_attention(z_c, tokens[:, order], mask[:, order])
    torch.testing.assert_close(found, spatial_attention(z_c, tokens, mask))


@given(seed=seeds, scale=st.sampled_from([2.0**-20, 0.5, 64.0]))
def test_scale_of_query_and_tokens_does_not_change_weights(seed, scale):
    z_c, tokens, mask = masked_inputs(seed)
    weights = spatial_attention_weights(z_c, tokens, mask)
    torch.testing.assert_close(spatial_attention_weights(scale * z_c, tokens, mask), weights)
    torch.testing.assert_close(spatial_attention_weights(z_c, scale * tokens, mask), weights)


@given(seed=seeds)
def test_weights_sum_to_one_over_valid_positions(seed):
    z_c, tokens, mask = masked_inputs(seed)
    assert (spatial_attention_weights(z_c, tokens) > 0).all()
    torch.testing.assert_close(spatial_attention_weights(z_c, tokens).sum(1), torch.ones(4, dtype=torch.float64))
    weights = spatial_attention_weights(z_c, tokens, mask)
    assert ((weights > 0) == mask).all()
    torch.testing.assert_close(weights.sum(1), mask.any(1).double())


@given(seed=seeds)
def test_masked_equals_truncated_for_any_masked_values(seed):
    z_c, tokens, mask = masked_inputs(seed)
    hidden = torch.where(mask[..., None], tokens, torch.tensor([torch.nan, torch.inf, 1e300], dtype=torch.float64))
    hidden.requires_grad_()
    query = z_c.clone().requires_grad_()
    found, pooled = spatial_attention(query, hidden, mask), masked_mean(hidden, mask)
    for b in range(len(z_c)):
        short = tokens[b : b + 1, mask[b]]
        torch.testing.assert_close(found[b : b + 1], spatial_attention(z_c[b : b + 1], short), rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(pooled[b : b + 1], masked_mean(short), rtol=1e-12, atol=1e-13)
    (found.sum() + pooled.sum()).backward()
    assert (hidden.grad[~mask] == 0).all()
    assert hidden.grad.isfinite().all()
    assert query.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES])
def test_sample_without_valid_tokens_gets_zeros_and_finite_gradients(dtype):
    """The tokens are zeros there, as a codebook returns for masked ones."""
    z_c, tokens = inputs("spatial", 0, dtype=dtype)
    tokens[1] = 0
    z_c.requires_grad_()
    tokens.requires_grad_()
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[1] = False
    found, pooled = spatial_attention(z_c, tokens, mask), masked_mean(tokens, mask)
    assert (found[1] == 0).all()
    assert (pooled[1] == 0).all()
    (found.sum() + pooled.sum()).backward()
    for gradient in (z_c.grad, tokens.grad):
        assert gradient.isfinite().all()
        assert (gradient[1] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES])
def test_valid_zero_token_has_cosine_zero(dtype):
    z_c = torch.tensor([[1.0, 0.0]], dtype=dtype)
    tokens = torch.tensor([[[0.0, 0.0], [0.0, 5.0]]], dtype=dtype)
    assert spatial_attention_weights(z_c, tokens).tolist() == [[0.5, 0.5]]


@pytest.mark.parametrize("dtype", HALVES)
def test_masked_mean_sums_in_float32(dtype):
    tokens = torch.full((1, 20_000, 2), 6.0, dtype=dtype)
    for mask in (None, torch.ones(1, 20_000, dtype=torch.bool)):
        assert masked_mean(tokens, mask).tolist() == [[6.0, 6.0]]
        assert masked_mean(tokens, mask).dtype == dtype


def test_masked_mean_equals_loop():
    _, tokens, mask = masked_inputs(0)
    for b in range(len(tokens)):
        rows = [t for t, kept in zip(tokens[b].tolist(), mask[b].tolist(), strict=True) if kept]
        expected = [sum(column) / len(rows) for column in zip(*rows, strict=True)] or [0.0] * 3
        assert masked_mean(tokens, mask)[b].tolist() == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("function", [lambda t, m: spatial_attention(t[:, 0], t, m), masked_mean])
@pytest.mark.parametrize(
    ("error", "mask"),
    [(TypeError, torch.ones(2, 3)), (ValueError, torch.ones(3, 2) > 0), (ValueError, torch.ones(2, 3, 4) > 0)],
)
def test_wrong_masks_are_refused(function, error, mask):
    with pytest.raises(error, match="mask must"):
        function(torch.ones(2, 3, 4), mask)


def test_masked_mean_refuses_maps():
    with pytest.raises(ValueError, match=r"\(B, N, D\).*for maps \(B, D, \*spatial\), write einops.rearrange"):
        masked_mean(torch.ones(2, 3, 4, 4))


@pytest.mark.parametrize("tokens", [(3, 5, 7), (3, 7, 5), (2, 7, 4)])
def test_tokens_of_another_width_or_batch_are_refused_without_a_guess(tokens):
    """Three axes may be tokens or a map of one spatial axis, so the error must not advise to rearrange them."""
    with pytest.raises(ValueError, match="same samples and the same width") as caught:
        spatial_attention(torch.ones(3, 4), torch.ones(tokens))
    assert "rearrange" not in str(caught.value)
