"""straight_through and commitment_loss by index equal the same functions of the looked-up codes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vqssl.functional import commitment_loss, straight_through
from vqssl.functional.look_up import look_up


def setting(n, k, d, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, codes = (torch.randn(rows, d, generator=generator, dtype=torch.float64).to(dtype) for rows in (n, k))
    return x, torch.randint(k, (n,), generator=generator), codes


def quantise(x, indices, codes, mask=None):
    """Return the estimate and the loss by index, the loss as a plain sum."""
    count = max(x.numel(), 1) if mask is None else max(int(mask.sum()) * x.shape[-1], 1)
    quantized = straight_through(x, codes, indices=indices, mask=mask)
    return quantized, commitment_loss(x, codes, mask, weight=1.0, indices=indices) * count


@given(
    st.integers(0, 40),
    st.integers(1, 9),
    st.integers(1, 6),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    st.integers(0, 2**20),
)
def test_by_index_equals_the_functions_of_looked_up_codes(n, k, d, dtype, seed):
    x, indices, codes = setting(n, k, d, dtype, seed)
    codes = codes.to(torch.promote_types(dtype, torch.float32))
    x.requires_grad_()
    quantized = straight_through(x, codes, indices=indices)
    loss = commitment_loss(x, codes, indices=indices)
    through, expected = straight_through(x, codes[indices]), commitment_loss(x, codes[indices])
    assert torch.equal(quantized, through)
    assert loss.dtype == expected.dtype == codes.dtype
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-7)
    cotangents = [torch.randn(n, d).to(dtype), torch.tensor(0.3, dtype=loss.dtype)]
    (found,) = torch.autograd.grad([quantized, loss], x, cotangents)
    (wanted,) = torch.autograd.grad([through, expected], x, cotangents)
    tolerance = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 1e-6, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


def test_gradients_of_first_and_second_order():
    x, indices, codes = setting(5, 4, 3)
    x.requires_grad_()

    # The loss alone: finite differences of a straight-through code are zero, its gradient is not.
    def loss(x):
        return commitment_loss(x, codes, indices=indices)

    assert torch.autograd.gradcheck(loss, x)
    assert torch.autograd.gradgradcheck(loss, x)
    quantized, squared = quantise(x, indices, codes)
    (first,) = torch.autograd.grad(quantized.sum() + squared, x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    torch.testing.assert_close(first, 1 + 2 * (x - codes[indices]))
    torch.testing.assert_close(second, 4 * first)


def test_codes_and_result_may_change_before_the_backward_pass():
    x, indices, codes = setting(6, 4, 3)
    x.requires_grad_()
    wanted = 1 + 2 * (x - codes[indices]).detach()
    quantized, error = quantise(x, indices, codes)
    codes.add_(1)
    quantized.mul_(1.0)
    (quantized.sum() + error).backward()
    torch.testing.assert_close(x.grad, wanted)


def test_masked_tokens_give_zeros_and_tokens_without_a_code_give_nan():
    x, indices, codes = setting(4, 4, 3)
    x[1] = torch.nan
    indices[1], indices[2] = -1, -1
    mask = torch.tensor([True, False, True, True])
    quantized, error = quantise(x, indices, codes, mask)
    assert (quantized[1] == 0).all()
    assert quantized[2].isnan().all()
    assert torch.equal(quantized[[0, 3]], codes[indices[[0, 3]]])
    assert torch.equal(look_up(codes, indices, mask).nan_to_num(nan=7.0), quantized.nan_to_num(nan=7.0))
    assert error.isnan()
    assert not commitment_loss(x[:2], codes, mask[:2], indices=indices[:2]).isnan()


def test_training_step_holds_two_tensors_of_the_tokens_size():
    """The quantised tokens and the gradient, since autograd adds both gradients in place."""
    x, indices, codes = setting(100_000, 8, 16, torch.float32)
    x, gradient = x.requires_grad_(), torch.randn(100_000, 16)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        quantized, error = quantise(x, indices, codes)
        torch.autograd.backward([quantized, error], [gradient, torch.tensor(1.0)])
    running = most = 0
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        running += event.nbytes()
        most = max(most, running)
    size = x.numel() * 4
    assert 2 * size <= most < 2.6 * size


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x, k, c: straight_through(x, c, mask=k > 0), ValueError, "mask needs indices"),
        (lambda x, k, c: straight_through(x, c[:, :2], indices=k), ValueError, r"must be a codebook \(K, D\)"),
        (lambda x, k, c: straight_through(x, c[0], indices=k), ValueError, r"must be a codebook \(K, D\)"),
        (lambda x, k, c: straight_through(x, c, indices=k[:2]), ValueError, "one entry for each token"),
        (lambda x, k, c: straight_through(x, c, indices=k.double()), TypeError, "integer tensor"),
        (lambda x, k, c: commitment_loss(x, c[:, :2], indices=k), ValueError, r"must be a codebook \(K, D\)"),
        (lambda x, k, c: commitment_loss(x, c, k, indices=k), TypeError, "mask must be a boolean tensor"),
        (lambda x, k, c: straight_through(x, c, indices=k + 4), ValueError, r"from -1 \(masked\) to 3"),
        (lambda x, k, c: commitment_loss(x, c, indices=k - 5), ValueError, r"from -1 \(masked\) to 3"),
    ],
)
def test_refusals_name_the_rule(call, error, message):
    with pytest.raises(error, match=message):
        call(*setting(5, 4, 3))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_any_integer_dtype_gives_the_same(dtype):
    x, indices, codes = setting(5, 4, 3)
    assert torch.equal(
        straight_through(x, codes, indices=indices.to(dtype)), straight_through(x, codes, indices=indices)
    )
    assert torch.equal(commitment_loss(x, codes, indices=indices.to(dtype)), commitment_loss(x, codes, indices=indices))
