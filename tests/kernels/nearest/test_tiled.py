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


def test_first_look_certifies_most_rows(monkeypatch):
    """Otherwise the search would be right but slow."""
    x, codes = material("random", 2000, 1000, 64, torch.float32)
    looked_at, second_look = [], tiled.second_look

    def count(rows, *arguments):
        looked_at.append(len(rows))
        return second_look(rows, *arguments)

    monkeypatch.setattr(tiled, "second_look", count)
    kernels.nearest_codeword(x, codes, "euclidean")
    assert sum(looked_at) < 40
    looked_at.clear()
    kernels.nearest_codeword(x, codes[torch.arange(2000) % 1000], "euclidean")  # every winner is a tie
    assert sum(looked_at) < 40


def test_error_bound_covers_the_matmul_precision_that_was_set(monkeypatch):
    """This machine's products may not round as they are allowed to; so the test rounds their input to bfloat16."""
    x, codes = material("random", 1000, 1000, 3, torch.float32)  # so many codes in three dimensions are close
    expected = kernels.nearest_reference(x, codes)
    product, calls = torch.mm, []

    def rounded_product(a, b, *, out):
        calls.append(1)
        return product(a.bfloat16().to(a.dtype), b.bfloat16().to(b.dtype), out=out)

    monkeypatch.setattr(torch, "mm", rounded_product)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert torch.equal(kernels.nearest_codeword(x, codes, "euclidean"), expected)
    finally:
        torch.set_float32_matmul_precision(before)
    assert calls, "the search no longer calls torch.mm: this test checks nothing"
    # And the rounding does decide: without the wider bound some answers are wrong.
    assert not torch.equal(kernels.nearest_codeword(x, codes, "euclidean"), expected)


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
    ],
    ids=["copies", "a far code", "far codes at two scales", "a code near overflow"],
)
def test_copies_and_far_codes_leave_few_rows_to_the_second_look(metric, change, monkeypatch):
    x, codes = torch.randn(2000, 16), change(torch.randn(500, 16))
    looked_at = []
    second_look = tiled.second_look

    def count(rows, *arguments):
        looked_at.append(len(rows))
        return second_look(rows, *arguments)

    monkeypatch.setattr(tiled, "second_look", count)
    found = kernels.nearest_codeword(x, codes, metric)
    assert torch.equal(found, nearest_reference(x, codes, metric))
    assert sum(looked_at) < 40


@given(seed=st.integers(0, 2**31 - 1), scales=st.floats(0, 9))
def test_codes_and_tokens_of_very_different_lengths_are_exact(seed, scales):
    generator = torch.Generator().manual_seed(seed)
    x, codes = torch.randn(40, 3, generator=generator), torch.randn(30, 3, generator=generator)
    x *= 10 ** (scales * (2 * torch.rand(40, 1, generator=generator) - 1))
    codes *= 10 ** (scales * (2 * torch.rand(30, 1, generator=generator) - 1))
    assert torch.equal(kernels.nearest_codeword(x, codes, "euclidean"), nearest_reference(x, codes))
