"""Measures equal slow formulas in Python floats, simulations and known results."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from vqssl.functional import codebook_usage
from vqssl.health import (
    code_spread,
    drift,
    dying_codes,
    effective_dimension,
    even_use,
    measures,
    nearest_distances,
    spectrum,
    turnover,
)

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
seeds = st.integers(0, 2**31 - 1)


@st.composite
def clouds(draw, least=1):
    """Draw codes with few distinct values, so that many are equal."""
    size, dim = draw(st.integers(least, 9)), draw(st.integers(1, 4))
    entry = st.integers(-2, 2)
    rows = draw(st.lists(st.lists(entry, min_size=dim, max_size=dim), min_size=size, max_size=size))
    return torch.tensor(rows).to(draw(st.sampled_from(DTYPES))) / 2


def slow_spread(codes):
    rows = codes.tolist()
    mean = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    return math.sqrt(sum(math.dist(row, mean) ** 2 for row in rows) / len(rows))


@given(codes=clouds())
def test_spread_equals_its_formula(codes):
    assert code_spread(codes).item() == pytest.approx(slow_spread(codes), rel=1e-12, abs=1e-14)


@given(seed=seeds, size=st.integers(1, 50))
def test_equal_codes_have_spread_0(seed, size):
    row = torch.randn(1, 7, generator=torch.Generator().manual_seed(seed)) * 1e6
    assert code_spread(row.repeat(size, 1)).item() == 0


# ---- nearest pairs ----


@given(codes=clouds(least=2), chunk=st.integers(1, 40))
def test_nearest_distances_equal_their_definition(codes, chunk):
    rows = codes.tolist()
    slow = [min(math.dist(a, b) for j, b in enumerate(rows) if j != i) for i, a in enumerate(rows)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measures, "CHUNK_ENTRIES", chunk)
        found = nearest_distances(codes).tolist()
    assert found == pytest.approx(slow, rel=1e-12, abs=0)


def test_only_equal_codes_have_distance_0():
    # Far from the origin, where a distance computed from squares is mostly rounding.
    codes = torch.randn(200, 32) + 1000
    codes[150:] = codes[:50]
    codes[149] = torch.nextafter(codes[140], torch.tensor(torch.inf))
    found = nearest_distances(codes)
    assert found[:50].eq(0).all()
    assert found[150:].eq(0).all()
    assert found[50:150].gt(0).all()
    assert found[149].item() == (codes[149].double() - codes[140].double()).norm().item()


def test_single_code_has_no_nearest_distance():
    assert nearest_distances(torch.ones(1, 3)).shape == (0,)


class Largest(TorchDispatchMode):
    """Records the size of the largest tensor that any operator returns."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.entries = max(self.entries, out.numel())
        return out


def test_memory_stays_below_all_pairs(monkeypatch):
    monkeypatch.setattr(measures, "CHUNK_ENTRIES", 2**14)
    codes = torch.randn(1500, 4)
    with Largest() as seen:
        found = nearest_distances(codes)
    assert 2**13 < seen.entries <= 2**14
    full = torch.cdist(codes.double(), codes.double()).fill_diagonal_(torch.inf).min(1).values
    torch.testing.assert_close(found, full, rtol=1e-12, atol=0)


# ---- dimension ----


def slow_spectrum(codes, weights):
    """Return the traces of the covariance and of its square, which the eigenvalues must reproduce."""
    rows, total = codes.tolist(), sum(weights)
    p = [w / total for w in weights]
    mean = [sum(q * x for q, x in zip(p, column, strict=True)) for column in zip(*rows, strict=True)]
    width = range(len(mean))
    c = [
        [sum(q * (r[i] - mean[i]) * (r[j] - mean[j]) for q, r in zip(p, rows, strict=True)) for j in width]
        for i in width
    ]
    return sum(c[i][i] for i in width), sum(c[i][j] ** 2 for i, j in itertools.product(width, width))


@given(codes=clouds(least=2), data=st.data())
def test_spectrum_belongs_to_the_weighted_covariance(codes, data):
    weights = data.draw(st.lists(st.integers(0, 5), min_size=len(codes), max_size=len(codes)).filter(any))
    found = spectrum(codes, torch.tensor(weights, dtype=torch.float64))
    trace, squares = slow_spectrum(codes, weights)
    assert found.shape == (codes.shape[1],)
    assert found.equal(found.sort(descending=True).values)
    assert found.ge(0).all()
    assert found.sum().item() == pytest.approx(trace, rel=1e-9, abs=1e-12)
    assert found.square().sum().item() == pytest.approx(squares, rel=1e-9, abs=1e-12)
    if squares > 1e-9:
        assert effective_dimension(found).item() == pytest.approx(trace**2 / squares, rel=1e-6)
        assert 1 - 1e-9 <= effective_dimension(found) <= min(codes.shape[1], len(codes) - 1) + 1e-9


def test_effective_dimension_counts_even_directions():
    for dim in (1, 3, 8):
        axes = torch.eye(dim).repeat(2, 1) * torch.tensor([1.0, -1.0]).repeat_interleave(dim)[:, None]
        padded = torch.cat([axes, torch.zeros(2 * dim, 5)], 1)
        assert effective_dimension(spectrum(padded)).item() == pytest.approx(dim)
    assert effective_dimension(torch.zeros(4)).item() == 0


def test_integer_weights_equal_repetitions():
    codes = torch.randn(3, 4)
    repeated = codes[torch.tensor([0, 0, 0, 2])]
    torch.testing.assert_close(spectrum(codes, torch.tensor([3.0, 0.0, 1.0])), spectrum(repeated))


# ---- movement ----


@given(old=clouds(least=2), seed=seeds)
def test_drift_equals_its_formula(old, seed):
    new = old + torch.randn(old.shape, generator=torch.Generator().manual_seed(seed)).to(old.dtype)
    moved = math.sqrt(sum(math.dist(a, b) ** 2 for a, b in zip(new.tolist(), old.tolist(), strict=True)) / len(old))
    spread = slow_spread(old)
    expected = moved / spread if code_spread(old) > 0 else math.inf
    assert drift(new, old).item() == pytest.approx(expected, rel=1e-9)
    assert drift(old, old).item() == 0
    assert turnover(old, old).item() == 0


@given(old=clouds(least=2), data=st.data())
def test_turnover_equals_its_definition(old, data):
    new = old[data.draw(st.permutations(range(len(old))))]
    gone = [
        min(math.dist(a, b) for b in old.tolist()) < math.dist(a, old[i].tolist()) for i, a in enumerate(new.tolist())
    ]
    assert turnover(new, old).item() == pytest.approx(sum(gone) / len(old))


def test_independent_codes_have_drift_sqrt_2():
    assert drift(torch.randn(4000, 16), torch.randn(4000, 16)).item() == pytest.approx(math.sqrt(2), rel=0.02)


def test_measures_are_invariant_to_scale_rotation_and_shift():
    new, old = torch.randn(2, 30, 5, dtype=torch.float64)
    turned = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q
    for measure in (drift, turnover):
        torch.testing.assert_close(measure(7 * new @ turned + 3, 7 * old @ turned + 3), measure(new, old))
    torch.testing.assert_close(nearest_distances(7 * new @ turned + 3), 7 * nearest_distances(new))


# ---- counts ----


@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=20).filter(any),
    tau=st.sampled_from([0.0, 0.1, 0.3, 0.5, 1.0]),
)
def test_dying_codes_equal_their_definition(counts, tau):
    n = torch.tensor(counts, dtype=torch.float64)
    fair = sum(counts) / len(counts)
    dead = [c == 0 or c < tau * fair for c in counts]
    soon = [c / math.e < tau * fair and c < fair for c in counts]
    assert dying_codes(n, tau).item() == sum(s and not d for s, d in zip(soon, dead, strict=True))
    assert dying_codes(n, tau) + codebook_usage(n, tau).dead <= len(counts)


def test_code_at_the_threshold_is_alive():
    # The mean is 2: a code of 1 is alive at tau = 0.5, and dying; one below it is dead.
    counts = torch.tensor([1.0, 3.0, 3.5, 0.5])
    assert dying_codes(counts, 0.5).item() == 1
    assert codebook_usage(counts, 0.5).dead.item() == 1


def test_dying_codes_are_dead_one_memory_length_later():
    decay = 0.999
    counts = torch.rand(500, dtype=torch.float64) * 2
    mean = counts.mean()  # in training the other codes keep the mean constant
    later = counts * decay ** round(1 / (1 - decay))
    alive = counts >= 0.1 * mean
    assert dying_codes(counts).item() == pytest.approx((alive & (later < 0.1 * mean)).sum().item(), abs=1)


@pytest.mark.parametrize("decay", [0.9, 0.97])
@pytest.mark.parametrize("remembered", [1.0, 2.0, 4.0, 10.0, 100.0])
@pytest.mark.parametrize("tau", [0.1, 0.27, 0.6])
def test_even_use_matches_simulated_counts(remembered, decay, tau):
    """The simulation: K codes, Poisson tokens, a moving average."""
    size = 10_000
    rate = remembered * (1 - decay) / (1 + decay)
    counts = torch.full((size,), rate)
    for _ in range(round(12 / (1 - decay))):
        counts = decay * counts + (1 - decay) * torch.poisson(torch.full((size,), rate))
    usage = codebook_usage(counts, tau)
    perplexity, dead = even_use(remembered, tau)
    assert usage.perplexity.item() / size == pytest.approx(perplexity, rel=0.1)
    assert 1 - usage.fraction.item() == pytest.approx(dead, abs=0.02)
    if tau * remembered < 2:  # where the formula is exact in the limit
        assert 1 - usage.fraction.item() == pytest.approx(dead, rel=0.15, abs=0.006)


def test_even_use_of_many_tokens_has_perplexity_k():
    perplexity, dead = even_use(float("inf"), 0.5)
    assert perplexity == pytest.approx(1)
    assert dead == 0


# ---- refusals ----


@pytest.mark.parametrize(
    ("error", "says", "call"),
    [
        (TypeError, "codes must be a torch.Tensor", lambda: code_spread([[1.0]])),  # type: ignore[arg-type]
        (TypeError, "floating", lambda: nearest_distances(torch.ones(3, 2).long())),
        (ValueError, r"codes must be \(K, D\)", lambda: nearest_distances(torch.ones(3))),
        (ValueError, r"codes must be \(K, D\)", lambda: spectrum(torch.ones(0, 3))),
        (ValueError, "one number for each of the 3 codes, got 2", lambda: spectrum(torch.ones(3, 2), torch.ones(2))),
        (ValueError, "one shape", lambda: drift(torch.ones(3, 2), torch.ones(2, 2))),
        (ValueError, "one shape", lambda: turnover(torch.ones(3, 2), torch.ones(2, 2))),
        (ValueError, "fraction of the fair share", lambda: dying_codes(torch.ones(3), 1.5)),
        (ValueError, r"\(K,\)", lambda: dying_codes(torch.ones(3, 2))),
        (ValueError, "above 0", lambda: even_use(0.0)),
        (ValueError, "above 0", lambda: even_use(float("nan"))),
        (ValueError, "fraction of the fair share", lambda: even_use(1.0, -0.1)),
    ],
)
def test_measures_refuse_wrong_arguments(error, says, call):
    with pytest.raises(error, match=says):
        call()
