"""The EMA rules equal float64 loops over codes, and what each conserves."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vqssl.functional import EMA_RULES, CodebookState, batch_mean_ema, count_weighted_ema

seeds = st.integers(0, 2**31 - 1)


def setting(seed, size=6, dim=3, tokens=20, spread=2):
    """Return a state, and counts and sums of a batch that uses at most half the codes."""
    generator = torch.Generator().manual_seed(seed)
    cluster_size = torch.rand(size, generator=generator, dtype=torch.float64) * 4 + 0.1
    embed = torch.randn(size, dim, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, dim, generator=generator, dtype=torch.float64) * spread
    indices = torch.randint(0, max(1, size // 2), (tokens,), generator=generator)
    counts = torch.bincount(indices, minlength=size).double()
    sums = torch.stack([x[indices == k].sum(0) for k in range(size)])
    return CodebookState(embed, cluster_size, embed * cluster_size[:, None]), counts, sums


def count_weighted_loop(state, counts, sums, decay, eps):
    """Return the state after a step of VQ-VAE, appendix A.1, code by code in Python floats."""
    size, dim = state.embed.shape
    n = [decay * float(state.cluster_size[k]) + (1 - decay) * float(counts[k]) for k in range(size)]
    total = sum(n)
    embed = torch.empty(size, dim, dtype=torch.float64)
    embed_avg = torch.empty(size, dim, dtype=torch.float64)
    for k in range(size):
        for d in range(dim):
            m = decay * float(state.embed_avg[k, d]) + (1 - decay) * float(sums[k, d])
            embed_avg[k, d] = m
            embed[k, d] = m / ((n[k] + eps) / (total + size * eps) * total)
    return CodebookState(embed, torch.tensor(n, dtype=torch.float64), embed_avg)


def batch_mean_loop(state, counts, sums, decay, eps):
    """Return the state after a step of Eq. 1; counts as in the conventional rule, sums = counts x codes."""
    embed = state.embed.clone()
    n = state.cluster_size.clone()
    for k in range(len(embed)):
        n[k] = decay * n[k] + (1 - decay) * counts[k]
        if counts[k] > 0:
            embed[k] = decay * embed[k] + (1 - decay) * (sums[k] / counts[k])
    return CodebookState(embed, n, torch.stack([n[k] * embed[k] for k in range(len(embed))]))


LOOPS = {"count_weighted": count_weighted_loop, "batch_mean": batch_mean_loop}


def test_every_rule_has_its_loop():
    assert EMA_RULES.keys() == LOOPS.keys()


@pytest.mark.parametrize("name", EMA_RULES)
@given(
    seed=seeds,
    tokens=st.integers(1, 20),
    decay=st.sampled_from([0.0, 0.5, 0.99, 1.0]),
    eps=st.sampled_from([1e-5, 0.3]),
)
def test_rule_equals_its_loop(name, seed, tokens, decay, eps):
    state, counts, sums = setting(seed, tokens=tokens)
    torch.testing.assert_close(
        tuple(EMA_RULES[name](state, counts, sums, decay, eps)),
        tuple(LOOPS[name](state, counts, sums, decay, eps)),
        rtol=1e-12,
        atol=1e-12,
    )


@pytest.mark.parametrize("name", EMA_RULES)
def test_step_does_not_change_its_input(name):
    state, counts, sums = setting(0)
    before = [t.clone() for t in (*state, counts, sums)]
    EMA_RULES[name](state, counts, sums, 0.9, 1e-5)
    assert all(now.equal(then) for now, then in zip((*state, counts, sums), before, strict=True))


@pytest.mark.parametrize("name", EMA_RULES)
def test_total_count_follows_the_number_of_tokens(name):
    """The sum of the running counts is the same average of the numbers of tokens."""
    state, counts, sums = setting(1)
    after = EMA_RULES[name](state, counts, sums, 0.9, 1e-5)
    torch.testing.assert_close(after.cluster_size.sum(), 0.9 * state.cluster_size.sum() + 0.1 * counts.sum())


@pytest.mark.parametrize("eps", [0.0, 1e-5, 0.5])
def test_smoothing_conserves_the_total_count(eps):
    """The divisors M/e sum to the counts N."""
    state, counts, sums = setting(2)
    after = count_weighted_ema(state, counts, sums, 0.9, eps)
    weights = (after.embed_avg / after.embed)[:, 0]
    torch.testing.assert_close(weights.sum(), after.cluster_size.sum())


@pytest.mark.parametrize("name", EMA_RULES)
def test_without_smoothing_a_code_is_sum_over_count(name):
    state, counts, sums = setting(3)
    after = EMA_RULES[name](state, counts, sums, 0.9, 0.0)
    torch.testing.assert_close(after.embed * after.cluster_size[:, None], after.embed_avg, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", EMA_RULES)
def test_batch_of_the_codes_themselves_moves_no_code(name):
    state, counts, _ = setting(4)
    after = EMA_RULES[name](state, counts, counts[:, None] * state.embed, 0.9, 0.0)
    torch.testing.assert_close(after.embed, state.embed, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", EMA_RULES)
def test_permuting_codes_permutes_the_step(name):
    state, counts, sums = setting(5)
    order = torch.randperm(len(counts))
    permuted = EMA_RULES[name](CodebookState(*(t[order] for t in state)), counts[order], sums[order], 0.9, 1e-5)
    torch.testing.assert_close(
        tuple(permuted), tuple(t[order] for t in EMA_RULES[name](state, counts, sums, 0.9, 1e-5))
    )


@given(seed=seeds)
def test_without_smoothing_and_memory_unused_codes_stay(seed):
    """With decay = 0 and eps = 0 an unused code has count and sum 0; its quotient must not become NaN."""
    state, counts, sums = setting(seed)
    after = count_weighted_ema(state, counts, sums, 0.0, 0.0)
    used = counts > 0
    assert (~used).any()
    assert after.embed[~used].equal(state.embed[~used])
    torch.testing.assert_close(after.embed[used], (sums / counts[:, None])[used])


def test_codes_stay_where_all_counts_are_zero():
    nothing = torch.zeros(4)
    state = CodebookState(torch.randn(4, 2), nothing, torch.zeros(4, 2))
    for eps in (0.0, 1e-5):
        after = count_weighted_ema(state, nothing, torch.zeros(4, 2), 0.9, eps)
        assert after.embed.equal(state.embed)


@given(seed=seeds, decay=st.sampled_from([0.0, 0.5, 0.99]))
def test_eq_1_moves_each_used_code_to_its_batch_mean_by_one_share(seed, decay):
    state, counts, sums = setting(seed)
    after = batch_mean_ema(state, counts, sums, decay, 1e-5)
    used = counts > 0
    assert after.embed[~used].equal(state.embed[~used])
    # The share does not depend on how many tokens chose the code.
    step = after.embed[used] - state.embed[used]
    to_mean = (sums / counts[:, None])[used] - state.embed[used]
    torch.testing.assert_close(step, (1 - decay) * to_mean, rtol=1e-11, atol=1e-12)


def test_eq_1_has_the_published_variance():
    """Eqs. 2 and 3: from fixed codes, the update's variance is (1 - decay)^2 times that of the batch mean."""
    state, counts, _ = setting(0)
    draws = torch.randn(500, *state.embed.shape, dtype=torch.float64)
    after = torch.stack([batch_mean_ema(state, counts, counts[:, None] * mean, 0.9, 0.0).embed for mean in draws])
    used = counts > 0
    torch.testing.assert_close(after[:, used].var(0), (1 - 0.9) ** 2 * draws[:, used].var(0))
    assert after[:, ~used].equal(state.embed[~used].expand(500, -1, -1))
