"""``look_up`` against straight-through codes and the commitment loss, and its gradient against finite differences."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vqssl import kernels
from vqssl.functional import commitment_loss, straight_through
from vqssl.functional.look_up import look_up


def setting(n, k, d, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, codes = (torch.randn(rows, d, generator=generator, dtype=torch.float64).to(dtype) for rows in (n, k))
    return x, torch.randint(k, (n,), generator=generator), codes


@given(
    st.integers(0, 40),
    st.integers(1, 9),
    st.integers(1, 6),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    st.integers(0, 2**20),
)
def test_equals_straight_through_and_commitment_loss(n, k, d, dtype, seed):
    x, indices, codes = setting(n, k, d, dtype, seed)
    codes = codes.to(torch.promote_types(dtype, torch.float32))
    x.requires_grad_()
    quantized, error = look_up(x, indices, codes)
    assert torch.equal(quantized, codes[indices].to(dtype))
    assert error.dtype == codes.dtype
    expected = commitment_loss(x, codes[indices], weight=1.0) * max(x.numel(), 1)
    torch.testing.assert_close(error, expected, rtol=1e-6, atol=1e-7)
    cotangent = torch.randn(n, d).to(dtype)
    (found,) = torch.autograd.grad([quantized, error], x, [cotangent, torch.tensor(0.3, dtype=error.dtype)])
    through = straight_through(x, codes[indices])
    (wanted,) = torch.autograd.grad([through, 0.3 * expected], x, [cotangent, torch.ones_like(expected)])
    tolerance = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 1e-6, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


def test_gradients_of_first_and_second_order():
    x, indices, codes = setting(5, 4, 3)
    x.requires_grad_()

    # The error alone: the value of a straight-through code does not move with its token, its gradient does.
    def error(x):
        return look_up(x, indices, codes)[1]

    assert torch.autograd.gradcheck(error, x)
    assert torch.autograd.gradgradcheck(error, x)
    quantized, squared = look_up(x, indices, codes)
    (first,) = torch.autograd.grad(quantized.sum() + squared, x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    torch.testing.assert_close(first, 1 + 2 * (x - codes[indices]))
    torch.testing.assert_close(second, 4 * first)


def test_codes_may_change_before_the_backward_pass():
    x, indices, codes = setting(6, 4, 3)
    x.requires_grad_()
    wanted = 2 * (x - codes[indices]).detach()
    quantized, error = look_up(x, indices, codes)
    codes.add_(1)
    quantized.detach().zero_()
    error.backward()
    torch.testing.assert_close(x.grad, wanted)


def test_masked_tokens_get_zeros_and_tokens_without_a_code_nan():
    x, indices, codes = setting(4, 4, 3)
    x[1] = 0.0
    indices[1], indices[2] = -1, -1
    mask = torch.tensor([True, False, True, True])
    quantized, error = look_up(x, indices, codes, mask)
    assert (quantized[1] == 0).all()
    assert quantized[2].isnan().all()
    assert torch.equal(quantized[[0, 3]], codes[indices[[0, 3]]])
    assert error.isnan()


def test_tiles_do_not_matter():
    x, indices, codes = setting(9000, 50, 64, torch.float32)  # three tiles, the last of them not full
    x.requires_grad_()
    quantized, error = look_up(x, indices, codes)
    assert torch.equal(quantized, codes[indices])
    expected = (x.double() - codes.double()[indices]).square().sum()
    torch.testing.assert_close(error.double(), expected, rtol=1e-6, atol=0)
    (quantized.sum() + error).backward()
    torch.testing.assert_close(x.grad, 1 + 2 * (x - codes[indices]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n", [0, 7])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_pass_torchs_operator_checks(n, dtype):
    x, indices, codes = setting(n, 4, 3, dtype)
    arguments = (x, indices, codes.float())
    torch.library.opcheck(torch.ops.vqssl.look_up.default, arguments)
    torch.library.opcheck(torch.ops.vqssl.look_up.default, (x.requires_grad_(), *arguments[1:]))
    gradient = (torch.randn_like(x).detach(), torch.tensor(0.5))
    torch.library.opcheck(torch.ops.vqssl.look_up_backward.default, (*gradient, x.detach(), *arguments[1:]))


def test_holds_nothing_of_the_tokens_size_but_its_result():
    x, indices, codes = setting(200_000, 8, 16, torch.float32)
    gradient = torch.ones_like(x), torch.tensor(1.0)
    for op, arguments in ((kernels.look_up, ()), (kernels.look_up_backward, gradient)):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            op(*arguments, x, indices, codes)
        sizes = sorted(event.self_cpu_memory_usage for event in profile.events() if event.self_cpu_memory_usage > 0)
        assert sizes[-1] == x.numel() * 4, "the profiler saw no result"
        assert sum(sizes[:-1]) < x.numel() * 4 / 4
