"""The diversity loss: Eq. 4 of wav2vec 2.0 in Python, its ends, masks and gradients."""

import math

import pytest
import torch

from vqssl.functional import diversity_loss


def slow(logits, form):
    """Return the loss of logits (N, G, K), number by number."""
    count, groups, codes = logits.shape
    total = 0.0
    for group in range(groups):
        mean = [0.0] * codes
        for token in logits[:, group].tolist():
            weights = [math.exp(x) for x in token]
            mean = [m + w / sum(weights) / count for m, w in zip(mean, weights, strict=True)]
        entropy = -sum(p * math.log(p) for p in mean)
        total += -entropy if form == "entropy" else codes - math.exp(entropy)
    return total / (groups * codes)


@pytest.mark.parametrize("form", ["entropy", "perplexity"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 1, 3), (4, 2, 7)])
def test_equals_the_formula(form, shape):
    logits = 3 * torch.randn(shape, dtype=torch.float64)
    assert diversity_loss(logits, form=form).item() == pytest.approx(slow(logits, form), rel=1e-12)


def test_even_use_is_the_minimum_also_of_sharp_tokens():
    sharp = 50 * torch.eye(4, dtype=torch.float64)[:, None]
    flat = torch.zeros(4, 1, 4, dtype=torch.float64)
    for logits in (sharp, flat):
        assert diversity_loss(logits).item() == pytest.approx(-math.log(4) / 4)
        assert diversity_loss(logits, form="perplexity").item() == pytest.approx(0, abs=1e-12)
    one = 50 * torch.eye(4, dtype=torch.float64)[:1, None]
    assert diversity_loss(one).item() == pytest.approx(0, abs=1e-12)
    assert diversity_loss(one, form="perplexity").item() == pytest.approx(0.75)


@pytest.mark.parametrize("form", ["entropy", "perplexity"])
def test_descent_evens_the_use_of_codes(form):
    logits = (torch.randn(64, 2, 8) + torch.linspace(0, 3, 8)).requires_grad_()
    for _ in range(300):
        (gradient,) = torch.autograd.grad(diversity_loss(logits, form=form), logits)
        logits = (logits - 300 * gradient).detach().requires_grad_()
    torch.testing.assert_close(logits.softmax(-1).mean(0), torch.full((2, 8), 0.125), rtol=0.05, atol=0)


def test_gradient_is_that_of_finite_differences():
    logits = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    for form in ("entropy", "perplexity"):
        assert torch.autograd.gradcheck(lambda x, form=form: diversity_loss(x, form=form), logits)


def test_gradient_is_finite_where_a_share_underflows():
    logits = torch.tensor([[[0.0, -300.0]]], requires_grad=True)
    diversity_loss(logits).backward()
    assert logits.grad.isfinite().all()


def test_masked_equals_truncated():
    logits = torch.randn(4, 5, 2, 6)
    mask = torch.rand(4, 5) < 0.6
    kept = logits[mask].requires_grad_()
    logits[~mask] = math.nan
    logits.requires_grad_()
    found, expected = diversity_loss(logits, mask), diversity_loss(kept)
    torch.testing.assert_close(found, expected)
    found.backward()
    expected.backward()
    torch.testing.assert_close(logits.grad[mask], kept.grad)
    assert (logits.grad[~mask] == 0).all()


@pytest.mark.parametrize("count", [0, 3])
def test_batch_without_tokens_that_count_has_loss_zero(count):
    logits = torch.randn(count, 2, 4, requires_grad=True)
    loss = diversity_loss(logits, torch.zeros(count, dtype=torch.bool))
    assert loss.item() == 0
    loss.backward()
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_half_precision_is_computed_in_float32():
    logits = torch.randn(9, 1, 4).half()
    torch.testing.assert_close(diversity_loss(logits), diversity_loss(logits.float()), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((torch.ones(3, 1, 4).long(),), TypeError, "floating dtype"),
        ((torch.ones(4),), ValueError, r"for one codebook write logits\[..., None, :\]"),
        ((torch.ones(9, 4),), ValueError, r"for one codebook write logits\[..., None, :\]"),
        ((torch.ones(3, 1, 0),), ValueError, r"an axis of tokens, of codebooks and of codes, got shape \(3, 1, 0\)"),
        ((torch.ones(3, 1, 4), torch.ones(3, 1, dtype=torch.bool)), ValueError, r"shape \(3,\), got \(3, 1\)"),
    ],
)
def test_refusals(arguments, error, words):
    with pytest.raises(error, match=words):
        diversity_loss(*arguments)


def test_unknown_form_is_refused():
    with pytest.raises(ValueError, match="form must be 'entropy' or 'perplexity', got 'gini'"):
        diversity_loss(torch.ones(3, 1, 4), form="gini")
