"""Dead codes become tokens of the batch in all three buffers, and the threshold does not depend on the batch size."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.laws import assert_same_bits, state_of
from vqssl import BatchRevival, EMACodebook, NoRevival

FAR = 1000.0


def half_dead(metric="euclidean", **options):
    """Return a codebook of 10 whose codes 5 to 9 are far from the tokens of `near`, with counts of 1."""
    codebook = EMACodebook(codebook_size=10, dim=3, metric=metric, **{"decay": 0.5, **options})
    codes = torch.randn(10, 3)
    if metric == "cosine":
        codes[:, 0] = codes[:, 0].abs() + 3
        codes[5:, 0] *= -1
    else:
        codes[5:] += FAR
    codebook.set_codes_(codes)
    return codebook


def near(count=100):
    x = torch.randn(count, 3)
    x[:, 0] = x[:, 0].abs() + 3
    return x


def row_of(codes, x):
    distance, row = torch.cdist(codes.double(), x.double()).min(1)
    return torch.where(distance < 1e-6, row, -1)


@pytest.mark.parametrize("ema", ["count_weighted", "batch_mean"])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("masked", [False, True])
def test_dead_codes_become_tokens_of_the_batch(metric, ema, masked):
    codebook = half_dead(metric, ema=ema, revival=BatchRevival(threshold=0.3))
    for _ in range(5):
        x = near()
        mask = torch.arange(100) < 60 if masked else None
        if masked:
            x[60:] = float("nan")
        old = codebook.embed[5:].clone()
        alive = copy.deepcopy(codebook)
        alive.revival = NoRevival()
        codebook(x, mask)
        alive(x, mask)
        dead = alive.cluster_size < 0.3 * alive.cluster_size.mean()
        if dead.any():
            break
        assert torch.allclose(codebook.embed[5:], old, rtol=1e-4)
    assert dead[5:].all()
    tokens = x[:60] if masked else x
    if metric == "cosine":
        tokens = tokens / tokens.norm(dim=-1, keepdim=True)
    rows = row_of(codebook.embed[dead], tokens)
    assert (rows >= 0).all()
    assert len(set(rows.tolist())) == int(dead.sum()), "no token is drawn twice"

    # Other codes are where the update put them.
    assert torch.equal(codebook.embed[~dead], alive.embed[~dead])
    # Counts and sums were scaled by one factor so that the total is what it was.
    torch.testing.assert_close(codebook.cluster_size.sum(), alive.cluster_size.sum(), rtol=1e-6, atol=0)
    factor = codebook.cluster_size[~dead] / alive.cluster_size[~dead]
    torch.testing.assert_close(factor, factor[:1].expand_as(factor), rtol=1e-6, atol=0)
    torch.testing.assert_close(codebook.embed_avg[~dead], alive.embed_avg[~dead] * factor[0], rtol=1e-5, atol=1e-5)
    # A revived code has the fair share, up to that factor, and a sum to match.
    share = alive.cluster_size.mean() * factor[0]
    torch.testing.assert_close(codebook.cluster_size[dead], share.expand(int(dead.sum())), rtol=1e-6, atol=0)
    means = codebook.embed_avg[dead] / codebook.cluster_size[dead, None]
    torch.testing.assert_close(means, codebook.embed[dead], rtol=1e-6, atol=1e-6)


def test_revived_codes_survive_the_next_step():
    codebook = half_dead(decay=0.9, revival=BatchRevival(0.5))
    for _ in range(20):
        codebook(near())
    assert (codebook.embed.norm(dim=-1) < FAR / 2).all()
    assert codebook.usage(0.05).dead == 0


@given(st.integers(2, 20), st.integers(2, 30), st.integers(2, 9), st.floats(0, 1), st.integers(0, 2**20))
def test_threshold_does_not_depend_on_the_batch_size(size, tokens, times, threshold, seed):
    """The same codes are dead for a batch and for the batch repeated."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randn(size, 2, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, 2, generator=generator, dtype=torch.float64)
    revived = []
    for repeat in (1, times):
        codebook = EMACodebook(
            codebook_size=size, dim=2, decay=0.5, revival=BatchRevival(threshold), dtype=torch.float64
        )
        codebook.set_codes_(codes)
        # A run of such batches would have brought the counts to this scale.
        codebook.cluster_size.mul_(repeat)
        codebook.embed_avg.mul_(repeat)
        other = copy.deepcopy(codebook)
        other.revival = NoRevival()
        batch = x.repeat(repeat, 1)
        codebook(batch)
        other(batch)
        revived.append(codebook.revival.dead(other.state()))
        assert not ((codebook.embed != other.embed).any(-1) & ~revived[-1]).any()
        # By the definition, in exact halves: (repeat + n) / 2 against the mean.
        counts = (2 * other.cluster_size - repeat).round()
        assert counts.sum() == len(batch)
        dead = (repeat + counts) / 2 < threshold * (repeat * size + len(batch)) / 2 / size
        assert torch.equal(revived[-1], dead)
    assert torch.equal(*revived)


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_threshold_0_revives_none_and_1_all_below_the_fair_share(threshold):
    codebook = half_dead(revival=BatchRevival(threshold))
    without = copy.deepcopy(codebook)
    without.revival = NoRevival()
    x = near()
    codebook(x)
    without(x)
    below_share = without.cluster_size < without.cluster_size.mean()
    changed = (codebook.embed != without.embed).any(-1)
    assert torch.equal(changed, below_share if threshold else torch.zeros(10, dtype=torch.bool))
    assert below_share.any()


@pytest.mark.parametrize("revival", [None, NoRevival()])
def test_without_revival_dead_codes_stay(revival):
    # Without smoothing, which moves an unused code slowly to zero, and so in the end among the tokens.
    codebook = half_dead(revival=revival, eps=0.0)
    codes = codebook.embed[5:].clone()
    for _ in range(40):
        codebook(near())
    assert codebook.cluster_size[5:].max() < 1e-6
    torch.testing.assert_close(codebook.embed[5:], codes, rtol=1e-5, atol=0)


@pytest.mark.parametrize("how", ["eval", "frozen", "empty", "fully masked", "not finite"])
def test_no_revival_without_an_update(how):
    codebook = half_dead(revival=BatchRevival(1.0))
    codebook(near())
    x, mask = near(), None
    if how == "eval":
        codebook.eval()
    elif how == "frozen":
        codebook.freeze()
    elif how == "empty":
        x = x[:0]
    elif how == "fully masked":
        mask = torch.zeros(100, dtype=torch.bool)
    else:
        x = torch.full_like(x, float("nan"))
    before = state_of(codebook)
    codebook(x, mask)
    assert_same_bits(state_of(codebook), before)


def test_each_step_draws_other_tokens():
    codebook = half_dead(decay=0.0, revival=BatchRevival(1.0))
    x = near(1000)
    draws = []
    for _ in range(3):
        codebook.set_codes_(torch.cat([torch.zeros(5, 3), torch.full((5, 3), FAR)]))
        codebook(x)
        draws.append(tuple(row_of(codebook.embed[5:], x).tolist()))
    assert len(set(draws)) == 3
    assert all(row >= 0 for draw in draws for row in draw)


@pytest.mark.parametrize("tokens", [1, 2, 4])
def test_no_token_is_given_to_two_codes(tokens):
    """Equal codes would stay equal: the lowest index wins all their tokens."""
    codebook = half_dead(revival=BatchRevival(1.0))
    x = near(tokens)
    codebook(x)
    given = [row for row in row_of(codebook.embed[5:], x).tolist() if row >= 0]
    assert len(given) == len(set(given))
    assert len(torch.unique(codebook.embed, dim=0)) == 10
    assert torch.isfinite(codebook.embed_avg).all()


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_equal_tokens_revive_one_code(metric):
    codebook = half_dead(metric, revival=BatchRevival(1.0))
    codebook(near(1).expand(50, 3))
    assert len(torch.unique(codebook.embed, dim=0)) == 10


def test_codes_that_were_set_equal_part_in_training():
    codebook = EMACodebook(codebook_size=16, dim=3, decay=0.8)
    codebook.set_codes_(torch.randn(4, 3).repeat(4, 1))
    for _ in range(60):
        codebook(torch.randn(200, 3))
    assert len(torch.unique(codebook.embed, dim=0)) == 16
    assert codebook.usage().dead == 0


def test_all_codes_become_distinct_with_few_tokens_a_step():
    """With one token for several dead codes, 15% of the codes were distinct after these steps."""
    codebook = EMACodebook(codebook_size=512, dim=8, decay=0.95)
    for _ in range(300):
        codebook(torch.randn(16, 8))
    assert len(torch.unique(codebook.embed, dim=0)) == 512


@pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan")])
def test_threshold_outside_0_to_1_is_refused(threshold):
    with pytest.raises(ValueError, match=r"threshold must be from 0 to 1.*fraction of the fair share"):
        BatchRevival(threshold)
