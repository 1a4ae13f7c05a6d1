"""Bags of codes against loops; soft codes against distances in float64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vqssl.functional import bag_of_codes, nearest_codeword, soft_codes

seeds = st.integers(0, 2**31 - 1)
K = 5


def draw(seed, *shape):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, K, shape, generator=generator), torch.rand(shape, generator=generator) < 0.7


def slow_bag(indices, mask, reduction):
    bags = []
    for row, kept in zip(indices.flatten(1).tolist(), mask.flatten(1).tolist(), strict=True):
        counts = [sum(k == code for k, valid in zip(row, kept, strict=True) if valid) for code in range(K)]
        weights = counts if reduction == "mean" else [float(count > 0) for count in counts]
        bags.append([weight / max(sum(weights), 1) for weight in weights])
    return torch.tensor(bags)


@pytest.mark.parametrize("reduction", ["mean", "max"])
@given(seed=seeds, views=st.integers(0, 4), places=st.lists(st.integers(0, 4), min_size=1, max_size=3))
def test_bag_equals_the_loop(reduction, seed, views, places):
    indices, mask = draw(seed, views, *places)
    expected = slow_bag(indices, mask, reduction).reshape(views, K)
    torch.testing.assert_close(bag_of_codes(indices, K, mask, reduction), expected, rtol=1e-6, atol=0)
    everything = torch.ones_like(mask)
    torch.testing.assert_close(
        bag_of_codes(indices, K, reduction=reduction),
        slow_bag(indices, everything, reduction).reshape(views, K),
        rtol=1e-6,
        atol=0,
    )


@pytest.mark.parametrize("reduction", ["mean", "max"])
@given(seed=seeds)
def test_bag_of_one_hot_shares_is_the_bag_of_the_indices(reduction, seed):
    indices, mask = draw(seed, 3, 2, 4)
    shares = torch.nn.functional.one_hot(indices.clamp_min(0), K).double() * (indices >= 0)[..., None]
    found = bag_of_codes(shares, K, mask, reduction)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.float(), bag_of_codes(indices, K, mask, reduction), rtol=1e-6, atol=0)


@given(seed=seeds)
def test_rows_sum_to_1_and_order_of_places_does_not_matter(seed):
    indices, _ = draw(seed, 3, 12)
    bags = bag_of_codes(indices, K)
    has_codes = (indices >= 0).any(1)
    torch.testing.assert_close(bags.sum(1), has_codes.float(), rtol=1e-6, atol=0)
    shuffled = indices[:, torch.randperm(12, generator=torch.Generator().manual_seed(seed))]
    assert torch.equal(bag_of_codes(shuffled, K), bags)


def test_masked_places_may_hold_anything_and_get_no_gradient():
    shares = torch.rand(2, 3, K, dtype=torch.float64)
    mask = torch.tensor([[True, False, True], [False, False, False]])
    spoilt = torch.where(mask[..., None], shares, torch.nan).requires_grad_()
    for reduction in ("mean", "max"):
        bags = bag_of_codes(spoilt, K, mask, reduction)
        torch.testing.assert_close(bags[0], bag_of_codes(shares[:1, ::2], K, reduction=reduction)[0])
        assert torch.equal(bags[1], torch.zeros(K, dtype=torch.float64))
        (gradient,) = torch.autograd.grad(bags[0, 0], spoilt)
        assert (gradient[~mask] == 0).all()
        assert gradient[mask].abs().sum() > 0


def test_half_shares_are_averaged_in_float32():
    shares = torch.full((1, 70_000, 2), 0.5, dtype=torch.float16)  # the sum does not fit float16
    assert bag_of_codes(shares, 2).tolist() == [[0.5, 0.5]]


@given(seed=seeds, sharpness=st.sampled_from([0.0, 0.3, 5.0]))
def test_soft_codes_equal_the_softmax_of_distances(seed, sharpness):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64) + 100
    codes = torch.randn(K, 4, generator=generator, dtype=torch.float64) + 100
    scores = [
        [-sharpness * math.dist(token, code) ** 2 for code in codes.tolist()] for token in tokens.flatten(0, 1).tolist()
    ]
    expected = torch.tensor(scores, dtype=torch.float64).softmax(-1).reshape(2, 3, K)
    torch.testing.assert_close(soft_codes(tokens, codes, sharpness), expected, rtol=1e-9, atol=1e-12)
    # In float32 too: the common mean of 100 is taken out before anything is squared.
    single = soft_codes(tokens.float(), codes.float(), sharpness).double()
    torch.testing.assert_close(single, expected, rtol=2e-3, atol=1e-5)


def test_sharp_codes_are_the_nearest_ones():
    tokens, codes = torch.randn(50, 4), torch.randn(K, 4)
    sharp = soft_codes(tokens, codes, 1e5)
    assert torch.equal(sharp.argmax(-1), nearest_codeword(tokens, codes))
    assert sharp.max(-1).values.min() > 0.99


def test_soft_codes_pass_gradients_to_all_three():
    tokens, codes = torch.randn(3, 2, dtype=torch.float64), torch.randn(K, 2, dtype=torch.float64)
    sharpness = torch.tensor(0.7, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (tokens, codes, sharpness)]
    assert torch.autograd.gradcheck(soft_codes, inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_tokens_are_compared_in_float32_also_under_autocast(dtype):
    tokens, codes = torch.randn(9, 64).to(dtype), torch.randn(K, 64)
    expected = soft_codes(tokens.float(), codes, 0.1)
    assert torch.equal(soft_codes(tokens, codes, 0.1), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(soft_codes(tokens, codes, 0.1), expected)


def test_functions_compile_and_vectorise():
    indices, mask = draw(0, 3, 4, 4)
    tokens, codes = torch.randn(6, 4), torch.randn(K, 4)
    bag = torch.compile(bag_of_codes, fullgraph=True, backend="eager")
    soft = torch.compile(soft_codes, fullgraph=True, backend="eager")
    assert torch.equal(bag(indices, K, mask), bag_of_codes(indices, K, mask))
    torch.testing.assert_close(soft(tokens, codes, 1.0), soft_codes(tokens, codes, 1.0))
    each = torch.func.vmap(lambda k: bag_of_codes(k, K))(indices[:, None])
    assert torch.equal(each[:, 0], bag_of_codes(indices, K))


@pytest.mark.parametrize(
    ("error", "says", "call"),
    [
        (ValueError, "at least 1", lambda: bag_of_codes(torch.zeros(1, 2).long(), 0)),
        (ValueError, "'mean' or 'max'", lambda: bag_of_codes(torch.zeros(1, 2).long(), 3, reduction="sum")),  # type: ignore[arg-type]
        (ValueError, "from -1 .* to 2", lambda: bag_of_codes(torch.full((1, 2), 3), 3)),
        (ValueError, r"indices\[None\] for one view", lambda: bag_of_codes(torch.zeros(4).long(), 3)),
        (ValueError, r"indices\[None\] for one view", lambda: bag_of_codes(torch.zeros(4, 3), 3)),
        (ValueError, r"write indices.long\(\)", lambda: bag_of_codes(torch.zeros(2, 4), 3)),
        (TypeError, "integer tensor", lambda: bag_of_codes(torch.zeros(1, 2).bool(), 3)),
        (TypeError, "boolean", lambda: bag_of_codes(torch.zeros(1, 2).long(), 3, torch.ones(1, 2))),
        (ValueError, "one entry for each token", lambda: bag_of_codes(torch.zeros(1, 2).long(), 3, torch.ones(2) > 0)),
        (ValueError, "of one width D", lambda: soft_codes(torch.zeros(2, 3), torch.zeros(4, 2), 1.0)),
        (ValueError, "sharpness must be", lambda: soft_codes(torch.zeros(2, 3), torch.zeros(4, 3), -1.0)),
        (TypeError, "floating dtype", lambda: soft_codes(torch.zeros(2, 3).long(), torch.zeros(4, 3), 1.0)),
    ],
)
def test_refusals_name_the_rule(error, says, call):
    with pytest.raises(error, match=says):
        call()
