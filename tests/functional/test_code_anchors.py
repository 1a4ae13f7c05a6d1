"""Anchors and their loss against formulas a view at a time."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cosine_similarity

from vqssl.functional import anchor_loss, code_anchor, cosine_regression_loss

seeds = st.integers(0, 2**31 - 1)


@given(seed=seeds, places=st.lists(st.integers(1, 3), min_size=1, max_size=3))
def test_anchor_is_the_standardised_mean_of_the_codes_that_are_there(seed, places):
    generator = torch.Generator().manual_seed(seed)
    quantized = torch.randn(4, *places, 6, generator=generator, dtype=torch.float64)
    indices = torch.randint(-1, 3, (4, *places), generator=generator)
    quantized[indices < 0] = 0
    found = code_anchor(quantized, indices)
    for view, codes, k in zip(found, quantized, indices, strict=True):
        there = codes[k >= 0]
        if not len(there):
            assert torch.equal(view, torch.zeros_like(view))
            continue
        mean = there.mean(0)
        torch.testing.assert_close(view, (mean - mean.mean()) / (mean.var(unbiased=False) + 1e-5).sqrt())


@given(seed=seeds)
def test_loss_is_that_of_the_views_that_have_a_target(seed):
    generator = torch.Generator().manual_seed(seed)
    prediction, target = torch.randn(2, 6, 5, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(anchor_loss(prediction, target), cosine_regression_loss(prediction, target))
    kept = torch.rand(6, generator=generator) < 0.6
    kept[0] = True
    prediction.requires_grad_()
    loss = anchor_loss(prediction, target * kept[:, None])
    torch.testing.assert_close(loss, 2 - 2 * cosine_similarity(prediction[kept], target[kept]).mean())
    (gradient,) = torch.autograd.grad(loss, prediction)
    assert (gradient[~kept] == 0).all()


def test_no_target_at_all_gives_0_and_a_gradient_of_zeros():
    prediction = torch.randn(3, 4, requires_grad=True)
    loss = anchor_loss(prediction, torch.zeros(3, 4))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(prediction.grad, torch.zeros(3, 4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_equals_its_values_in_float32(dtype):
    prediction, target = (200 * torch.randn(2, 6, 8)).to(dtype)
    assert torch.equal(anchor_loss(prediction, target), anchor_loss(prediction.float(), target.float()))


@pytest.mark.parametrize(
    ("error", "says", "call"),
    [
        (ValueError, r"quantized\[None\] for one view", lambda: code_anchor(torch.ones(3, 4), torch.ones(3).long())),
        (ValueError, "one entry for each token", lambda: code_anchor(torch.ones(1, 3, 4), torch.ones(1, 2).long())),
        (TypeError, "floating", lambda: code_anchor(torch.ones(1, 3, 4).long(), torch.ones(1, 3).long())),
        (ValueError, "width of the target", lambda: anchor_loss(torch.ones(2, 3), torch.ones(2, 4))),
    ],
)
def test_refusals_name_the_rule(error, says, call):
    with pytest.raises(error, match=says):
        call()
