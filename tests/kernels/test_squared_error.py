"""squared_error and its gradient: tiles, registration and memory."""

import pytest
import torch

from vqssl import kernels


def setting(n, k, d, dtype):
    generator = torch.Generator().manual_seed(0)
    x, codes = (torch.randn(rows, d, generator=generator, dtype=torch.float64).to(dtype) for rows in (n, k))
    return x, torch.randint(k, (n,), generator=generator), codes


def test_more_than_a_tile_of_any_strides_and_leading_axes_equals_the_formula():
    x, indices, codes = setting(9000, 50, 64, torch.float32)
    grad = torch.tensor(0.5)
    difference = x.double() - codes.double()[indices]
    strided = torch.stack([x, x], 1).reshape(-1, 64)[::2]
    for tokens in (x, strided, x.T.contiguous().T, x.reshape(90, 100, 64).movedim(0, 1)):
        k, expected = indices, difference
        if tokens.ndim == 3:
            k, expected = (t.reshape(90, 100, *t.shape[1:]).movedim(0, 1) for t in (indices, difference))
        found = kernels.squared_error(tokens, k, codes)
        torch.testing.assert_close(found.double(), expected.square().sum(), rtol=1e-6, atol=0)
        gradient = kernels.squared_error_backward(grad, tokens, k, codes)
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("n", "dtype"), [(0, torch.float16), (7, torch.float32)])
def test_operators_are_registered_properly(n, dtype):
    x, indices, codes = setting(n, 4, 3, dtype)
    arguments = (indices, codes.float())
    torch.library.opcheck(torch.ops.vqssl.squared_error.default, (x.requires_grad_(), *arguments))
    torch.library.opcheck(torch.ops.vqssl.squared_error_backward.default, (torch.tensor(0.5), x.detach(), *arguments))


def test_operators_hold_no_more_than_they_return():
    x, indices, codes = setting(100_000, 8, 16, torch.float32)
    for op, arguments, returned in (
        (kernels.squared_error, (), 0),
        (kernels.squared_error_backward, (torch.tensor(1.0),), x.numel() * 4),
    ):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            op(*arguments, x, indices, codes)
        sizes = [event.self_cpu_memory_usage for event in profile.events() if event.self_cpu_memory_usage > 0]
        assert sum(sizes) >= returned, "the profiler saw no result"
        assert sum(sizes) - returned < x.numel() * 4 / 4
