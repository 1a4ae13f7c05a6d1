"""Commitment and cosine regression against element-by-element formulas."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vqssl.functional import commitment_loss, cosine_regression_loss
from vqssl.types import Quantized

seeds = st.integers(0, 2**31 - 1)
HALVES = (torch.float16, torch.bfloat16)


def pair(seed, *shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, *shape, generator=generator, dtype=torch.float64).to(dtype)


def slow_commitment(x, q, mask, weight):
    total, elements = 0.0, 0
    for row, code, kept in zip(x.tolist(), q.tolist(), mask.tolist(), strict=True):
        if kept:
            total += sum((a - b) ** 2 for a, b in zip(row, code, strict=True))
            elements += len(row)
    return weight * total / max(elements, 1)


def slow_cosine(p, t):
    """The squared distance of unit vectors, pair by pair."""
    losses = []
    for a, b in zip(p.tolist(), t.tolist(), strict=True):
        length_a, length_b = math.hypot(*a), math.hypot(*b)
        losses.append(sum((x / length_a - y / length_b) ** 2 for x, y in zip(a, b, strict=True)))
    return sum(losses) / len(losses)


# ---- commitment ----


@given(seed=seeds, tokens=st.integers(0, 9), dim=st.integers(1, 5), weight=st.sampled_from([0.0, 0.25, 3.0]))
def test_commitment_is_its_formula(seed, tokens, dim, weight):
    x, q = pair(seed, tokens, dim)
    mask = torch.rand(tokens) < 0.6
    everything = torch.ones(tokens, dtype=torch.bool)
    assert commitment_loss(x, q, mask, weight).item() == pytest.approx(slow_commitment(x, q, mask, weight), rel=1e-12)
    expected = pytest.approx(slow_commitment(x, q, everything, weight), rel=1e-12)
    assert commitment_loss(x, q, weight=weight).item() == expected
    assert commitment_loss(x, q, everything, weight).item() == expected


def test_beta_is_a_quarter():
    assert commitment_loss(torch.full((2, 3), 2.0), torch.zeros(2, 3)).item() == 1.0


@given(seed=seeds, shape=st.lists(st.integers(1, 3), min_size=1, max_size=3))
def test_masked_equals_truncated_whatever_stands_there(seed, shape):
    x, q = pair(seed, *shape, 4)
    mask = torch.rand(shape) < 0.5
    kept = x[mask].requires_grad_()
    x = torch.where(mask[..., None], x, torch.tensor([torch.nan, torch.inf, -torch.inf, 1e300])).requires_grad_()
    q = torch.where(mask[..., None], q, torch.nan)
    masked, truncated = commitment_loss(x, q, mask), commitment_loss(kept, q[mask])
    torch.testing.assert_close(masked, truncated, rtol=1e-13, atol=0)
    masked.backward()
    truncated.backward()
    assert (x.grad[~mask] == 0).all()
    torch.testing.assert_close(x.grad[mask], kept.grad, rtol=1e-13, atol=0)


@pytest.mark.parametrize(
    ("shape", "mask"),
    [((0, 3), None), ((0, 3), torch.zeros(0, dtype=torch.bool)), ((2, 3), torch.zeros(2, dtype=torch.bool))],
    ids=["empty", "empty, masked", "fully masked"],
)
def test_nothing_to_count_is_zero_with_a_gradient_of_zeros(shape, mask):
    x = torch.full(shape, torch.nan, requires_grad=True)
    loss = commitment_loss(x, torch.full(shape, torch.nan), mask)
    assert loss.item() == 0
    loss.backward()
    assert x.grad.shape == shape
    assert (x.grad == 0).all()


def test_commitment_gradient():
    x, q = pair(0, 2, 3, 4)
    mask = torch.tensor([[True, False, True], [False, True, True]])
    assert torch.autograd.gradcheck(lambda z: commitment_loss(z, q, mask), x.requires_grad_())
    q.requires_grad_()
    commitment_loss(x, q).backward()
    assert q.grad is None


@pytest.mark.parametrize("dtype", HALVES)
def test_half_tokens_are_squared_in_float32(dtype):
    # 300^2 does not fit float16, and 257 + 1 of them do not add up in bfloat16.
    x = torch.full((258, 4), 300.0, dtype=dtype, requires_grad=True)
    loss = commitment_loss(x, torch.zeros(258, 4), weight=1.0)
    assert loss.dtype == torch.float32
    assert loss.item() == x[0, 0].item() ** 2
    loss.backward()
    assert x.grad.dtype == dtype
    assert x.grad.isfinite().all()


def test_strides_do_not_matter_to_commitment():
    x, q = pair(0, 4, 5, 6)
    mask = torch.rand(6, 5) < 0.5
    found = commitment_loss(x.permute(2, 1, 0), q.permute(2, 1, 0), mask)
    expected = commitment_loss(x.permute(2, 1, 0).contiguous(), q.permute(2, 1, 0).contiguous(), mask.clone())
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("error", "says", "x", "q", "mask"),
    [
        (TypeError, "floating", torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3), None),
        (TypeError, "torch.Tensor", [[1.0]], torch.zeros(1, 1), None),
        (
            TypeError,
            r"x .*got a list of 1: .*torch.stack\(losses\).sum\(\)",
            [torch.zeros(2, 3)],
            torch.zeros(2, 3),
            None,
        ),
        (TypeError, "write quantized.quantized", torch.zeros(2, 3), Quantized(*torch.zeros(3, 2, 3)), None),
        (ValueError, "look the codes up", torch.zeros(2, 3), torch.zeros(3, 3), None),
        (ValueError, "look the codes up", torch.zeros(2, 3), torch.zeros(3), None),
        (TypeError, "boolean", torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2)),
        (ValueError, "one entry for each token", torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(3) > 0),
        (ValueError, "one entry for each token", torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2, 3) > 0),
    ],
)
def test_commitment_refuses(error, says, x, q, mask):
    with pytest.raises(error, match=says):
        commitment_loss(x, q, mask)


# ---- cosine regression ----


@given(seed=seeds, batch=st.integers(1, 6), dim=st.integers(1, 6))
def test_cosine_is_the_squared_distance_of_unit_vectors(seed, batch, dim):
    p, t = pair(seed, batch, dim)
    assert cosine_regression_loss(p, t).item() == pytest.approx(slow_cosine(p, t), rel=1e-11, abs=1e-13)


@given(seed=seeds, batch=st.integers(1, 6), dim=st.integers(1, 6), scale=st.sampled_from([2.0**-20, 0.5, 2.0**20]))
def test_cosine_does_not_see_lengths_and_stays_in_range(seed, batch, dim, scale):
    p, t = pair(seed, batch, dim)
    loss = cosine_regression_loss(p, t)
    assert -1e-14 <= loss.item() <= 4 + 1e-14
    torch.testing.assert_close(cosine_regression_loss(scale * p, t / scale), loss, rtol=1e-14, atol=1e-14)
    # A loss that does not depend on the length has a gradient across the vector only.
    p.requires_grad_()
    cosine_regression_loss(p, t).backward()
    torch.testing.assert_close((p.grad * p).sum(-1), torch.zeros(batch, dtype=p.dtype), rtol=0, atol=1e-14)


def test_cosine_ends():
    p = pair(0, 5, 4)[0]
    torch.testing.assert_close(cosine_regression_loss(p, 3 * p).item(), 0.0, rtol=0, atol=1e-15)
    torch.testing.assert_close(cosine_regression_loss(p, -2 * p).item(), 4.0, rtol=0, atol=1e-15)


def test_cosine_is_symmetric_and_means_over_any_leading_shape():
    p, t = pair(0, 2, 3, 4)
    whole = cosine_regression_loss(p, t)
    assert whole.item() == pytest.approx(slow_cosine(p.flatten(0, 1), t.flatten(0, 1)), rel=1e-12)
    torch.testing.assert_close(cosine_regression_loss(t, p), whole, rtol=1e-15, atol=0)
    assert cosine_regression_loss(p[0, 0], t[0, 0]).item() == pytest.approx(slow_cosine(p[0, :1], t[0, :1]), rel=1e-12)


def test_cosine_gradient_passes_to_both():
    p, t = (z.requires_grad_() for z in pair(0, 3, 4).unbind())
    assert torch.autograd.gradcheck(cosine_regression_loss, (p, t))
    cosine_regression_loss(p, t).backward()
    assert p.grad.abs().sum() > 0
    assert t.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", HALVES)
def test_cosine_of_halves_is_that_of_their_float32(dtype):
    p, t = pair(0, 6, 8, dtype=dtype) * 200  # the square of the length does not fit float16
    loss = cosine_regression_loss(p.requires_grad_(), t)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, cosine_regression_loss(p.float(), t.float()), rtol=0, atol=0)
    loss.backward()
    assert p.grad.dtype == dtype
    assert p.grad.isfinite().all()
    # One half and one float64: neither is rounded to the other's dtype.
    assert cosine_regression_loss(p, t.double()).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_a_zero_vector_has_loss_two_and_a_finite_gradient(dtype):
    p = torch.zeros(1, 4, dtype=dtype, requires_grad=True)
    t = torch.ones(1, 4, dtype=dtype, requires_grad=True)
    loss = cosine_regression_loss(p, t)
    assert loss.item() == 2
    loss.backward()
    assert t.grad.isfinite().all()
    assert not p.grad.isnan().any()


@pytest.mark.parametrize(
    ("error", "says", "p", "t"),
    [
        (TypeError, "prediction must have a floating", torch.ones(2, 3).long(), torch.ones(2, 3)),
        (TypeError, "target must have a floating", torch.ones(2, 3), torch.ones(2, 3).long()),
        (TypeError, "torch.Tensor", torch.ones(2, 3), None),
        (TypeError, r"write student\(view\)\[0\]", (torch.ones(2, 3), [torch.ones(2, 3)]), torch.ones(2, 3)),
        (TypeError, r"target .*torch.stack\(losses\).mean\(\)", torch.ones(2, 3), [torch.ones(2, 3)]),
        (ValueError, "same output width", torch.ones(2, 3), torch.ones(2, 4)),
        (ValueError, "same output width", torch.ones(2, 3), torch.ones(3)),
        (ValueError, "got single numbers", torch.tensor(1.0), torch.tensor(1.0)),
        (ValueError, "at least one pair", torch.ones(0, 3), torch.ones(0, 3)),
    ],
)
def test_cosine_refuses(error, says, p, t):
    with pytest.raises(error, match=says):
        cosine_regression_loss(p, t)
