"""The tiled search: its blocks and tiles, its error bound, and the memory it holds."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels.material import material
from vqssl import kernels
from vqssl.kernels.nearest import tiled
from vqssl.kernels.nearest.rule import nearest_reference


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("kind", ["random", "far mean", "duplicated", "on the codes"])
def test_blocks_of_codes_do_not_matter(kind, metric, monkeypatch):
    """Codebooks beyond the size that is scored at once, and last blocks that are not full."""
    n, k, d = 500, 5000, 7
    x, codes = material(kind, n, k, d, torch.float32)
    codes = codes.flip(0)  # tokens that lie on codes lie on the last ones
    expected = torch.cat([kernels.nearest_reference(part, codes, metric) for part in x.split(50)])
    found = kernels.nearest_codeword(x, codes, metric)
    assert torch.equal(found, expected)
    assert found.max() > 4096, "the last block was never chosen"
    monkeypatch.setattr(tiled, "MAX_CODES", 64)
    assert torch.equal(kernels.nearest_codeword(x, codes, metric), expected)


@pytest.fixture
def closer_looks(monkeypatch):
    """Return a list of the numbers of tokens that were compared in float64, by pairs or by a product."""
    looked_at, settle, last_look = [], tiled.settle, tiled.nearest_without_rounding

    def settle_counted(x, codes, metric, row, code):
        looked_at.append(len(row.unique()))
        return settle(x, codes, metric, row, code)

    def last_look_counted(x, *arguments):
        looked_at.append(len(x))
        return last_look(x, *arguments)

    monkeypatch.setattr(tiled, "settle", settle_counted)
    monkeypatch.setattr(tiled, "nearest_without_rounding", last_look_counted)
    return looked_at


def test_first_look_decides_most_rows(closer_looks):
    """Otherwise the search would be right but slow."""
    x, codes = material("random", 2000, 1000, 64, torch.float32)
    kernels.nearest_codeword(x, codes, "euclidean")
    assert 0 < sum(closer_looks) < 40
    closer_looks.clear()
    kernels.nearest_codeword(x, codes[torch.arange(2000) % 1000], "euclidean")  # every winner is a tie
    assert sum(closer_looks) < 40


def test_error_bound_covers_the_matmul_precision_that_was_set(monkeypatch):
    """This machine's products may not round as they are allowed to; so the test rounds their input to bfloat16."""
    x, codes = material("random", 1000, 1000, 3, torch.float32)  # so many codes in three dimensions are close
    expected = kernels.nearest_reference(x, codes)
    exact_scores, calls = tiled.Factor.scores, []

    def rounded_scores(factor, tokens):
        if tokens.dtype != torch.float32:
            return exact_scores(factor, tokens)
        calls.append(1)
        return tokens.bfloat16().float() @ factor.weight.bfloat16().float().T + factor.constant

    monkeypatch.setattr(tiled.Factor, "scores", rounded_scores)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert torch.equal(kernels.nearest_codeword(x, codes, "euclidean"), expected)
    finally:
        torch.set_float32_matmul_precision(before)
    assert calls, "the search no longer calls Factor.scores: this test checks nothing"
    # And the rounding does decide: without the wider bound some answers are wrong.
    assert not torch.equal(kernels.nearest_codeword(x, codes, "euclidean"), expected)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_answers_are_the_same_without_onednn(dtype, metric, monkeypatch):
    x, codes = material("clustered", 300, 130, 20, dtype)
    expected = kernels.nearest_codeword(x, codes, metric)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert tiled.Factor(codes, codes[:, 0], 300).packed is None
    assert torch.equal(kernels.nearest_codeword(x, codes, metric), expected)


def ties(kind, n=400, k=300, d=16):
    """Return tokens and codes of which many tie, or lie so close that float32 cannot tell."""
    generator = torch.Generator().manual_seed(0)
    x, codes = torch.randn(n, d, generator=generator), torch.randn(k, d, generator=generator)
    eye, half = torch.eye(d), torch.randn(k // 2, d, generator=generator)
    return {
        "all codes equal": (x, codes[:1].expand(k, d)),
        "all tokens equal": (x[:1].expand(n, d), codes),
        "zero tokens": (torch.zeros(n, d), codes),
        "one-hot codes": ((x > 0).float(), torch.cat([eye, -eye])),
        "negative one-hot codes": (x.relu(), -eye),
        "binary": ((x > 0).float(), (codes > 0).float()),
        "symmetric": (x[:1].expand(n, d), torch.cat([x[:1] + half, x[:1] - half])),
        "midpoints": (half.repeat(3, 1) + 1, torch.cat([half, half + 2])),
        "parallel codes": (x, torch.cat([codes, 3 * codes, 4 * codes, -0.0 * codes])),
        "two clusters": (x + 1e6 * (torch.arange(n) % 2)[:, None], codes + 1e6 * (torch.arange(k) % 2)[:, None]),
        "far along an axis without spread": (x + 1e6 * eye[0], codes * (1 - eye[0])),
        "whole numbers and others": (torch.cat([x, x.round()]), codes.round()),
        "minus zero": (x, torch.cat([eye, eye * -0.0, eye])),
    }[kind]


TIES = [
    "all codes equal", "all tokens equal", "zero tokens", "one-hot codes", "negative one-hot codes", "binary",
    "symmetric", "midpoints", "parallel codes", "two clusters", "far along an axis without spread",
    "whole numbers and others", "minus zero",
]  # fmt: skip


@pytest.mark.parametrize("blocks", [2**13, 64])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("kind", TIES)
def test_ties_and_close_calls_are_exact(kind, metric, blocks, monkeypatch):
    monkeypatch.setattr(tiled, "MAX_CODES", blocks)
    monkeypatch.setattr(tiled, "_most_rows", lambda codes: 64)  # several tiles
    x, codes = ties(kind)
    assert torch.equal(kernels.nearest_codeword(x, codes, metric), kernels.nearest_reference(x, codes, metric))


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize(
    "kind", ["all codes equal", "all tokens equal", "zero tokens", "one-hot codes", "binary", "minus zero"]
)
def test_many_way_ties_are_not_compared_pair_by_pair(kind, metric, monkeypatch):
    pairs, settle = [], tiled.settle

    def count(x, codes, metric, row, code):
        pairs.append(len(row))
        return settle(x, codes, metric, row, code)

    monkeypatch.setattr(tiled, "settle", count)
    x, codes = ties(kind)
    kernels.nearest_codeword(x, codes, metric)
    assert sum(pairs) <= tiled.FEW * len(x)


def largest_allocation(function, *arguments):
    """Return the bytes that a single operator allocates at most, also inside a custom operator."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function(*arguments)
    return max(event.self_cpu_memory_usage for event in profile.events())


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("kind", ["random", "equal rows"])
def test_never_holds_tokens_by_codes(kind, metric):
    n, k = 24_000, 256
    x, codes = material(kind, n, k, 8, torch.float32)
    largest = largest_allocation(kernels.nearest_codeword, x, codes, metric)
    assert largest > 0, "the profiler saw no allocation"
    # A matrix of bytes would already be too much. With all rows equal, every one takes the second look.
    assert largest < n * k * 4 / 2
    assert largest_allocation(torch.cdist, x, codes) >= n * k * 4  # and the profiler does see such a matrix


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize(
    "change",
    [
        lambda c: c[torch.randint(len(c), (len(c),))],
        lambda c: torch.cat([c[:1] * 1e6, c[1:]]),
        lambda c: torch.cat([c[:3] * 1e6, c[3:9] * 1e3, c[9:]]),
        lambda c: torch.cat([c[:1] * 1e30, c[1:]]),
        lambda c: torch.where(torch.arange(len(c))[:, None] % 10 == 0, 1e4 * c, c),
        lambda c: c + 1e6 * torch.eye(16)[0] * (torch.arange(len(c)) == 7)[:, None],
    ],
    ids=[
        "copies",
        "a far code",
        "far codes at two scales",
        "a code near overflow",
        "a tenth far",
        "far along one axis",
    ],
)
def test_copies_and_far_codes_leave_few_rows_to_closer_looks(metric, change, closer_looks):
    x, codes = torch.randn(2000, 16), change(torch.randn(500, 16))
    found = kernels.nearest_codeword(x, codes, metric)
    assert torch.equal(found, nearest_reference(x, codes, metric))
    assert sum(closer_looks) < 40


@given(seed=st.integers(0, 2**31 - 1), scales=st.floats(0, 9))
def test_codes_and_tokens_of_very_different_lengths_are_exact(seed, scales):
    generator = torch.Generator().manual_seed(seed)
    x, codes = torch.randn(40, 3, generator=generator), torch.randn(30, 3, generator=generator)
    x *= 10 ** (scales * (2 * torch.rand(40, 1, generator=generator) - 1))
    codes *= 10 ** (scales * (2 * torch.rand(30, 1, generator=generator) - 1))
    assert torch.equal(kernels.nearest_codeword(x, codes, "euclidean"), nearest_reference(x, codes))
