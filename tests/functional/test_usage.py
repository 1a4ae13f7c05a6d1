"""Counts, perplexity and spread: known values, and the formulas in Python."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vqssl.functional import code_counts, codebook_usage, target_spread

seeds = st.integers(0, 2**31 - 1)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


# ---- counts ----


@given(indices=st.lists(st.integers(-1, 6), max_size=30), dtype=st.sampled_from(INTEGERS[1:]))
def test_counts_equal_pythons_counter(indices, dtype):
    counts = code_counts(torch.tensor(indices, dtype=dtype), 7)
    assert counts.dtype == torch.int64
    assert counts.tolist() == [Counter(indices)[k] for k in range(7)]


def test_shape_and_strides_do_not_change_counts():
    indices = torch.randint(-1, 5, (3, 4, 5))
    assert code_counts(indices.permute(2, 0, 1), 5).equal(code_counts(indices.reshape(-1), 5))
    assert code_counts(torch.tensor([0, 255], dtype=torch.uint8), 256)[[0, 255]].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("error", "says", "indices", "size"),
    [
        (TypeError, "integer tensor", torch.tensor([1.0]), 3),
        (TypeError, "integer tensor", torch.tensor([True]), 3),
        (TypeError, "integer tensor", torch.tensor([1j]), 3),
        (TypeError, "integer tensor", [1], 3),
        (ValueError, "got 0 to 3", torch.tensor([0, 3]), 3),
        (ValueError, "got -2 to 0", torch.tensor([0, -2]), 3),
        (ValueError, "codebook_size must be at least 1", torch.tensor([0]), 0),
        (TypeError, "codebook_size must be an int", torch.tensor([0]), 3.0),
    ],
)
def test_wrong_indices_are_refused(error, says, indices, size):
    with pytest.raises(error, match=says):
        code_counts(indices, size)


# ---- usage ----


@given(seed=seeds, size=st.integers(1, 12), values=st.integers(1, 4), dead_below=st.floats(0, 1))
def test_equal_codes_count_as_one(seed, size, values, dead_below):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(values, (size, 2), generator=generator) / 3
    counts = torch.rand(size, generator=generator)
    merged = torch.zeros(size)
    for k in range(size):
        merged[next(j for j in range(size) if codes[j].equal(codes[k]))] += counts[k]
    found, expected = codebook_usage(counts, dead_below, codes), codebook_usage(merged, dead_below)
    assert found.perplexity.item() == pytest.approx(expected.perplexity.item())
    near = (merged - dead_below * counts.mean()).abs() < 1e-6
    if not (near & (merged > 0)).any():
        assert (found.dead, found.fraction) == (expected.dead, expected.fraction)


@pytest.mark.parametrize(
    ("error", "codes"),
    [(ValueError, torch.ones(3, 2)), (ValueError, torch.ones(2)), (TypeError, torch.ones(2, 2).int())],
)
def test_codes_that_do_not_belong_to_the_counts_are_refused(error, codes):
    with pytest.raises(error, match="codes must"):
        codebook_usage(torch.ones(2), codes=codes)


@given(size=st.integers(1, 3000), count=st.integers(1, 2**40))
def test_even_usage_has_perplexity_k(size, count):
    usage = codebook_usage(torch.full((size,), count))
    assert usage.perplexity.item() == pytest.approx(size, rel=1e-6)
    assert usage.fraction.item() == 1
    assert usage.dead.item() == 0


@given(size=st.integers(1, 300), data=st.data())
def test_single_used_code_has_perplexity_one(size, data):
    counts = torch.zeros(size)
    counts[data.draw(st.integers(0, size - 1))] = 17
    usage = codebook_usage(counts)
    assert usage.perplexity.item() == 1
    assert usage.fraction.item() == pytest.approx(1 / size, rel=1e-6)
    assert usage.dead.item() == size - 1


@given(
    counts=st.lists(st.integers(0, 1000), min_size=1, max_size=20),
    dead_below=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    dtype=st.sampled_from([torch.int64, torch.float32, torch.float64]),
)
def test_usage_equals_formula(counts, dead_below, dtype):
    usage = codebook_usage(torch.tensor(counts, dtype=dtype), dead_below)
    total = sum(counts)
    entropy = -sum(n / total * math.log(n / total) for n in counts if n)
    fair = total / len(counts)
    alive = [n > 0 and n >= dead_below * fair for n in counts]
    assert usage.perplexity.item() == pytest.approx(math.exp(entropy) if total else 0, rel=1e-6)
    assert usage.fraction.item() == pytest.approx(sum(alive) / len(counts), rel=1e-6)
    assert usage.dead.item() == len(counts) - sum(alive)
    assert usage.dead.dtype == torch.int64


def test_perplexity_under_scaling_permuting_and_splitting():
    counts = torch.tensor([5, 1, 0, 9])
    perplexity = codebook_usage(counts).perplexity
    torch.testing.assert_close(codebook_usage(counts * 1000).perplexity, perplexity)
    torch.testing.assert_close(codebook_usage(counts[[2, 0, 3, 1]]).perplexity, perplexity)
    # Each code split into two equal halves: twice the perplexity.
    torch.testing.assert_close(codebook_usage(counts.repeat(2)).perplexity, 2 * perplexity)


def test_usage_is_detached():
    assert not any(t.requires_grad for t in codebook_usage(torch.ones(3, requires_grad=True)))


@pytest.mark.parametrize("counts", [[1, 2], torch.ones(3) > 0, torch.ones(3) + 1j])
def test_counts_that_are_not_real_numbers_are_refused(counts):
    with pytest.raises(TypeError, match=r"real numbers, got .*: write code_counts\(indices, codebook_size\)"):
        codebook_usage(counts)


@pytest.mark.parametrize(
    ("counts", "dead_below", "says"),
    [
        (torch.ones(2, 2), 0.0, r"\(K,\).*write code_counts\(indices, K\)"),
        (torch.ones(0), 0.0, r"\(K,\)"),
        (torch.tensor(1), 0.0, r"\(K,\)"),
        (torch.ones(3), 1.5, "dead_below"),
        (torch.ones(3), -0.5, "dead_below"),
    ],
)
def test_wrong_counts_and_thresholds_are_refused(counts, dead_below, says):
    with pytest.raises(ValueError, match=says):
        codebook_usage(counts, dead_below)


# ---- spread ----


def slow_spread(targets):
    rows = [[v / math.hypot(*row) for v in row] for row in targets.tolist()]
    deviations = []
    for column in zip(*rows, strict=True):
        mean = sum(column) / len(column)
        deviations.append(math.sqrt(sum((v - mean) ** 2 for v in column) / len(column)))
    return math.sqrt(len(deviations)) * sum(deviations) / len(deviations)


@given(seed=seeds, batch=st.integers(2, 9), dim=st.integers(1, 6))
def test_spread_equals_formula(seed, batch, dim):
    targets = torch.randn(batch, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = target_spread(targets).item()
    assert found == pytest.approx(slow_spread(targets), rel=1e-11, abs=1e-14)
    # By Jensen's inequality no set of unit vectors has a larger spread than an isotropic one.
    assert 0 <= found <= 1 + 1e-12


@given(seed=seeds, dim=st.integers(1, 8), lengths=st.lists(st.floats(0.01, 100), min_size=2, max_size=8))
def test_targets_of_one_direction_have_spread_zero(seed, dim, lengths):
    direction = torch.randn(dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    targets = torch.tensor(lengths, dtype=torch.float64)[:, None] * direction
    assert target_spread(targets).item() < 1e-14


@pytest.mark.parametrize("dim", [1, 2, 16])
def test_axes_in_both_directions_have_spread_one(dim):
    eye = torch.eye(dim, dtype=torch.float64)
    torch.testing.assert_close(target_spread(torch.cat([eye, -3 * eye])).item(), 1.0, rtol=1e-14, atol=0)


@pytest.mark.parametrize("dim", [2, 32, 256])
def test_gaussian_targets_have_spread_one_and_a_common_mean_lowers_it(dim):
    isotropic = torch.randn(8192, dim)
    assert target_spread(isotropic).item() == pytest.approx(1, abs=0.02)
    # With a mean as long as the noise, half of each squared length varies (exactly so in the limit of many dimensions).
    shifted = target_spread(isotropic + 1.0).item()
    assert shifted < 0.8
    if dim == 256:
        assert shifted == pytest.approx(math.sqrt(0.5), abs=0.01)


def test_spread_equals_lightlys_up_to_its_scale():
    """lightly.utils.debug.std_of_l2_normalized: normalize, std(dim=0) with Bessel's correction, mean: 1/sqrt(D)."""
    targets = torch.randn(50, 16, dtype=torch.float64) + 0.3
    lightly = torch.nn.functional.normalize(targets, dim=1).std(dim=0).mean()
    torch.testing.assert_close(target_spread(targets), lightly * math.sqrt(16) * math.sqrt(49 / 50))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_targets_are_measured_in_float32(dtype):
    targets = (torch.randn(64, 8) * 300).to(dtype)
    found = target_spread(targets.requires_grad_())
    assert found.dtype == torch.float32
    assert not found.requires_grad
    torch.testing.assert_close(found, target_spread(targets.float()), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("error", "targets"),
    [
        (TypeError, torch.ones(4, 3).long()),
        (TypeError, [[1.0]]),
        (ValueError, torch.ones(1, 3)),
        (ValueError, torch.ones(4)),
        (ValueError, torch.ones(4, 3, 2)),
    ],
)
def test_wrong_targets_are_refused(error, targets):
    cure = "floating|torch.as_tensor" if error is TypeError else "give the embeddings of one batch"
    with pytest.raises(error, match=f"targets must.*({cure})"):
        target_spread(targets)
