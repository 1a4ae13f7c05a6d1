"""Cross-entropy of codes against a loop, and against torch's."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from vqssl.functional import code_cross_entropy

seeds = st.integers(0, 2**31 - 1)
K = 4


def draw(seed, *shape):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(*shape, K, generator=generator, dtype=torch.float64)
    return logits, torch.randint(-1, K, shape, generator=generator)


def slow_loss(logits, target):
    losses = []
    for row, shares in zip(logits.reshape(-1, K).tolist(), target.reshape(-1, K).tolist(), strict=True):
        if any(shares):
            total = math.log(sum(math.exp(logit) for logit in row))
            losses.append(sum(share * (total - logit) for share, logit in zip(shares, row, strict=True)))
    return sum(losses) / max(len(losses), 1)


def one_hot(target):
    return F.one_hot(target.clamp_min(0), K).double() * (target >= 0)[..., None]


@given(seed=seeds, shape=st.lists(st.integers(0, 4), min_size=0, max_size=3))
def test_loss_equals_the_loop(seed, shape):
    logits, target = draw(seed, *shape)
    expected = pytest.approx(slow_loss(logits, one_hot(target)), rel=1e-12)
    assert code_cross_entropy(logits, target).item() == expected
    assert code_cross_entropy(logits, one_hot(target)).item() == expected
    shares = torch.rand(*shape, K, dtype=torch.float64).softmax(-1) * (target >= 0)[..., None]
    assert code_cross_entropy(logits, shares).item() == pytest.approx(slow_loss(logits, shares), rel=1e-12)


@given(seed=seeds)
def test_loss_and_gradient_are_those_of_torch(seed):
    logits, target = draw(seed, 7)
    target[0] = 1
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss, expected = code_cross_entropy(ours, target), F.cross_entropy(theirs, target, ignore_index=-1)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


@given(seed=seeds)
def test_gradient_is_that_of_the_divergence(seed):
    logits, _ = draw(seed, 5)
    shares = torch.randn(5, K, dtype=torch.float64).softmax(-1)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    code_cross_entropy(ours, shares).backward()
    F.kl_div(theirs.log_softmax(-1), shares, reduction="batchmean").backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_several_codebooks_are_one_more_axis():
    logits, target = draw(3, 6, 2)
    each = [code_cross_entropy(logits[:, group], target[:, group]) for group in range(2)]
    counts = (target >= 0).sum(0)
    expected = (each[0] * counts[0] + each[1] * counts[1]) / counts.sum()
    torch.testing.assert_close(code_cross_entropy(logits, target), expected)


def test_rows_without_a_target_get_no_gradient_and_none_gives_0():
    logits, target = draw(0, 6)
    target[::2] = -1
    logits.requires_grad_()
    (gradient,) = torch.autograd.grad(code_cross_entropy(logits, target), logits)
    assert (gradient[target < 0] == 0).all()
    assert (gradient[target >= 0] != 0).all()
    for nothing in (torch.full((6,), -1), torch.zeros(6, K)):
        loss = code_cross_entropy(logits, nothing)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert loss.item() == 0
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_logit_of_minus_infinity_with_share_0_costs_nothing():
    logits = torch.tensor([[0.0, -torch.inf, 0.0, 0.0]], requires_grad=True)
    loss = code_cross_entropy(logits, torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    assert loss.item() == pytest.approx(math.log(3))
    loss.backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_logits_give_the_loss_of_their_values_in_float32(dtype):
    logits, target = draw(0, 9)
    half = (100 * logits).to(dtype)
    assert torch.equal(code_cross_entropy(half, target), code_cross_entropy(half.float(), target))


@pytest.mark.parametrize(
    ("error", "says", "logits", "target"),
    [
        (TypeError, "logits must have a floating", torch.ones(2, K).long(), torch.zeros(2).long()),
        (TypeError, "target must be an integer", torch.ones(2, K), torch.zeros(2).bool()),
        (TypeError, "target must be an integer", torch.ones(2, K), None),
        (ValueError, "one index for each row", torch.ones(2, K), torch.zeros(3).long()),
        (ValueError, "the shape of the logits", torch.ones(2, K), torch.zeros(2, K + 1)),
        (ValueError, "from -1 .* to 3", torch.ones(2, K), torch.full((2,), K)),
        (ValueError, "at least one code", torch.ones(2, 0), torch.zeros(2).long()),
    ],
)
def test_refusals_name_the_rule(error, says, logits, target):
    with pytest.raises(error, match=says):
        code_cross_entropy(logits, target)
