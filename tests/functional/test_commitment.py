"""The commitment loss against a loop over elements."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vqssl.functional import commitment_loss
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


@given(seed=seeds, tokens=st.integers(0, 9), dim=st.integers(1, 5), weight=st.sampled_from([0.0, 0.25, 3.0]))
def test_loss_equals_the_loop(seed, tokens, dim, weight):
    x, q = pair(seed, tokens, dim)
    mask = torch.rand(tokens) < 0.6
    everything = torch.ones(tokens, dtype=torch.bool)
    assert commitment_loss(x, q, mask, weight).item() == pytest.approx(slow_commitment(x, q, mask, weight), rel=1e-12)
    expected = pytest.approx(slow_commitment(x, q, everything, weight), rel=1e-12)
    assert commitment_loss(x, q, weight=weight).item() == expected
    assert commitment_loss(x, q, everything, weight).item() == expected


def test_weight_is_a_quarter_by_default():
    assert commitment_loss(torch.full((2, 3), 2.0), torch.zeros(2, 3)).item() == 1.0


@given(seed=seeds, shape=st.lists(st.integers(1, 3), min_size=1, max_size=3))
def test_masked_equals_truncated(seed, shape):
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
def test_loss_and_gradient_are_zero_where_no_token_counts(shape, mask):
    x = torch.full(shape, torch.nan, requires_grad=True)
    loss = commitment_loss(x, torch.full(shape, torch.nan), mask)
    assert loss.item() == 0
    loss.backward()
    assert x.grad.shape == shape
    assert (x.grad == 0).all()


def test_gradient_reaches_tokens_and_not_codes():
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
def test_refusals_name_the_rule(error, says, x, q, mask):
    with pytest.raises(error, match=says):
        commitment_loss(x, q, mask)
