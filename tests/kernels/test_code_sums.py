"""``code_sums`` against a loop over tokens in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels.material import code_sums_by_loop
from vqssl import kernels


@given(
    st.integers(0, 40),
    st.integers(1, 12),
    st.integers(1, 6),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    st.sampled_from([float("nan"), float("inf"), 1.0]),
    st.integers(0, 2**20),
)
def test_equals_the_loop_over_tokens(n, size, dim, dtype, ignored, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, dim, generator=generator).to(dtype)
    indices = torch.randint(-1, size, (n,), generator=generator)
    x[indices < 0] = ignored
    counts, sums = kernels.code_sums(x, indices, size)
    expected_counts, expected_sums = code_sums_by_loop(x, indices, size)
    assert counts.tolist() == expected_counts
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert counts.dtype == sums.dtype == wide
    assert sums.shape == (size, dim)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(sums.double(), expected_sums, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("value", [0.1, 1e-3, 3e4])
def test_sum_of_many_tokens_keeps_its_bound(dtype, value):
    n = 2_000_000
    x = torch.full((n, 1), value).to(dtype)
    _, sums = kernels.code_sums(x, torch.zeros(n, dtype=torch.int64), 1)
    exact = n * x[0].double().item()
    assert abs(sums.item() - exact) <= 2**-12 * exact


def test_sums_in_pieces_keep_the_bound_for_each_code():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50_000, 4, generator=generator) + 1
    indices = torch.randint(-1, 7, (50_000,), generator=generator)
    _, sums = kernels.code_sums(x, indices, 7)
    for code in range(7):
        own = x[indices == code].double()
        assert ((sums[code] - own.sum(0)).abs() <= 2**-12 * own.abs().sum(0)).all()


def test_half_precision_tokens_are_summed_in_float32():
    x = torch.ones(5000, 1, dtype=torch.float16)  # float16 stops counting at 2048
    counts, sums = kernels.code_sums(x, torch.zeros(5000, dtype=torch.int64), 1)
    assert counts.item() == sums.item() == 5000


def test_counts_are_exact_beyond_the_integers_of_float32():
    n = 2**24 + 4
    counts, _ = kernels.code_sums(torch.zeros(n, 1), torch.zeros(n, dtype=torch.int64), 1)
    assert counts.item() == n


def test_nan_affects_only_the_sum_of_its_own_code():
    x = torch.tensor([[1.0], [float("nan")], [2.0]])
    counts, sums = kernels.code_sums(x, torch.tensor([0, 1, 0]), 3)
    assert counts.tolist() == [2, 1, 0]
    assert sums[0].item() == 3
    assert sums[1].isnan()
    assert sums[2].item() == 0


def test_equal_input_gives_equal_bits():
    x, indices = torch.randn(5000, 16), torch.randint(-1, 64, (5000,))
    first = kernels.code_sums(x, indices, 64)
    for _ in range(3):
        again = kernels.code_sums(x.clone(), indices.clone(), 64)
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("n", [0, 9])
def test_passes_torchs_operator_checks(dtype, n):
    x, indices = torch.randn(n, 3).to(dtype), torch.randint(-1, 4, (n,))
    torch.library.opcheck(torch.ops.vqssl.code_sums.default, (x, indices, 4))
