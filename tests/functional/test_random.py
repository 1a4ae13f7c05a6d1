"""The counter-based generator against SplitMix64 in Python integers; distributions; strata of positions."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vqssl.functional.random import distinct_positions, random_bits, random_normal, random_positions

WORD = 2**64
GAMMA = 0x9E3779B97F4A7C15

words = st.integers(-(2**63), 2**63 - 1)


def mix(z):
    """Apply SplitMix64's finaliser (Steele, Lea, Flood 2014, variant 13)."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % WORD
    return z ^ (z >> 31)


def splitmix64(state, count):
    """Return `count` successive outputs of the generator that starts at `state`."""
    outputs = []
    for _ in range(count):
        state = (state + GAMMA) % WORD
        outputs.append(mix(state))
    return outputs


def expected_bits(seed, counter, count):
    key = mix((mix((seed + GAMMA) % WORD) + counter * GAMMA) % WORD)
    return [word >> 2 for word in splitmix64(key, count)]


def state(seed, counter=0):
    return torch.tensor([seed, counter])


def test_splitmix64_of_this_file_is_the_published_one():
    # The reference implementation's first outputs for seed 1234567 (prng.di.unimi.it/splitmix64.c).
    assert splitmix64(1234567, 3) == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@given(seed=words, counter=words, count=st.integers(0, 20))
def test_bits_equal_splitmix64(seed, counter, count):
    bits = random_bits(state(seed, counter), count)
    assert bits.dtype == torch.int64
    assert bits.tolist() == expected_bits(seed, counter, count)


@pytest.mark.parametrize("draw", [random_bits, random_normal])
def test_numbers_depend_on_the_state_only_and_change_no_generator(draw):
    rng = state(7, 3)
    before = torch.get_rng_state()
    first = draw(rng, 100)
    assert torch.get_rng_state().equal(before)
    torch.rand(5)
    assert draw(rng, 100).equal(first)
    assert rng.equal(state(7, 3))
    assert not draw(state(8, 3), 100).equal(first)
    assert not draw(state(7, 4), 100).equal(first)


def test_every_bit_is_set_half_the_time():
    bits = random_bits(state(0), 2**14)
    assert bits.min() >= 0
    assert bits.max() < 2**62
    for place in range(62):
        share = ((bits >> place) & 1).double().mean().item()
        assert abs(share - 0.5) < 5 * 0.5 / 2**7  # five standard errors


@pytest.mark.parametrize("shift", [0, 27, 54])
def test_bits_are_uniform(shift):
    """Chi-square over 256 cells, for one seed: within five standard deviations of its mean."""
    cells = torch.bincount((random_bits(state(0), 2**16) >> shift) & 255, minlength=256).double()
    statistic = ((cells - 256) ** 2 / 256).sum().item()
    assert abs(statistic - 255) < 5 * math.sqrt(2 * 255)


def test_streams_of_neighbouring_seeds_and_counters_are_uncorrelated():
    draws = torch.stack([random_normal(state(s, c), 2**12, torch.float64) for s in range(4) for c in range(4)])
    correlation = torch.corrcoef(draws) - torch.eye(16)
    assert correlation.abs().max() < 5 / 2**6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normal_equals_box_muller_of_the_bits(dtype):
    found = random_normal(state(5, 2), 50, dtype)
    assert found.dtype == dtype
    uniform = [((bits >> 38) + 1) / 2**24 for bits in expected_bits(5, 2, 100)]
    expected = [
        math.sqrt(-2 * math.log(a)) * math.cos(2 * math.pi * b) for a, b in zip(uniform[:50], uniform[50:], strict=True)
    ]
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(
        found.double(), torch.tensor(expected, dtype=torch.float64), rtol=tolerance, atol=tolerance
    )


def test_normal_has_the_normal_quantiles():
    x = random_normal(state(0), 2**16, torch.float64).sort().values
    assert x.isfinite().all()
    # Kolmogorov-Smirnov: the critical value for p = 1e-6 is 2.69 / sqrt(n).
    cdf = (1 + torch.erf(x / math.sqrt(2))) / 2
    steps = torch.arange(1, len(x) + 1).double() / len(x)
    assert (cdf - steps).abs().max() < 2.69 / 2**8


@given(seed=words, counter=words, count=st.integers(1, 40))
def test_as_many_positions_as_tokens_are_a_permutation(seed, counter, count):
    positions = random_positions(state(seed, counter), count, torch.tensor(count))
    assert positions.sort().values.tolist() == list(range(count))


@given(seed=words, count=st.integers(1, 40), total=st.integers(1, 500) | st.integers(2**31, 2**40))
def test_each_stratum_has_one_position(seed, count, total):
    positions = sorted(random_positions(state(seed), count, torch.tensor(total)).tolist())
    assert all(0 <= p < total for p in positions)
    if total >= count:
        for stratum, position in enumerate(positions):
            assert stratum * total // count <= position < (stratum + 1) * total // count
        assert len(set(positions)) == count
    else:
        assert set(positions) == set(range(total))


@given(seed=words, count=st.integers(0, 20))
def test_positions_are_zero_if_total_is_zero(seed, count):
    positions = random_positions(state(seed), count, torch.tensor(0))
    assert positions.dtype == torch.int64
    assert positions.tolist() == [0] * count


def test_positions_are_uniform_and_in_random_order():
    draws = torch.stack([random_positions(state(0, c), 4, torch.tensor(10)) for c in range(2000)])
    for column in draws.T:  # each column is as likely to hold any position
        counts = torch.bincount(column, minlength=10).double()
        # Strata of widths 2, 3, 2, 3: each is drawn from once, so each holds a quarter of the draws.
        width = torch.tensor([2, 2, 3, 3, 3, 2, 2, 3, 3, 3]).double()
        expected = 2000 / 4 / width
        statistic = ((counts - expected) ** 2 / expected).sum().item()
        assert abs(statistic - 9) < 5 * math.sqrt(2 * 9)


@given(st.integers(0, 2**40), st.integers(1, 30), st.integers(0, 40))
def test_distinct_positions_are_distinct_and_as_many_as_there_can_be(seed, count, total):
    generator = torch.Generator().manual_seed(seed % 2**31)
    wanted = torch.rand(count, generator=generator) < 0.6
    found = distinct_positions(torch.tensor([seed, 0]), wanted, torch.tensor(total))
    given = found[found >= 0].tolist()
    assert len(given) == len(set(given)) == min(int(wanted.sum()), total)
    assert all(position < total for position in given)
    assert (found[~wanted] == -1).all()


@given(st.integers(0, 2**40), st.integers(1, 30), st.integers(0, 40))
def test_distinct_positions_are_the_random_ones_where_there_are_enough(seed, count, more):
    rng, total = torch.tensor([seed, 0]), torch.tensor(count + more)
    wanted = torch.rand(count) < 0.6
    assert torch.equal(
        distinct_positions(rng, wanted, total), torch.where(wanted, random_positions(rng, count, total), -1)
    )


def test_each_entry_gets_one_of_few_positions_equally_often():
    counts = torch.zeros(6)
    for counter in range(3000):
        counts += distinct_positions(torch.tensor([1, counter]), torch.ones(6, dtype=torch.bool), torch.tensor(2)) >= 0
    assert (counts / 1000 - 1).abs().max() < 0.1
