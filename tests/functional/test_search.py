"""The public search: leading shapes, precisions, gradients and what it refuses.

tests/kernels holds the search itself to its rule.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import vqssl
from vqssl import kernels
from vqssl.functional import nearest_codeword
from vqssl.functional.search import resolve_precision

seeds = st.integers(0, 2**31 - 1)


def setting(seed, *shape, codes=7, dim=4):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, dim, generator=generator, dtype=torch.float64)
    return x, torch.randn(codes, dim, generator=generator, dtype=torch.float64)


def slow_nearest(token, codes, metric):
    """Return the index of the nearest code by Python's own arithmetic, the first of equals."""
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
        # There are two directions, and rounding decides among equal ones: only the sign is determined.
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
def test_half_precision_gives_the_answer_of_its_values_in_float64(seed, dtype):
    x, codebook = (t.to(dtype) for t in setting(seed, 20))
    assert nearest_codeword(x, codebook).equal(nearest_codeword(x.double(), codebook.double()))


def test_passes_no_gradient():
    x, codebook = (t.requires_grad_() for t in setting(0, 5))
    indices = nearest_codeword(x, codebook)
    assert not indices.requires_grad
    assert indices.grad_fn is None


@pytest.mark.parametrize("precision", [*kernels.PRECISIONS, "torch"])
def test_every_precision_is_exact_on_a_cpu(precision):
    x, codes = torch.randn(50, 4), torch.randn(9, 4)
    assert nearest_codeword(x, codes, precision=precision).equal(nearest_codeword(x, codes))
    ours, exact = (vqssl.EMACodebook(codebook_size=9, dim=4, precision=name) for name in (precision, "exact"))
    assert ours(x).indices.equal(exact(x).indices)


@pytest.mark.parametrize(("switch", "expected"), [("highest", "exact"), ("high", "tf32"), ("medium", "bf16")])
def test_precision_torch_follows_the_matmul_precision(switch, expected):
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(switch)
        assert resolve_precision("torch") == expected
        assert resolve_precision("exact") == "exact"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    "build",
    [
        lambda name: nearest_codeword(torch.randn(5, 4), torch.randn(9, 4), precision=name),
        lambda name: vqssl.EMACodebook(codebook_size=9, dim=4, precision=name),
    ],
)
def test_refuses_unknown_precision(build):
    with pytest.raises(
        ValueError, match="precision must be one of 'exact', 'tf32', 'fp16', 'bf16', 'torch', got 'fp8'"
    ):
        build("fp8")


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
        (ValueError, "at least one entry", torch.zeros(2, 0), torch.zeros(4, 0), "euclidean"),
        (ValueError, r"codebook must be \(K, D\)", torch.zeros(2, 3), torch.zeros(3), "euclidean"),
        (ValueError, "at least one code", torch.zeros(2, 3), torch.zeros(1, 4, 3), "euclidean"),
        (ValueError, "on one device", torch.zeros(2, 3), torch.zeros(4, 3, device="meta"), "euclidean"),
    ],
)
def test_refuses_wrong_arguments(error, says, x, codebook, metric):
    with pytest.raises(error, match=says):
        nearest_codeword(x, codebook, metric)
