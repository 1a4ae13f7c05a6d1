"""Cosine regression against a loop over pairs of vectors."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vqssl.functional import cosine_regression_loss

seeds = st.integers(0, 2**31 - 1)
HALVES = (torch.float16, torch.bfloat16)


def pair(seed, *shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, *shape, generator=generator, dtype=torch.float64).to(dtype)


def slow_cosine(p, t):
    """Return the mean squared distance of unit vectors."""
    losses = []
    for a, b in zip(p.tolist(), t.tolist(), strict=True):
        length_a, length_b = math.hypot(*a), math.hypot(*b)
        losses.append(sum((x / length_a - y / length_b) ** 2 for x, y in zip(a, b, strict=True)))
    return sum(losses) / len(losses)


@given(seed=seeds, batch=st.integers(1, 6), dim=st.integers(1, 6))
def test_loss_is_the_squared_distance_of_unit_vectors(seed, batch, dim):
    p, t = pair(seed, batch, dim)
    assert cosine_regression_loss(p, t).item() == pytest.approx(slow_cosine(p, t), rel=1e-11, abs=1e-13)


@given(seed=seeds, batch=st.integers(1, 6), dim=st.integers(1, 6), scale=st.sampled_from([2.0**-20, 0.5, 2.0**20]))
def test_lengths_do_not_matter_and_the_loss_is_from_0_to_4(seed, batch, dim, scale):
    p, t = pair(seed, batch, dim)
    loss = cosine_regression_loss(p, t)
    assert -1e-14 <= loss.item() <= 4 + 1e-14
    torch.testing.assert_close(cosine_regression_loss(scale * p, t / scale), loss, rtol=1e-14, atol=1e-14)
    # A loss that does not depend on the length has a gradient across the vector only.
    p.requires_grad_()
    cosine_regression_loss(p, t).backward()
    torch.testing.assert_close((p.grad * p).sum(-1), torch.zeros(batch, dtype=p.dtype), rtol=0, atol=1e-14)


def test_equal_directions_give_0_and_opposite_ones_4():
    p = pair(0, 5, 4)[0]
    torch.testing.assert_close(cosine_regression_loss(p, 3 * p).item(), 0.0, rtol=0, atol=1e-15)
    torch.testing.assert_close(cosine_regression_loss(p, -2 * p).item(), 4.0, rtol=0, atol=1e-15)


def test_loss_is_symmetric_and_averages_over_any_leading_shape():
    p, t = pair(0, 2, 3, 4)
    whole = cosine_regression_loss(p, t)
    assert whole.item() == pytest.approx(slow_cosine(p.flatten(0, 1), t.flatten(0, 1)), rel=1e-12)
    torch.testing.assert_close(cosine_regression_loss(t, p), whole, rtol=1e-15, atol=0)
    assert cosine_regression_loss(p[0, 0], t[0, 0]).item() == pytest.approx(slow_cosine(p[0, :1], t[0, :1]), rel=1e-12)


def test_gradient_reaches_prediction_and_target():
    p, t = (z.requires_grad_() for z in pair(0, 3, 4).unbind())
    assert torch.autograd.gradcheck(cosine_regression_loss, (p, t))
    cosine_regression_loss(p, t).backward()
    assert p.grad.abs().sum() > 0
    assert t.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_equals_its_values_in_float32(dtype):
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
def test_zero_vector_has_loss_2_and_a_finite_gradient(dtype):
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
def test_refusals_name_the_rule(error, says, p, t):
    with pytest.raises(error, match=says):
        cosine_regression_loss(p, t)
