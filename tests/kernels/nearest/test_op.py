"""The operator ``vqssl::nearest_codeword`` as PyTorch sees it."""

import pytest
import torch

from tests.kernels.material import material
from vqssl import kernels
from vqssl.functional import nearest_codeword


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("n", [0, 5])
def test_passes_torchs_operator_checks(metric, dtype, n):
    x, codes = torch.randn(n, 3).to(dtype), torch.randn(7, 3).to(dtype)
    torch.library.opcheck(torch.ops.vqssl.nearest_codeword.default, (x, codes, metric))
    torch.library.opcheck(torch.ops.vqssl.nearest_codeword.default, (x.T.contiguous().T, codes, metric))


def test_does_not_write_to_its_input():
    x, codes = torch.randn(300, 5), torch.randn(70, 5)
    before = x.clone(), codes.clone()
    kernels.nearest_codeword(x, codes, "euclidean")
    assert torch.equal(x, before[0])
    assert torch.equal(codes, before[1])


@pytest.mark.parametrize("kind", ["random", "clustered", "far mean"])
def test_autocast_and_matmul_precision_do_not_matter(kind):
    x, codes = material(kind, 257, 200, 60, torch.float32)
    expected = kernels.nearest_codeword(x, codes, "euclidean")
    assert torch.equal(expected, kernels.nearest_reference(x, codes))
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            assert torch.equal(kernels.nearest_codeword(x, codes, "euclidean"), expected)
            assert torch.equal(nearest_codeword(x, codes), expected)
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("high", "medium"):
            torch.set_float32_matmul_precision(precision)
            assert torch.equal(kernels.nearest_codeword(x, codes, "euclidean"), expected)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_vmap_equals_a_loop(metric):
    x, codes = torch.randn(3, 5, 4), torch.randn(3, 7, 4)

    def search(tokens, codebook):
        return kernels.nearest_codeword(tokens, codebook, metric)

    both = torch.vmap(search)(x, codes)
    assert torch.equal(both, torch.stack([search(*each) for each in zip(x, codes, strict=True)]))
    one_codebook = torch.vmap(search, in_dims=(1, None))(x.movedim(0, 1), codes[0])
    assert torch.equal(one_codebook, torch.stack([search(tokens, codes[0]) for tokens in x]))
