"""The Triton kernels against float64, in Triton's interpreter: run by test_triton.py, in a process of its own.

The interpreter has to be asked for before triton is first imported (TRITON_INTERPRET=1).
"""

import math
import os

import pytest
import torch

from tests.kernels.test_code_sums import slow
from tests.kernels.test_nearest import KINDS, material
from vqssl.kernels import nearest_reference
from vqssl.kernels.code_sums_triton import code_sums_triton
from vqssl.kernels.nearest_triton import nearest_codeword_triton

assert os.environ.get("TRITON_INTERPRET") == "1", "run by tests/kernels/test_triton.py"

# numpy's word on infinities and NaN that the kernels compare on purpose.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    """Whatever is not written before it is read shows, and whatever is read beyond its end."""
    empty = torch.empty

    def poisoned(*size, **options):
        shape = torch.Size(size[0] if isinstance(size[0], tuple | torch.Size) else size)
        made = empty(shape.numel() + 4096, **options)
        made.fill_(torch.nan if made.is_floating_point() else -(2**40))
        return made[: shape.numel()].view(shape)

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture
def open_rows(monkeypatch):
    """How many rows the first look and the closer look left open."""
    zeros, seen = torch.zeros, []

    def remembered(*size, **options):
        made = zeros(*size, **options)
        if options.get("dtype") == torch.int64 and size == (2,):
            seen.append(made)
        return made

    monkeypatch.setattr(torch, "zeros", remembered)
    return seen


def check(x, codes, metric="euclidean"):
    found = nearest_codeword_triton(x, codes, metric)
    assert found.dtype == torch.int64
    expected = torch.cat([nearest_reference(part, codes, metric) for part in x.split(64)])
    wrong = (found != expected).nonzero().flatten().tolist()
    for row in wrong:  # only a difference in the last bit of float64 sums excuses another answer
        a, b = (exact_score(x[row], codes[index], metric) for index in (found[row], expected[row]))
        assert abs(a - b) <= 1e-15 * float(x[row].double().square().sum() + codes.double().square().sum(-1).max())
    return found


def exact_score(token, code, metric):
    if metric == "cosine":
        return math.fsum((token.double() * code.double()).tolist()) / max(float(code.double().norm()), 1e-300)
    return -math.fsum((token.double() - code.double()).square().tolist())


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_material(kind, dtype, metric):
    check(*material(kind, 33, 70, 20, dtype), metric)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize(("n", "k", "d"), [(1, 1, 1), (63, 1, 60), (257, 65, 129), (1, 1000, 60), (63, 2049, 16)])
def test_odd_sizes(n, k, d, metric):
    check(*material("random", n, k, d, torch.float32), metric)


@pytest.mark.parametrize("d", [256, 300, 1030])
def test_wide_tokens_in_one_piece_and_in_several(d):
    check(*material("random", 20, 70, d, torch.float32))


def test_no_rows():
    assert nearest_codeword_triton(torch.empty(0, 4), torch.randn(3, 4), "euclidean").shape == (0,)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_junk_in_tokens_and_codes(metric):
    x, codes = material("random", 70, 70, 5, torch.float32)
    x[3, 1], x[40, 4], x[69, 0] = torch.nan, torch.inf, -torch.inf
    codes[0, 0], codes[50, 2] = torch.nan, torch.inf
    found = check(x, codes, metric)
    assert found[[3, 40, 69]].tolist() == [-1, -1, -1]
    assert nearest_codeword_triton(x, torch.full((70, 5), torch.nan), metric).tolist() == [-1] * 70


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1e25, 1e37])
def test_scales_that_leave_fp16(scale, metric):
    check(torch.randn(20, 7) * scale, torch.randn(40, 7) * scale, metric)
    check(torch.randn(20, 7), torch.randn(40, 7) * scale, metric)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_one_code_far_beyond_the_sample(metric):
    """The scale comes from a sample of the codes, which this one is not in."""
    x, codes = material("random", 20, 600, 5, torch.float32)
    codes[301] *= 1e30
    check(torch.cat([x, codes[301:302]]), codes, metric)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_strides(metric):
    base = torch.randn(140, 140)
    check(base[:6, :50].T, base[6:12, :40].T, metric)
    check(base[::2, ::20], base[1::2, 1::20], metric)
    check(base[:50, :1].expand(50, 7), base[:40, 1:8].flip(0), metric)


def test_offsets_beyond_32_bits():
    """Rows 2^30 entries apart: 4 GB of addresses, of which few are touched, and none by the poison."""
    far = torch.zeros(0, dtype=torch.float16).new_empty(2**31 + 64).as_strided((3, 8), (2**30, 1))
    far.copy_(torch.randn(3, 8))
    codes = torch.randn(16, 8)
    assert torch.equal(check(far, codes), check(far.clone(), codes))
    assert torch.equal(check(codes, far), check(codes, far.clone()))
    for x in (far, far.clone()):
        counts, sums = code_sums_triton(x, torch.tensor([1, 0, 1]), 2)
        assert counts.tolist() == [1, 2]
        torch.testing.assert_close(sums[0], far[1].float())


@pytest.mark.parametrize("precision", ["fp16", "tf32"])
def test_rounded_precision(precision):
    x, codes = material("random", 100, 130, 16, torch.float32)
    found = nearest_codeword_triton(x, codes, "euclidean", precision)
    best = nearest_reference(x, codes)
    distance = (x - codes[found]).square().sum(-1)
    least = (x - codes[best]).square().sum(-1)
    assert (distance <= least * 1.01 + 0.01).all()
    assert (found != best).float().mean() < 0.05
    # Equal codes have equal scores: the lowest wins here as well.
    twice = torch.cat([codes, codes])
    assert torch.equal(nearest_codeword_triton(x, twice, "euclidean", precision) < 130, torch.ones(100).bool())
    x[7] = torch.nan
    assert nearest_codeword_triton(x, codes, "euclidean", precision)[7] == -1


def test_each_look_has_its_share(open_rows):
    """Right answers alone would not show that the tensor cores' ones were ever trusted."""
    x, codes = material("random", 512, 256, 64, torch.float32)
    check(x, codes)
    first, closer = open_rows[-1].tolist()
    assert 0 < first < 100  # a few percent
    assert closer <= 2
    check(x[:64], codes[torch.arange(256) % 128])  # every winner is a tie
    assert open_rows[-1].tolist() == [64, 64]


@pytest.mark.parametrize("d", [1, 5, 16, 33])
def test_narrow_tokens_are_certified(open_rows, d):
    """Lengths are summed in pieces of 32: what stands beyond a narrow centre must not be in them."""
    x, codes = torch.randn(128, d), torch.randn(3, d)
    check(x, codes)
    assert open_rows[-1][0] < 16


def test_a_large_common_mean_is_taken_out(open_rows):
    x, codes = material("far mean", 256, 128, 64, torch.float32)
    check(x, codes)
    assert open_rows[-1][0] < 64


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("n", "k", "d"), [(0, 3, 4), (1, 1, 1), (200, 7, 5), (70, 40, 130)])
def test_code_sums(n, k, d, dtype, deterministic):
    x, indices = torch.randn(n, d).to(dtype), torch.randint(-1, k, (n,))
    x[indices < 0] = torch.nan
    expected_counts, expected_sums = slow(x, indices, k)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(deterministic)
    try:
        for tokens in (x, x.T.contiguous().T):
            counts, sums = code_sums_triton(tokens, indices, k)
            assert counts.dtype == sums.dtype == torch.float32
            assert counts.tolist() == expected_counts
            torch.testing.assert_close(sums.double(), expected_sums, rtol=1e-5, atol=1e-4)
    finally:
        torch.use_deterministic_algorithms(before)
