"""Sinkhorn-Knopp: the iteration in plain probabilities, its fixed point, masks, and scores of any size."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vqssl.functional import code_cross_entropy, sinkhorn


def slow(scores, epsilon, iterations):
    """Return the shares by scaling a matrix, entry by entry."""
    q = [[math.exp(score / epsilon) for score in row] for row in scores.tolist()]
    for _ in range(iterations):
        columns = [sum(row[j] for row in q) for j in range(len(q[0]))]
        q = [[value / column for value, column in zip(row, columns, strict=True)] for row in q]
        q = [[value / sum(row) for value in row] for row in q]
    return torch.tensor(q, dtype=torch.float64)


@given(tokens=st.integers(1, 7), codes=st.integers(1, 5), iterations=st.integers(1, 6), seed=st.integers(0, 2**31 - 1))
def test_equals_scaling_of_a_matrix(tokens, codes, iterations, seed):
    scores = torch.randn(tokens, codes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = sinkhorn(scores, epsilon=0.3, iterations=iterations)
    torch.testing.assert_close(found, slow(scores, 0.3, iterations), rtol=1e-9, atol=1e-12)


def test_codes_get_equal_shares_and_tokens_sum_to_one():
    scores = torch.randn(30, 6, dtype=torch.float64)
    shares = sinkhorn(scores, epsilon=0.5, iterations=300)
    torch.testing.assert_close(shares.sum(0), torch.full((6,), 5.0).double())
    torch.testing.assert_close(shares.sum(1), torch.ones(30).double())
    # Eq. 5: each 2 x 2 minor has the ratio of exp(S / epsilon), which scaling of rows and columns keeps.
    logs, expected = shares.log(), scores / 0.5
    for table in (logs, expected):
        table -= table.mean(0)
        table -= table.mean(1, keepdim=True)
    torch.testing.assert_close(logs, expected)


def test_shape_is_that_of_the_scores():
    scores = torch.randn(2, 3, 4, 5)
    assert torch.equal(sinkhorn(scores).flatten(0, 2), sinkhorn(scores.flatten(0, 2)))
    # Of one token each code gets a fifth.
    torch.testing.assert_close(sinkhorn(scores[0, 0, 0]), torch.full((5,), 0.2), rtol=1e-5, atol=0)


def test_masked_equals_truncated_and_broken_tokens_have_no_part():
    scores = torch.randn(4, 5, 6)
    mask = torch.rand(4, 5) < 0.6
    expected = sinkhorn(scores[mask])
    scores[~mask] = math.nan
    found = sinkhorn(scores, mask)
    torch.testing.assert_close(found[mask], expected)
    assert (found[~mask] == 0).all()
    assert code_cross_entropy(torch.zeros(4, 5, 6), found).item() == pytest.approx(math.log(6), rel=1e-5)
    # The same tokens without a mask: NaN, and no change in the others.
    found = sinkhorn(scores)
    torch.testing.assert_close(found[mask], expected)
    assert found[~mask].isnan().all()


@pytest.mark.parametrize("count", [0, 3])
def test_batch_without_tokens_that_count(count):
    found = sinkhorn(torch.randn(count, 4), torch.zeros(count, dtype=torch.bool))
    assert torch.equal(found, torch.zeros(count, 4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scores_of_any_size_give_finite_shares(dtype):
    scores = torch.tensor([[3e4, 0.0, -3e4], [3e4, 1.0, 0.0], [2e4, 0.0, -6e4]], dtype=dtype)
    found = sinkhorn(scores, epsilon=0.05)
    assert found.dtype == torch.float32
    assert found.isfinite().all()
    torch.testing.assert_close(found.sum(1), torch.ones(3))
    # A code that fits no token well still gets its share.
    assert (sinkhorn(scores, epsilon=0.05, iterations=50).sum(0) > 0.5).all()


def test_no_gradient_passes():
    scores = torch.randn(4, 3, requires_grad=True)
    assert not sinkhorn(scores).requires_grad


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((torch.ones(3, 4).long(),), TypeError, "floating dtype"),
        ((torch.ones(3, 0),), ValueError, "at least one code"),
        ((torch.tensor(1.0),), ValueError, "at least one code"),
        ((torch.ones(3, 4), torch.ones(4, dtype=torch.bool)), ValueError, "mask must have one entry for each token"),
    ],
)
def test_refusals(arguments, error, words):
    with pytest.raises(error, match=words):
        sinkhorn(*arguments)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"epsilon": 0}, "epsilon must be above 0"), ({"epsilon": -1}, "epsilon"), ({"iterations": 0}, "iterations")],
)
def test_refused_options(options, words):
    with pytest.raises(ValueError, match=words):
        sinkhorn(torch.ones(3, 4), **options)
