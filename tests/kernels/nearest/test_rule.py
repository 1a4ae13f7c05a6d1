"""The rule of the search: float64's answer, lowest index first, -1 for tokens that are not finite."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from tests.kernels.material import KINDS, material
from tests.kernels.nearest.brute_force import check
from vqssl import kernels

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
METRICS = ["euclidean", "cosine"]
nan, inf = float("nan"), float("inf")


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_float64_on_every_kind_of_material(kind, dtype, metric):
    for n, k, d in [(63, 65, 60), (257, 64, 3)]:
        found = check(*material(kind, n, k, d, dtype), metric)
        assert found.min() >= 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("n", [0, 1, 63, 257])
@pytest.mark.parametrize("k", [1, 64, 65, 1000])
@pytest.mark.parametrize("d", [1, 60, 129])
def test_equals_float64_at_odd_sizes(n, k, d, dtype):
    x, codes = material("random", n, k, d, dtype)
    if k == 1000:  # brute force in Python is slow
        x = x[:63]
    check(x, codes)


@given(
    st.integers(0, 70),
    st.integers(1, 70),
    st.integers(1, 9),
    st.sampled_from(DTYPES),
    st.sampled_from(DTYPES),
    st.sampled_from(METRICS),
    st.sampled_from(KINDS),
    st.integers(-6, 6),
    st.integers(0, 2**20),
)
@example(3, 70, 2, torch.float32, torch.float32, "cosine", "grid", 0, 0)
def test_equals_float64_at_any_size_dtype_and_scale(n, k, d, dtype, code_dtype, metric, kind, exponent, seed):
    x, codes = material(kind, n, k, d, torch.float64, seed)
    check((x * 2.0**exponent).to(dtype), codes.to(code_dtype), metric)


@given(
    st.integers(1, 40),
    st.integers(1, 70),
    st.floats(0, 1),
    st.sampled_from(METRICS),
    st.sampled_from(DTYPES),
    st.data(),
)
def test_nonfinite_tokens_get_minus_one_and_nonfinite_codes_are_never_chosen(n, k, share, metric, dtype, data):
    seed = data.draw(st.integers(0, 2**20))
    generator = torch.Generator().manual_seed(seed)
    x, codes = material("random", n, k, 4, dtype, seed)
    bad_rows, bad_codes = torch.rand(n, generator=generator) < 0.3, torch.rand(k, generator=generator) < share
    x[bad_rows, 1] = data.draw(st.sampled_from([nan, inf, -inf]))
    codes[bad_codes, 2] = data.draw(st.sampled_from([nan, inf, -inf]))
    found = check(x, codes, metric)
    assert (found[bad_rows] == -1).all()
    rest = found[~bad_rows]
    if bad_codes.all():
        assert (rest == -1).all()
    else:
        assert not bad_codes[rest].any()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("bad", [nan, inf, -inf])
def test_without_a_finite_code_every_index_is_minus_one(metric, bad):
    codes = torch.full((70, 3), bad)
    assert kernels.nearest_codeword(torch.randn(5, 3), codes, metric).tolist() == [-1] * 5
    codes[66] = 1.0
    assert kernels.nearest_codeword(torch.randn(5, 3), codes, metric).tolist() == [66] * 5


@pytest.mark.parametrize("dtype", DTYPES)
def test_tie_goes_to_lowest_index(dtype):
    codes = torch.randn(3, 5).to(dtype)[torch.tensor([2, 1, 0] + [0, 1, 2] * 40)]
    x = torch.cat([codes, torch.randn(500, 5).to(dtype)])
    assert set(kernels.nearest_codeword(x, codes, "euclidean").tolist()) == {0, 1, 2}
    assert set(kernels.nearest_codeword(x, codes, "cosine").tolist()) == {0, 1, 2}


def test_zero_token_has_equal_cosine_with_all_codes():
    codes = torch.randn(70, 3)
    assert kernels.nearest_codeword(torch.zeros(4, 3), codes, "cosine").tolist() == [0] * 4
    codes[40] = 0.0
    assert kernels.nearest_codeword(torch.zeros(4, 3), codes, "euclidean").tolist() == [40] * 4


def test_zero_code_has_cosine_zero():
    """Below every positive similarity, above every negative one."""
    line = torch.tensor([[-1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [-2.0, 0.0, 0.0]])
    assert kernels.nearest_codeword(torch.tensor([[1.0, 0, 0], [-1.0, 0, 0]]), line, "cosine").tolist() == [1, 0]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-25, 1e18, 1e25, 1e37])
def test_equals_float64_where_float32_squares_under_or_overflow(scale, metric):
    x, codes = (torch.randn(rows, 7) * scale for rows in (63, 65))
    assert torch.isfinite(x).all()
    check(x, codes, metric)


def test_equals_float64_for_scales_mixed_in_one_batch():
    x = torch.randn(80, 5) * 10.0 ** torch.linspace(-30, 30, 80)[:, None]
    codes = torch.randn(70, 5) * 10.0 ** torch.linspace(-30, 30, 70)[:, None]
    check(x, codes)
    check(x, codes, "cosine")


def test_equals_float64_for_codes_that_float32_cannot_tell_apart():
    codes = torch.tensor([[1.0, 1.0], [1.0 + 2.0**-23, 1.0]])
    x = torch.tensor([[1.0, 1.0], [1.0 + 2.0**-23, 1.0], [50.0, 1.0], [-50.0, 1.0]])
    assert kernels.nearest_codeword(x, codes, "euclidean").tolist() == [0, 1, 1, 0]
    codes = torch.tensor([[1.0, 1.0], [1.0 + 2.0**-50, 1.0]], dtype=torch.float64)
    x = torch.tensor([[-9.0, 0.0], [9.0, 0.0]], dtype=torch.float64)
    # Here float64 itself rounds: the reference's answer is the rule.
    assert torch.equal(kernels.nearest_codeword(x, codes, "euclidean"), kernels.nearest_reference(x, codes))
