"""Gradient estimators: the value is the code to the bit, the gradient that of the formula written as a matrix."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd.functional import jacobian
from vector_quantize_pytorch.vector_quantize_pytorch import rotate_to

from vqssl.functional import ESTIMATORS, rotation_trick, straight_through

seeds = st.integers(0, 2**31 - 1)
dtypes = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])


def pair(seed, *shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(2, *shape, generator=generator, dtype=torch.float64) * 3).to(dtype)


def gradient(estimator, x, q, upstream):
    """Return the gradient of <upstream, estimator(x, q)> with respect to x."""
    x = x.detach().clone().requires_grad_()
    return torch.autograd.grad(estimator(x, q), x, upstream)[0]


def rotation_matrix(x, q):
    """Return the paper's lambda R for one token, as a matrix in float64."""
    u, v = x / x.norm(), q / q.norm()
    r = (u + v) / (u + v).norm()
    return q.norm() / x.norm() * (torch.eye(len(x), dtype=x.dtype) - 2 * torch.outer(r, r) + 2 * torch.outer(v, u))


def assert_carries(matrix, x, q, tolerance):
    """Assert that `matrix` is a scaling times an orthogonal map, and takes x to q."""
    scaled = matrix / (q.norm() / x.norm())
    torch.testing.assert_close(scaled.T @ scaled, torch.eye(len(x), dtype=x.dtype), rtol=0, atol=tolerance)
    torch.testing.assert_close(scaled @ (x / x.norm()), q / q.norm(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", ESTIMATORS)
@given(seed=seeds, shape=st.lists(st.integers(0, 4), max_size=2), dim=st.integers(1, 9), dtype=dtypes)
def test_value_is_the_code_to_the_bit(name, seed, shape, dim, dtype):
    # A large token and a small code: z + (q - z) would round the code.
    x, q = pair(seed, *shape, dim, dtype=dtype)
    assert ESTIMATORS[name](1000 * x, q).equal(q)
    assert ESTIMATORS[name](1000 * x, q).dtype == dtype


@pytest.mark.parametrize("name", ESTIMATORS)
def test_half_precision_tokens_take_float32_codes(name):
    x, q = pair(0, 6, 4, dtype=torch.bfloat16)
    q = q.float() + 1e-3
    y = ESTIMATORS[name](x.requires_grad_(), q)
    assert y.dtype == torch.bfloat16
    assert y.equal(q.bfloat16())
    y.sum().backward()
    assert x.grad.dtype == torch.bfloat16
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("name", ESTIMATORS)
def test_no_gradient_reaches_the_code(name):
    x, q = (t.requires_grad_() for t in pair(0, 3, 4).unbind())
    ESTIMATORS[name](x, q).sum().backward()
    assert x.grad is not None
    assert q.grad is None


@pytest.mark.parametrize("name", ESTIMATORS)
def test_token_with_nan_yields_nan_and_changes_no_other(name):
    x, q = pair(0, 3, 4)
    x[1, 2] = torch.nan
    y = ESTIMATORS[name](x, q)
    assert y[1].isnan().any()
    assert y[[0, 2]].equal(q[[0, 2]])


@given(seed=seeds, dtype=dtypes)
def test_straight_through_passes_the_gradient_unchanged(seed, dtype):
    x, q = pair(seed, 3, 5, dtype=dtype)
    upstream = pair(seed + 1, 3, 5, dtype=dtype)[0]
    assert gradient(straight_through, x, q, upstream).equal(upstream)


@given(seed=seeds, dim=st.integers(2, 8))
def test_rotation_gradient_is_the_papers_matrix(seed, dim):
    x, q = pair(seed, dim)
    found = jacobian(lambda z: rotation_trick(z, q), x)
    torch.testing.assert_close(found, rotation_matrix(x, q), rtol=1e-9, atol=1e-9)
    assert_carries(found, x, q, 1e-12)


def test_rotation_keeps_the_angle_between_gradient_and_code():
    x, q = pair(3, 7, 6)
    upstream = pair(4, 7, 6)[0]
    cosine = torch.nn.functional.cosine_similarity
    torch.testing.assert_close(cosine(gradient(rotation_trick, x, q, upstream), x), cosine(upstream, q))


def test_rotation_equals_vector_quantize_pytorch():
    x, q = pair(0, 4, 6, 8)
    upstream = pair(1, 4, 6, 8)[0]
    # Its norms carry an eps of 1e-6.
    torch.testing.assert_close(
        gradient(rotation_trick, x, q, upstream), gradient(rotate_to, x, q, upstream), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("zero", ["token", "code", "both"])
def test_zero_vectors_pass_the_gradient_unchanged(zero):
    x, q = pair(0, 3, 4)
    if zero != "code":
        x[1] = 0
    if zero != "token":
        q[1] = 0
    upstream = pair(1, 3, 4)[0]
    found = gradient(rotation_trick, x, q, upstream)
    assert found[1].equal(upstream[1])
    for row in (0, 2):
        torch.testing.assert_close(found[row], rotation_matrix(x[row], q[row]).T @ upstream[row])


@given(seed=seeds, dim=st.integers(1, 8), factor=st.sampled_from([0.37, 1.0, 5.0]))
def test_equal_directions_are_only_scaled(seed, dim, factor):
    x = pair(seed, dim)[0]
    found = jacobian(lambda z: rotation_trick(z, factor * x), x)
    torch.testing.assert_close(found, factor * torch.eye(dim, dtype=x.dtype), rtol=0, atol=1e-13 * max(1, factor))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(
    seed=seeds,
    dim=st.integers(1, 8),
    factor=st.sampled_from([0.37, 1.0, 5.0]),
    off=st.sampled_from([0.0, 1e-9, 1e-7, 1e-6, 1e-4, 1e-2]),
)
def test_nearly_opposite_directions_are_rotated_and_scaled(dtype, seed, dim, factor, off):
    """Despite cancellation in x/|x| + q/|q|."""
    x, aside = pair(seed, dim, dtype=dtype)
    q = -factor * x + off * aside
    found = jacobian(lambda z: rotation_trick(z, q), x)
    assert_carries(found, x, q, 40 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dim", [1, 2, 3, 64])
def test_exactly_opposite_directions_keep_the_gradients_length(dim, dtype):
    """For many tokens: in few dimensions the bisector is sometimes only rounding along the chord."""
    x, upstream = pair(0, 4000, dim, dtype=dtype)
    q = -0.37 * x
    found = gradient(rotation_trick, x, q, upstream)
    ratio = found.norm(dim=-1) / upstream.norm(dim=-1) / (q.norm(dim=-1) / x.norm(dim=-1))
    torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=0, atol=40 * torch.finfo(dtype).eps)
