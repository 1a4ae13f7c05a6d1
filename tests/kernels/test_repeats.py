"""Repeated rows against a comparison of all pairs."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vqssl.kernels.repeats import repeated_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(seed=st.integers(0, 2**31 - 1), rows=st.integers(0, 30), dim=st.integers(1, 4), values=st.integers(1, 4))
def test_equals_the_comparison_of_all_pairs(dtype, seed, rows, dim, values):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(values, (rows, dim), generator=generator).to(dtype) / 3
    x = torch.where(torch.rand(rows, dim, generator=generator) < 0.2, -x, x)  # minus zeros too
    counted = torch.rand(rows, generator=generator) < 0.7
    for chosen in (None, counted):
        found = repeated_rows(x, chosen)
        among = torch.ones(rows, dtype=torch.bool) if chosen is None else chosen
        for i in range(rows):
            earlier = [j for j in range(i) if among[j] and torch.equal(x[i], x[j])]
            assert found[i].item() == bool(among[i] and earlier)


def test_nan_repeats_nothing_and_a_few_thousand_random_rows_neither():
    assert not repeated_rows(torch.full((3, 2), torch.nan)).any()
    x = torch.randn(5000, 8)
    assert not repeated_rows(x).any()
    assert repeated_rows(torch.cat([x, x]))[5000:].all()


def test_compiles_to_one_graph():
    x = torch.randint(2, (20, 3)).float()
    assert torch.equal(torch.compile(repeated_rows, fullgraph=True, backend="eager")(x), repeated_rows(x))
