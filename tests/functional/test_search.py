"""The public search: what it refuses, and that leading shapes, strides and gradients are as promised.

The search itself is held to its rule in tests/kernels.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vqssl.functional import nearest_codeword

seeds = st.integers(0, 2**31 - 1)


def setting(seed, *shape, codes=7, dim=4):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, dim, generator=generator, dtype=torch.float64)
    return x, torch.randn(codes, dim, generator=generator, dtype=torch.float64)


def slow_nearest(token, codes, metric):
    """By Python's own arithmetic; the first of equals."""
    if metric == "euclidean":
        distances = [sum((a - b) ** 2 for a, b in zip(token, code, strict=True)) for code in codes]
    else:
        distances = [
            -sum(a * b for a, b in zip(token, code, strict=True)) / sum(b * b for b in code) ** 0.5 for code in codes
        ]
    return distances.index(min(distances))


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@given(seed=seeds, shape=st.lists(st.integers(0, 3), max_size=3), codes=st.integers(1, 9), dim=st.integers(1, 5))
def test_any_leading_shape(metric, seed, shape, codes, dim):
    x, codebook = setting(seed, *shape, codes=codes, dim=dim)
    indices = nearest_codeword(x, codebook, metric)
    assert indices.dtype == torch.int64
    assert indices.shape == tuple(shape)
    expected = [slow_nearest(token, codebook.tolist(), metric) for token in x.reshape(-1, dim).tolist()]
    if dim == 1 and metric == "cosine":
        # There are two directions, and ties by rounding: the sign is all that can be asked for.
        found = codebook[indices.reshape(-1), 0].sign()
        torch.testing.assert_close(found, codebook[torch.tensor(expected, dtype=torch.int64), 0].sign())
    else:
        assert indices.reshape(-1).tolist() == expected


@given(seed=seeds)
def test_cosine_is_euclidean_of_unit_vectors(seed):
    x, codebook = setting(seed, 20)
    unit = torch.nn.functional.normalize
    assert nearest_codeword(x, codebook, "cosine").equal(nearest_codeword(unit(x, dim=-1), unit(codebook, dim=-1)))


@given(seed=seeds, dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
def test_half_precision_is_searched_as_the_values_it_holds(seed, dtype):
    x, codebook = (t.to(dtype) for t in setting(seed, 20))
    assert nearest_codeword(x, codebook).equal(nearest_codeword(x.double(), codebook.double()))


def test_no_gradient_passes():
    x, codebook = (t.requires_grad_() for t in setting(0, 5))
    assert not nearest_codeword(x, codebook).requires_grad


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_what_is_not_finite_gets_no_code_and_is_none(metric):
    x, codebook = setting(0, 6)
    x[1, 0], x[2, 3], x[4, 1] = torch.nan, torch.inf, -torch.inf
    codebook[3, 1] = torch.nan
    indices = nearest_codeword(x, codebook, metric)
    assert (indices == -1).tolist() == [False, True, True, False, True, False]
    assert (indices != 3).all()


@pytest.mark.parametrize(
    ("error", "says", "x", "codebook", "metric"),
    [
        (ValueError, "metric must be one of 'euclidean', 'cosine'", torch.zeros(2, 3), torch.zeros(4, 3), "manhattan"),
        (TypeError, "x must have a floating", torch.zeros(2, 3).long(), torch.zeros(4, 3), "euclidean"),
        (TypeError, "x must be a torch.Tensor", [[1.0] * 3], torch.zeros(4, 3), "euclidean"),
        (TypeError, "codebook must have a floating", torch.zeros(2, 3), torch.zeros(4, 3).long(), "euclidean"),
        (TypeError, "codebook must be a torch.Tensor", torch.zeros(2, 3), None, "euclidean"),
        (ValueError, r"one width D .* and \(4, 3\)", torch.zeros(2, 4), torch.zeros(4, 3), "euclidean"),
        (ValueError, r"one width D .* and \(4, 3\)", torch.tensor(1.0), torch.zeros(4, 3), "euclidean"),
        (ValueError, "at least one code", torch.zeros(2, 3), torch.zeros(0, 3), "euclidean"),
        (ValueError, "at least one code", torch.zeros(2, 0), torch.zeros(4, 0), "euclidean"),
        (ValueError, "at least one code", torch.zeros(2, 3), torch.zeros(3), "euclidean"),
        (ValueError, "at least one code", torch.zeros(2, 3), torch.zeros(1, 4, 3), "euclidean"),
        (ValueError, "on one device", torch.zeros(2, 3), torch.zeros(4, 3, device="meta"), "euclidean"),
    ],
)
def test_refuses(error, says, x, codebook, metric):
    with pytest.raises(error, match=says):
        nearest_codeword(x, codebook, metric)
