"""Where codes start: drawn from the tokens, once, in training, and from the codebook's own generator."""

import itertools
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.laws import IGNORE_RANDOM_CODES, assert_same_bits, state_of
from vqssl import EMACodebook, KMeansInit, RandomInit, SampleInit
from vqssl.functional.random import random_bits, random_normal, random_positions


def first_codes(x, size, mask=None, **options):
    """The codes right after initialisation, before any update."""
    codebook = EMACodebook(codebook_size=size, dim=x.shape[-1], **options)
    codebook.initialize_(x, mask)
    return codebook.embed


def rows_of(codes, x):
    """For each code the rows of `x` that it equals."""
    return [(x == code).all(-1).nonzero().flatten().tolist() for code in codes]


def distortion(x, codes, metric="euclidean"):
    x, codes = x.double(), codes.double()
    if metric == "cosine":
        x, codes = (t / t.norm(dim=-1, keepdim=True) for t in (x, codes))
    return torch.cdist(x, codes).square().amin(1).mean().item()


# ---- sampling ----


@given(st.integers(1, 40), st.integers(0, 40), st.integers(0, 2**40), st.booleans())
def test_sampled_codes_are_tokens_without_replacement(size, more, seed, masked):
    x = torch.randn(size + more, 3)
    mask = None
    if masked:  # among others that do not count, whatever they hold
        mask = torch.rand(2 * len(x)) < 2  # all true
        mask[::2] = False
        x = torch.stack([torch.full_like(x, float("nan")), x], 1).flatten(0, 1)
    rows = rows_of(first_codes(x, size, mask, seed=seed), x)
    assert all(len(found) == 1 for found in rows)
    assert len({found[0] for found in rows}) == size


@given(st.integers(2, 40), st.data())
def test_with_few_tokens_every_one_becomes_a_code(size, data):
    tokens = data.draw(st.integers(1, size))
    x = torch.randn(tokens, 3)
    rows = rows_of(first_codes(x, size), x)
    assert {found[0] for found in rows} == set(range(tokens))


def test_sampling_is_even():
    """Each token is as likely as another to be drawn, and for any code."""
    drawn, first = torch.zeros(20), torch.zeros(20)
    x = torch.arange(20.0)[:, None]
    for seed in range(3000):
        codes = first_codes(x, 5, seed=seed).flatten().long()
        drawn[codes] += 1
        first[codes[0]] += 1
    # 750 and 150 expected; five standard deviations of a binomial count.
    assert (drawn - 750).abs().max() < 5 * (3000 * 0.25 * 0.75) ** 0.5
    assert (first - 150).abs().max() < 5 * (3000 * 0.05 * 0.95) ** 0.5


def test_another_seed_draws_other_tokens():
    x = torch.randn(500, 3)
    assert not torch.equal(first_codes(x, 8, seed=0), first_codes(x, 8, seed=1))
    assert torch.equal(first_codes(x, 8, seed=1), first_codes(x, 8, seed=1))


def test_junk_is_never_drawn():
    x = torch.randn(40, 3)
    x[::2, 1] = float("inf")
    x[1::4, 0] = float("nan")
    codes = first_codes(x, 10)
    assert all(len(found) == 1 and found[0] % 4 == 3 for found in rows_of(codes, x))


def test_cosine_draws_directions():
    x = 5 * torch.randn(40, 3)
    codes = first_codes(x, 10, metric="cosine")
    unit = x / x.norm(dim=-1, keepdim=True)
    assert torch.cdist(codes.double(), unit.double()).amin(1).max() < 1e-6


# ---- k-means ----


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@given(st.integers(0, 2**20))
def test_k_means_goes_down(metric, seed):
    x = torch.randn(300, 4, generator=torch.Generator().manual_seed(seed))
    x[:150] *= 5
    steps = [distortion(x, first_codes(x, 12, metric=metric), metric)]
    for iterations in (1, 2, 4, 8):
        codes = first_codes(x, 12, metric=metric, initialization=KMeansInit(iterations))
        steps.append(distortion(x, codes, metric))
    assert all(after <= before * (1 + 1e-6) for before, after in itertools.pairwise(steps))
    assert steps[-1] < 0.98 * steps[0]


def test_k_means_finds_clusters_and_is_lloyds_iteration():
    x = torch.randn(200, 3)
    centres = first_codes(x, 6).double()  # k-means starts from the sample
    for _ in range(3):
        nearest = torch.cdist(x.double(), centres).argmin(1)
        centres = torch.stack(
            [x[nearest == k].double().mean(0) if (nearest == k).any() else centres[k] for k in range(6)]
        )
    found = first_codes(x, 6, initialization=KMeansInit(3))
    torch.testing.assert_close(found.double(), centres, rtol=1e-5, atol=1e-5)


def test_k_means_keeps_a_centre_that_no_token_chose():
    x = torch.ones(10, 2)
    codes = first_codes(x, 4, initialization=KMeansInit(5))
    assert torch.equal(codes, torch.ones(4, 2))


@pytest.mark.parametrize("how", ["few", "masked", "junk"])
def test_k_means_refuses_too_few_tokens(how):
    codebook = EMACodebook(codebook_size=8, dim=3, initialization=KMeansInit())
    before = state_of(codebook)
    x = torch.randn(7 if how == "few" else 12, 3)
    mask = torch.arange(12) < 7 if how == "masked" else None
    if how == "junk":
        x[7:] = float("nan")
    with pytest.raises(
        ValueError, match=r"k-means needs at least as many tokens as codes, got 7 valid tokens.*codebook_size = 8"
    ):
        codebook(x, mask)
    assert_same_bits(state_of(codebook), before)
    codebook(torch.randn(8, 3))
    assert codebook.initialized


def test_k_means_refuses_no_iterations():
    with pytest.raises(ValueError, match="iterations must be at least 1"):
        KMeansInit(0)


# ---- all of them ----

EVERY = [SampleInit(), KMeansInit(), RandomInit()]


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("initialization", EVERY, ids=repr)
def test_buffers_agree_afterwards(initialization, metric):
    codebook = EMACodebook(codebook_size=8, dim=3, metric=metric, initialization=initialization)
    codebook.initialize_(torch.randn(100, 3))
    assert codebook.initialized
    torch.testing.assert_close(codebook.embed_avg / codebook.cluster_size[:, None], codebook.embed, rtol=0, atol=0)


def test_random_keeps_the_codes_of_construction():
    codebook = EMACodebook(codebook_size=8, dim=3, initialization=RandomInit())
    before = codebook.embed.clone()
    codebook.initialize_(torch.randn(100, 3) + 50)
    assert torch.equal(codebook.embed, before)
    assert codebook.initialized


@IGNORE_RANDOM_CODES
@pytest.mark.parametrize("initialization", EVERY, ids=repr)
def test_happens_once_in_training_with_tokens(initialization):
    codebook = EMACodebook(codebook_size=8, dim=3, decay=1.0, revival=None, initialization=initialization)
    before = state_of(codebook)
    codebook.eval()(torch.randn(50, 3))
    codebook.train()(torch.randn(0, 3))
    codebook(torch.randn(50, 3), torch.zeros(50, dtype=torch.bool))
    codebook(torch.full((50, 3), float("nan")))
    codebook.freeze()(torch.randn(50, 3))
    codebook.freeze(False)
    assert_same_bits(state_of(codebook), before)
    assert not codebook.initialized
    codebook(torch.randn(50, 3))
    codes = codebook.embed.clone()
    assert codebook.initialized
    codebook(torch.randn(50, 3) + 7)
    torch.testing.assert_close(codebook.embed, codes, rtol=1e-6, atol=1e-6)  # a decay of 1 forgets nothing


@pytest.mark.parametrize("initialization", EVERY, ids=repr)
def test_first_codes_changes_nothing(initialization):
    codebook, x = EMACodebook(codebook_size=8, dim=3, initialization=initialization), torch.randn(50, 3)
    before = state_of(codebook)
    codes = codebook.first_codes(x)
    assert_same_bits(state_of(codebook), before)
    codebook.initialize_(x)
    assert torch.equal(codebook.embed, codes)
    assert codebook.first_codes(x) is None


@pytest.mark.parametrize("initialization", EVERY, ids=repr)
def test_global_generators_are_left_alone(initialization):
    found = []
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        codebook = EMACodebook(codebook_size=8, dim=3, initialization=initialization)
        for step in range(3):
            codebook(torch.linspace(-1, 1, 300).reshape(100, 3) ** (step + 1))
        assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
        found.append(state_of(codebook))
    assert_same_bits(*found)


# ---- the generator itself ----


def split_mix(seed):
    """SplitMix64 as published, in Python's integers: yields 64 bits at a time."""
    state = seed
    while True:
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        yield z ^ (z >> 31)


def mixed(z):
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


@given(st.integers(0, 2**63 - 1), st.integers(0, 2**63 - 1))
def test_bits_are_those_of_split_mix(seed, counter):
    gamma = 0x9E3779B97F4A7C15
    key = mixed((mixed((seed + gamma) % 2**64) + counter * gamma) % 2**64)
    stream = split_mix(key)
    assert random_bits(torch.tensor([seed, counter]), 5).tolist() == [next(stream) >> 2 for _ in range(5)]


def test_split_mix_is_the_published_one():
    """The first numbers for seed 1234567 that other implementations of SplitMix64 print."""
    stream = split_mix(1234567)
    assert [next(stream) for _ in range(3)] == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_normal_numbers_are_normal():
    x = random_normal(torch.tensor([3, 1]), 200_000, torch.float64)
    # Mean, variance, skewness and kurtosis to five standard errors.
    n = len(x) ** 0.5
    assert x.mean().abs() < 5 / n
    assert (x.square().mean() - 1).abs() < 5 * 2**0.5 / n
    assert (x**3).mean().abs() < 5 * 15**0.5 / n
    assert ((x**4).mean() - 3).abs() < 5 * 96**0.5 / n
    assert torch.isfinite(x).all()


@given(st.integers(0, 2**62), st.integers(1, 50), st.integers(0, 10**9))
def test_positions_lie_in_range_and_do_not_repeat(seed, count, total):
    found = random_positions(torch.tensor([seed, 0]), count, torch.tensor(total)).tolist()
    assert len(found) == count
    assert all(0 <= position < max(total, 1) for position in found)
    assert len(set(found)) == count or total < count
