"""Repeated rows against a comparison of all pairs."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vqssl.kernels.repeats import first_equal_rows, repeated_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(seed=st.integers(0, 2**31 - 1), rows=st.integers(0, 30), dim=st.integers(1, 4), values=st.integers(1, 4))
def test_equals_the_comparison_of_all_pairs(dtype, seed, rows, dim, values):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(values, (rows, dim), generator=generator).to(dtype) / 3
    x = torch.where(torch.rand(rows, dim, generator=generator) < 0.2, -x, x)  # minus zeros too
    counted = torch.rand(rows, generator=generator) < 0.7
    for chosen in (None, counted):
        found, first = repeated_rows(x, chosen), first_equal_rows(x, chosen)
        among = torch.ones(rows, dtype=torch.bool) if chosen is None else chosen
        for i in range(rows):
            earlier = [j for j in range(i) if among[j] and torch.equal(x[i], x[j])]
            assert found[i].item() == bool(among[i] and earlier)
            assert first[i].item() == (earlier[0] if among[i] and earlier else i)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_finds_all_copies_of_a_large_codebook(dtype):
    for base in (torch.randn(300, 64), torch.eye(300), torch.randint(3, (300, 64)).float()):
        base = base.to(dtype).unique(dim=0)
        pick = torch.randint(len(base), (4096,))
        assert len(first_equal_rows(base[pick]).unique()) == len(pick.unique())


def test_copies_interleaved_with_others_are_found():
    x = torch.randint(2, (2000, 20)).float()
    expected = {tuple(row): i for i, row in reversed(list(enumerate(x.tolist())))}
    assert first_equal_rows(x).tolist() == [expected[tuple(row)] for row in x.tolist()]


def test_nan_repeats_nothing_and_a_few_thousand_random_rows_neither():
    assert not repeated_rows(torch.full((3, 2), torch.nan)).any()
    x = torch.randn(5000, 8)
    assert not repeated_rows(x).any()
    assert repeated_rows(torch.cat([x, x]))[5000:].all()


def test_compiles_to_one_graph():
    x = torch.randint(2, (20, 3)).float()
    assert torch.equal(torch.compile(repeated_rows, fullgraph=True, backend="eager")(x), repeated_rows(x))
