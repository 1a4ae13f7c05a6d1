"""First codes: drawn from the tokens, once, in training, by the codebook's own generator."""

import itertools
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.laws import IGNORE_RANDOM_CODES, assert_same_bits, correlation, state_of
from tests.profiles import few
from vqssl import EMACodebook, KMeansInit, RandomInit, SampleInit
from vqssl.distributed import gather_pool
from vqssl.functional import METRICS


def first_codes(x, size, mask=None, **options):
    """Return the codes right after initialisation, before any update."""
    codebook = EMACodebook(codebook_size=size, dim=x.shape[-1], **options)
    codebook.initialize_(x, mask)
    return codebook.embed


def rows_of(codes, x):
    """Return for each code the rows of `x` that it equals."""
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
    if masked:  # between masked tokens
        mask = torch.arange(2 * len(x)) % 2 == 1
        x = torch.stack([torch.full_like(x, float("nan")), x], 1).flatten(0, 1)
    rows = rows_of(first_codes(x, size, mask, seed=seed), x)
    assert all(len(found) == 1 for found in rows)
    assert len({found[0] for found in rows}) == size


@given(st.integers(2, 40), st.data())
def test_each_of_few_tokens_becomes_a_code(size, data):
    tokens = data.draw(st.integers(1, size))
    x = torch.randn(tokens, 3)
    rows = rows_of(first_codes(x, size), x)
    assert {found[0] for found in rows if found} == set(range(tokens))


@given(st.integers(2, 60), st.data())
def test_first_codes_are_distinct_where_tokens_differ(size, data):
    tokens = data.draw(st.integers(2, 60))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    x = torch.randn(tokens, 3, generator=generator)
    x[torch.randperm(tokens, generator=generator)[: tokens // 3]] = x[0].clone()  # equal tokens among them
    codes = first_codes(x, size)
    if len(torch.unique(x, dim=0)) > 2:
        assert len(torch.unique(codes, dim=0)) == size
    spread = torch.cdist(x, x).max()
    assert torch.cdist(codes, x).min(1).values.max() <= 0.15 * spread + 1e-6


def test_tokens_that_are_all_equal_give_equal_codes():
    x = torch.ones(5, 3)
    assert torch.equal(first_codes(x, 4), torch.ones(4, 3))


@pytest.mark.parametrize("times", few([500, 2000]))
def test_each_token_is_drawn_equally_often_for_any_code(times):
    drawn, first = torch.zeros(20), torch.zeros(20)
    pool = gather_pool(torch.arange(20.0)[:, None], torch.ones(20, dtype=torch.bool))
    for seed in range(times):
        codes = SampleInit()(pool, 5, torch.tensor([seed, 1]), "euclidean").flatten().long()
        drawn[codes] += 1
        first[codes[0]] += 1
    # A quarter and a twentieth of the times expected; five standard deviations of a binomial count.
    assert (drawn - 0.25 * times).abs().max() < 5 * (times * 0.25 * 0.75) ** 0.5
    assert (first - 0.05 * times).abs().max() < 5 * (times * 0.05 * 0.95) ** 0.5


def test_draws_depend_on_the_seed():
    x = torch.randn(500, 3)
    assert not torch.equal(first_codes(x, 8, seed=0), first_codes(x, 8, seed=1))
    assert torch.equal(first_codes(x, 8, seed=1), first_codes(x, 8, seed=1))


def test_non_finite_tokens_are_never_drawn():
    x = torch.randn(40, 3)
    x[::2, 1] = float("inf")
    x[1::4, 0] = float("nan")
    codes = first_codes(x, 10)
    assert all(len(found) == 1 and found[0] % 4 == 3 for found in rows_of(codes, x))


def test_cosine_codes_are_tokens_at_length_one():
    x = 5 * torch.randn(40, 3)
    codes = first_codes(x, 10, metric="cosine")
    unit = x / x.norm(dim=-1, keepdim=True)
    assert torch.cdist(codes.double(), unit.double()).amin(1).max() < 1e-6


# ---- k-means ----


@given(st.sampled_from(["euclidean", "cosine"]), st.integers(0, 2**20))
def test_k_means_never_increases_the_distortion(metric, seed):
    x = torch.randn(150, 4, generator=torch.Generator().manual_seed(seed))
    x[:75] *= 5
    steps = [distortion(x, first_codes(x, 8, metric=metric), metric)]
    for iterations in (1, 2, 6):
        codes = first_codes(x, 8, metric=metric, initialization=KMeansInit(iterations))
        steps.append(distortion(x, codes, metric))
    assert all(after <= before * (1 + 1e-6) for before, after in itertools.pairwise(steps))
    assert steps[-1] < 0.98 * steps[0]


@pytest.mark.parametrize("metric", ["euclidean", "cosine", correlation])
def test_k_means_equals_lloyds_iteration_in_the_compared_form(metric):
    x = torch.randn(200, 3)
    as_compared = METRICS.get(metric, metric)
    tokens = as_compared(x.double())
    centres = first_codes(x, 6, metric=metric).double()  # k-means starts from the sample
    for _ in range(3):
        nearest = torch.cdist(tokens, as_compared(centres)).argmin(1)
        means = [tokens[nearest == k].mean(0) if (nearest == k).any() else centres[k] for k in range(6)]
        centres = torch.stack(means)
    found = first_codes(x, 6, metric=metric, initialization=KMeansInit(3))
    torch.testing.assert_close(found.double(), as_compared(centres), rtol=1e-5, atol=1e-5)


def test_k_means_keeps_a_centre_that_no_token_chose():
    x = torch.ones(10, 2)
    codes = first_codes(x, 4, initialization=KMeansInit(5))
    assert torch.equal(codes, torch.ones(4, 2))


@pytest.mark.parametrize("how", ["few", "masked", "not finite"])
def test_k_means_refuses_too_few_tokens(how):
    codebook = EMACodebook(codebook_size=8, dim=3, initialization=KMeansInit())
    before = state_of(codebook)
    x = torch.randn(7 if how == "few" else 12, 3)
    mask = torch.arange(12) < 7 if how == "masked" else None
    if how == "not finite":
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


@pytest.mark.parametrize("metric", ["euclidean", "cosine", correlation])
@pytest.mark.parametrize("initialization", EVERY, ids=repr)
def test_sums_are_counts_times_codes_afterwards(initialization, metric):
    codebook = EMACodebook(codebook_size=8, dim=3, metric=metric, initialization=initialization)
    codebook.initialize_(torch.randn(100, 3))
    assert codebook.initialized
    torch.testing.assert_close(codebook.embed_avg / codebook.cluster_size[:, None], codebook.embed, rtol=0, atol=0)


def test_random_init_keeps_the_codes_of_construction():
    codebook = EMACodebook(codebook_size=8, dim=3, initialization=RandomInit())
    before = codebook.embed.clone()
    codebook.initialize_(torch.randn(100, 3) + 50)
    assert torch.equal(codebook.embed, before)
    assert codebook.initialized


@IGNORE_RANDOM_CODES
@pytest.mark.parametrize("initialization", EVERY, ids=repr)
def test_happens_once_in_training_with_valid_tokens(initialization):
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
    torch.testing.assert_close(codebook.embed, codes, rtol=1e-6, atol=1e-6)  # a decay of 1 keeps all


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


def test_k_means_of_few_tokens_may_take_sampled_codes():
    x = torch.randn(5, 3)
    sampled = EMACodebook(codebook_size=8, dim=3)
    k_means = EMACodebook(codebook_size=8, dim=3, initialization=KMeansInit(few_tokens="sample"))
    for codebook in (sampled, k_means):
        codebook.initialize_(x)
    assert torch.equal(k_means.embed, sampled.embed)
    with pytest.raises(ValueError, match="few_tokens must be 'refuse' or 'sample', got 'drop'"):
        KMeansInit(few_tokens="drop")
