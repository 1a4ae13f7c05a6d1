"""fit_codebook: Lloyd's iterations as loops, scikit-learn's error, resume to the bit, masks and refusals."""

import math

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from tests.laws import assert_same_bits, state_of, through_file
from vqssl import CodebookFit, EMACodebook, fit_codebook
from vqssl.functional import unit


def mixture(count, dim, clusters, spread, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(clusters, dim, generator=generator)
    choice = torch.randint(clusters, (count,), generator=generator)
    return centres[choice] + spread * torch.randn(count, dim, generator=generator)


def error_of(codebook, x):
    """Return the mean squared distance of a token from its nearest code, in float64."""
    return torch.cdist(x.double(), codebook.embed.double()).amin(1).square().mean().item()


def start(x, size, **options):
    codebook = EMACodebook(codebook_size=size, dim=x.shape[1], **options)
    codebook.set_codes_(x[:size])
    return codebook


# ---- what it computes ----


def test_passes_equal_lloyds_iterations():
    x = mixture(300, 3, 9, 0.5).double()
    codebook = start(x, 6, dtype=torch.float64)
    codes, errors = x[:6].clone(), []
    for _ in range(5):
        nearest = [min(range(6), key=lambda k: float((token - codes[k]).square().sum())) for token in x]
        errors.append(sum(float((t - codes[k]).square().sum()) for t, k in zip(x, nearest, strict=True)) / 300)
        groups = [x[[k == code for k in nearest]] for code in range(6)]
        codes = torch.stack([group.mean(0) for group in groups])
    fit = fit_codebook(codebook, x.split(70), passes=5, tolerance=0)
    torch.testing.assert_close(codebook.embed, codes, rtol=1e-12, atol=1e-12)
    assert fit.errors == pytest.approx(errors, rel=1e-12)
    assert fit.counts.tolist() == [len(group) for group in groups]
    assert not fit.converged
    # Counts of a batch, and sums to match.
    torch.testing.assert_close(codebook.cluster_size, fit.counts / 5.0, check_dtype=False)
    torch.testing.assert_close(codebook.embed_avg, codebook.embed * codebook.cluster_size[:, None])
    assert codebook.num_updates == -1


@pytest.mark.parametrize(("clusters", "spread", "size"), [(1, 1.0, 24), (24, 0.1, 24), (60, 0.3, 24), (10, 0.2, 40)])
def test_error_is_within_one_percent_of_scikit_learn(clusters, spread, size):
    """Of its best of three starts: one start may end in a poor optimum."""
    cluster = pytest.importorskip("sklearn.cluster")
    x = mixture(4000, 6, clusters, spread)
    theirs = cluster.KMeans(size, n_init=3, max_iter=200, tol=0, random_state=0).fit(x.numpy())
    codebook = EMACodebook(codebook_size=size, dim=6)
    fit = fit_codebook(codebook, x.split(512), passes=200)
    assert fit.converged
    assert error_of(codebook, x) < 1.01 * theirs.inertia_ / len(x)


@pytest.mark.thorough
def test_same_start_ends_where_scikit_learn_does():
    cluster = pytest.importorskip("sklearn.cluster")
    x = mixture(2000, 4, 12, 0.4)
    theirs = cluster.KMeans(12, init=x[:12].numpy(), n_init=1, max_iter=300, tol=0).fit(x.numpy())
    codebook = start(x, 12)
    fit_codebook(codebook, x.split(300), passes=300, tolerance=0)
    torch.testing.assert_close(codebook.embed, torch.from_numpy(theirs.cluster_centers_), rtol=1e-4, atol=1e-4)


def test_error_never_rises_and_tolerance_stops():
    x = mixture(3000, 5, 30, 0.4)
    fit = fit_codebook(EMACodebook(codebook_size=20, dim=5), x.split(500), passes=100, tolerance=1e-3)
    assert fit.converged
    assert 2 <= len(fit.errors) < 100
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in zip(fit.errors, fit.errors[1:], strict=False))
    drops = [1 - later / earlier for earlier, later in zip(fit.errors, fit.errors[1:], strict=False)]
    assert [drop <= 1e-3 for drop in drops] == [False] * (len(drops) - 1) + [True]
    assert int(fit.counts.sum()) == 3000


def test_cosine_is_spherical_k_means():
    x = mixture(500, 4, 8, 0.3)
    codebook = start(x, 6, metric="cosine")
    codes = unit(x[:6].double())
    for _ in range(4):
        nearest = (unit(x.double()) @ codes.T).argmax(1)
        codes = unit(torch.stack([unit(x.double())[nearest == k].sum(0) for k in range(6)]))
    fit_codebook(codebook, x.split(100), passes=4, tolerance=0)
    torch.testing.assert_close(codebook.embed.double(), codes, rtol=1e-5, atol=1e-6)


def test_code_without_tokens_takes_half_of_a_busy_one():
    x = mixture(600, 3, 3, 0.2)
    codebook = EMACodebook(codebook_size=5, dim=3)
    codebook.set_codes_(torch.cat([x[:3], torch.full((2, 3), 1e3)]))
    fit = fit_codebook(codebook, x.split(200), passes=30)
    assert (fit.counts > 0).all()
    assert codebook.embed.abs().max() < 10


def test_fewer_distinct_tokens_than_codes_end_with_error_zero():
    x = torch.eye(3).repeat(20, 1)
    codebook = EMACodebook(codebook_size=5, dim=3)
    fit = fit_codebook(codebook, [x])
    assert error_of(codebook, x) < 1e-4
    assert codebook.embed.isfinite().all()
    assert int(fit.counts.sum()) == 60


# ---- repetition and resume ----


@pytest.mark.parametrize("first", [0, 1, 4])
def test_resumed_fit_equals_an_uninterrupted_one_to_the_bit(first, tmp_path):
    x = mixture(1500, 4, 20, 0.4).split(256)
    whole = EMACodebook(codebook_size=12, dim=4, seed=3)
    expected = fit_codebook(whole, x, passes=7, tolerance=0)
    codebook, saved = EMACodebook(codebook_size=12, dim=4, seed=3), {}

    def save(number, error):
        saved[number] = (through_file(codebook.state_dict()), error)

    if first:
        fit_codebook(codebook, x, passes=first, tolerance=0, after_pass=save)
        assert list(saved) == list(range(1, first + 1))
        assert [error for _, error in saved.values()] == list(expected.errors[:first])
    resumed = EMACodebook(codebook_size=12, dim=4)
    resumed.load_state_dict(saved[first][0] if first else EMACodebook(codebook_size=12, dim=4, seed=3).state_dict())
    found = fit_codebook(resumed, x, passes=7 - first, tolerance=0)
    assert_same_bits(state_of(resumed), state_of(whole))
    assert found.errors == expected.errors[first:]


def test_global_generators_play_no_part():
    x = mixture(800, 4, 20, 0.4).split(100)
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        codebook = EMACodebook(codebook_size=10, dim=4)
        fit_codebook(codebook, x, passes=3)
        assert torch.equal(torch.get_rng_state(), before)
        states.append(state_of(codebook))
    assert_same_bits(*states)
    other = EMACodebook(codebook_size=10, dim=4, seed=1)
    fit_codebook(other, x, passes=1)
    assert not torch.equal(other.embed, states[0]["embed"])


def test_training_goes_on_from_the_fitted_codes():
    x = mixture(1000, 4, 20, 0.2)
    codebook = EMACodebook(codebook_size=20, dim=4)
    fit_codebook(codebook, x.split(100))
    before = error_of(codebook, x)
    for batch in x.split(100):
        codebook(batch)
    assert error_of(codebook, x) < 1.3 * before


# ---- what it reads ----


def test_forms_of_batches_give_the_same_codes():
    x = mixture(600, 4, 10, 0.3)
    mask = torch.rand(600) < 0.7
    expected = EMACodebook(codebook_size=8, dim=4)
    expected_fit = fit_codebook(expected, x[mask].split(200), passes=3)
    broken = torch.where(mask[:, None], x, math.nan)
    kept = [int(part.sum()) for part in mask.split(150)]
    forms = {
        "list": x[mask].split(kept),
        "not finite": broken.split(150),
        "pairs": list(zip(broken.split(150), mask.split(150), strict=True)),
        "sequences": [
            (a.reshape(10, 15, 4), m.reshape(10, 15)) for a, m in zip(x.split(150), mask.split(150), strict=True)
        ],
        "data loader": DataLoader(TensorDataset(broken), batch_size=150),
    }
    first = None
    for name, batches in forms.items():
        codebook = EMACodebook(codebook_size=8, dim=4)
        fit = fit_codebook(codebook, batches, passes=3)
        first = first or state_of(codebook)
        assert_same_bits(state_of(codebook), first)
        assert int(fit.counts.sum()) == int(mask.sum()), name
    assert fit.errors[-1] == pytest.approx(expected_fit.errors[-1], rel=0.1)  # batches of other sizes: another start


def test_progress_wraps_the_batches_of_each_pass():
    seen = []

    def progress(batches):
        seen.append(0)
        for batch in batches:
            seen[-1] += 1
            yield batch

    x = mixture(300, 4, 10, 0.3).split(100)
    fit = fit_codebook(EMACodebook(codebook_size=8, dim=4), x, passes=3, tolerance=0, progress=progress)
    assert seen == [3] * 4  # one for the first codes
    assert len(fit.errors) == 3


def test_result_unpacks():
    fit = fit_codebook(EMACodebook(codebook_size=2, dim=4), [torch.randn(30, 4)], passes=1)
    assert type(fit) is CodebookFit
    errors, counts, converged = fit
    assert (len(errors), counts.dtype, converged) == (1, torch.int64, False)


X = [torch.randn(20, 4)]


@pytest.mark.parametrize(
    ("batches", "options", "error", "words"),
    [
        ((x for x in X), {}, TypeError, "can be read for each pass, got generator.*write list"),
        ([torch.randn(3, 4)], {}, ValueError, "as many tokens as codes, got 3 valid tokens for codebook_size = 8"),
        ([], {}, ValueError, "got 0 valid tokens"),
        ([torch.full((20, 4), math.nan)], {}, ValueError, "got 0 valid tokens"),
        ([torch.randn(20, 3)], {}, ValueError, "batch 0 must be .* dim = 4"),
        ([torch.ones(20, 4).long()], {}, TypeError, "batch 0 must have a floating dtype"),
        ([(X[0], torch.ones(20))], {}, TypeError, "mask of batch 0 must be a boolean tensor.*give the tokens alone"),
        ([{"x": X[0]}], {}, TypeError, "batch 0 must be a tensor of tokens, or a pair of tokens and mask, got dict$"),
        ([torch.randn(2, 4, 5)], {}, ValueError, r"batch 0 must be .* dim = 4 .* by movedim\(1, -1\)"),
        (X[0], {}, TypeError, r"iterable of batches, got one tensor: write \[tokens\], or tokens.split\(n\)"),
        (X, {"passes": 0}, ValueError, "passes must be at least 1"),
        (X, {"tolerance": -1}, ValueError, "tolerance must be from 0 to 1"),
    ],
)
@pytest.mark.parametrize("initialized", [False, True])
def test_refusals_leave_the_codebook(batches, options, error, words, initialized):
    codebook = EMACodebook(codebook_size=8, dim=4)
    if initialized:
        codebook.set_codes_(torch.randn(8, 4))
    before = state_of(codebook)
    with pytest.raises(error, match=words):
        fit_codebook(codebook, batches, **options)
    assert_same_bits(state_of(codebook), before)


def test_only_a_codebook_is_fitted():
    with pytest.raises(TypeError, match="codebook must be an object, got Identity: write codebook=EMACodebook"):
        fit_codebook(torch.nn.Identity(), X)
