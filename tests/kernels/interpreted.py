"""The Triton kernels against float64, in Triton's interpreter: run by test_triton.py, in a process of its own.

Triton reads TRITON_INTERPRET=1 when it is first imported. With TENSOR_CORES=A100 or H100 products are those of such a
device (tensor_cores.py).
"""

import math
import os

import pytest
import torch
from triton.runtime.interpreter import InterpreterBuilder

from tests.kernels import tensor_cores
from tests.kernels.material import KINDS, LAYOUTS, code_sums_by_loop, material, of_layout
from vqssl import fused_update
from vqssl.kernels import nearest_reference
from vqssl.kernels.code_sums_triton import code_sums_triton
from vqssl.kernels.codebook_update_triton import next_state_triton, write_state_triton
from vqssl.kernels.nearest.search_triton import nearest_codeword_triton, search_triton

assert os.environ.get("TRITON_INTERPRET") == "1", "run by tests/kernels/test_triton.py"

if "TENSOR_CORES" in os.environ:
    tensor_cores.install(os.environ["TENSOR_CORES"])

# numpy warns of infinities and NaN, which the kernels compare on purpose.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    """Fill new memory, and some beyond its end, with NaN: a read before a write, or beyond the end, then shows."""
    empty = torch.empty

    def poisoned(*size, **options):
        shape = torch.Size(size[0] if isinstance(size[0], tuple | torch.Size) else size)
        made = empty(shape.numel() + 4096, **options)
        made.fill_(torch.nan if made.is_floating_point() else max(-(2**40), torch.iinfo(made.dtype).min))
        return made[: shape.numel()].view(shape)

    monkeypatch.setattr(torch, "empty", poisoned)


def check(x, codes, metric="euclidean"):
    """Assert that the kernels agree with the reference; return the indices and how many rows each look left open."""
    found, left_open = search_triton(x, codes, metric)
    assert found.dtype == torch.int64
    expected = torch.cat([nearest_reference(part, codes, metric) for part in x.split(64)])
    wrong = (found != expected).nonzero().flatten().tolist()
    for row in wrong:  # only a difference in the last bit of float64 sums excuses another answer
        a, b = (exact_score(x[row], codes[index], metric) for index in (found[row], expected[row]))
        assert abs(a - b) <= 1e-15 * float(x[row].double().square().sum() + codes.double().square().sum(-1).max())
    return found, left_open.tolist()


def exact_score(token, code, metric):
    if metric == "cosine":
        return math.fsum((token.double() * code.double()).tolist()) / max(float(code.double().norm()), 1e-300)
    return -math.fsum((token.double() - code.double()).square().tolist())


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_float64_on_every_kind_of_material(kind, dtype, metric):
    check(*material(kind, 33, 70, 20, dtype), metric)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize(("n", "k", "d"), [(1, 1, 1), (63, 1, 60), (257, 65, 129), (1, 1000, 60), (63, 2049, 16)])
def test_equals_float64_at_odd_sizes(n, k, d, metric):
    check(*material("random", n, k, d, torch.float32), metric)


@pytest.mark.parametrize("d", [256, 300, 1030])
def test_equals_float64_for_wide_tokens_in_one_piece_and_in_several(d):
    check(*material("random", 20, 70, d, torch.float32))


def test_no_tokens():
    assert nearest_codeword_triton(torch.empty(0, 4), torch.randn(3, 4), "euclidean").shape == (0,)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_nonfinite_tokens_get_minus_one_and_nonfinite_codes_are_never_chosen(metric):
    x, codes = material("random", 70, 70, 5, torch.float32)
    x[3, 1], x[40, 4], x[69, 0] = torch.nan, torch.inf, -torch.inf
    codes[0, 0], codes[50, 2] = torch.nan, torch.inf
    found, _ = check(x, codes, metric)
    assert found[[3, 40, 69]].tolist() == [-1, -1, -1]
    assert nearest_codeword_triton(x, torch.full((70, 5), torch.nan), metric).tolist() == [-1] * 70


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1e25, 1e37])
def test_equals_float64_at_scales_beyond_fp16(scale, metric):
    check(torch.randn(20, 7) * scale, torch.randn(40, 7) * scale, metric)
    check(torch.randn(20, 7), torch.randn(40, 7) * scale, metric)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_equals_float64_with_one_code_far_beyond_the_sample(metric):
    """The scale comes from a sample of the codes, and this one is not in it."""
    x, codes = material("random", 20, 600, 5, torch.float32)
    codes[301] *= 1e30
    check(torch.cat([x, codes[301:302]]), codes, metric)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_do_not_matter_to_the_search(layout, metric):
    x, codes = of_layout(layout, 50, 7), of_layout(layout, 40, 7, seed=1)
    found, _ = check(x, codes, metric)
    assert torch.equal(found, nearest_codeword_triton(x.contiguous(), codes.contiguous(), metric))


def test_offsets_beyond_32_bits():
    """Rows 2^30 entries apart: 4 GB of addresses, of which few are touched, and none filled with NaN."""
    far = torch.zeros(0, dtype=torch.float16).new_empty(2**31 + 64).as_strided((3, 8), (2**30, 1))
    far.copy_(torch.randn(3, 8))
    codes = torch.randn(16, 8)
    assert torch.equal(check(far, codes)[0], check(far.clone(), codes)[0])
    assert torch.equal(check(codes, far)[0], check(codes, far.clone())[0])
    for x in (far, far.clone()):
        counts, sums = code_sums_triton(x, torch.tensor([1, 0, 1]), 2)
        assert counts.tolist() == [1, 2]
        torch.testing.assert_close(sums[0], far[1].float())


def test_numbers_below_fp16s_normal_range():
    """Tensor cores align subnormals as 2^-14: with all codes alike but two, what they cut off is all there is."""
    codes = torch.zeros(512, 1)
    codes[1], codes[3] = (7 + 2.0**-19) * 2.0**-24, (9 - 2.0**-20) * 2.0**-24
    found, _ = check(torch.tensor([[8 * 2.0**-24]]), codes)
    assert found.item() == 1


@pytest.mark.parametrize(("scale", "count"), [(1.0, 512), (2.0**-66, 16)])
@pytest.mark.parametrize(("block", "other"), [(8, 7.0), (16, 22.0)])
def test_products_of_numbers_below_fp16s_normal_range_and_large_ones(block, other, scale, count):
    """A subnormal number is aligned as 2^-14 beside a large factor too; blocks of 8 and of 16 as on A100 and H100."""
    x, codes = torch.zeros(1, 32), torch.zeros(count, 32)
    x[0, 0], x[0, 1:block], x[0, 16] = 2.0**15, 1.99609375, other
    codes[1, :block], codes[3, 0], codes[3, 16] = 2.0**-24, 2.0**-24, 2.0**-24
    codes[5], codes[7] = -codes[1], -codes[3]
    found, _ = check(x * scale, codes * scale)
    assert found.item() == 1


@pytest.mark.parametrize("precision", ["fp16", "tf32"])
def test_rounded_precision_is_close_to_the_best(precision, monkeypatch):
    if precision == "fp16":  # numpy's products of equal columns differ by their place, those of a device do not
        monkeypatch.setattr(InterpreterBuilder, "create_dot", InterpreterBuilder.create_dot)  # put back afterwards
        tensor_cores.install("H100")
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


def test_each_look_decides_most_of_its_rows():
    """Right answers alone would not show that the scores of the tensor cores were ever trusted."""
    x, codes = material("random", 512, 256, 64, torch.float32)
    _, (close, still_open) = check(x, codes)
    assert 0 < close < 100  # a few percent
    assert still_open <= 4
    _, left_open = check(x[:64], codes[torch.arange(256) % 127])  # every winner is a tie of two
    assert left_open[0] >= 56
    _, left_open = check(x[:64], codes[torch.arange(256) % 85])  # of three or four
    assert left_open[0] >= 50


@pytest.mark.parametrize("place", [0, 3, 301])
@pytest.mark.parametrize("times", [100, 1e3, 1e8, 1e30])
def test_a_far_code_does_not_leave_the_others_open(times, place):
    """In the sample that sets the scale (places 0 and 3 are in it; every second code is) or not."""
    x, codes = material("random", 256, 600, 64, torch.float32)
    codes[place] *= times
    tokens = torch.cat([x, codes[place : place + 1], 0.6 * codes[place : place + 1], 0.4 * codes[place : place + 1]])
    _, (close, still_open) = check(tokens, codes)
    assert close < 60
    assert still_open <= 16


@pytest.mark.parametrize("d", [1, 5, 16, 33])
def test_first_look_certifies_narrow_tokens(d):
    """Lengths are summed in pieces of 32: what stands beyond a narrow centre must not be in them."""
    _, left_open = check(torch.randn(128, d), torch.randn(3, d))
    assert sum(left_open) < 16


def test_first_look_certifies_tokens_with_a_large_common_mean():
    _, left_open = check(*material("far mean", 256, 128, 64, torch.float32))
    assert sum(left_open) < 64


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("n", "k", "d"), [(0, 3, 4), (1, 1, 1), (200, 7, 5), (70, 40, 130)])
def test_code_sums_equal_the_loop_over_tokens(n, k, d, dtype, deterministic):
    x, indices = torch.randn(n, d).to(dtype), torch.randint(-1, k, (n,))
    x[indices < 0] = torch.nan
    check_code_sums(x, indices, k, deterministic)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_do_not_matter_to_code_sums(layout, deterministic):
    check_code_sums(of_layout(layout, 50, 7), (torch.arange(100) % 7)[::2], 7, deterministic)


@pytest.mark.parametrize("deterministic", [False, True])
def test_code_sums_keep_their_bound(deterministic):
    """Added up in float32 alone, these tokens are off by more than 2^-18."""
    x = torch.full((20_000, 1), 0.1)
    _, sums = run_code_sums(x, torch.zeros(20_000, dtype=torch.int64), 1, deterministic)
    exact = len(x) * x[0].double()
    assert ((sums[0] - exact).abs() <= 2**-22 * exact).all()


def run_code_sums(x, indices, size, deterministic):
    """Run the kernels with or without deterministic algorithms."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(deterministic)
    try:
        return code_sums_triton(x, indices, size)
    finally:
        torch.use_deterministic_algorithms(before)


def check_code_sums(x, indices, size, deterministic):
    """Assert that the kernels agree with the loop over tokens."""
    expected_counts, expected_sums = code_sums_by_loop(x, indices, size)
    counts, sums = run_code_sums(x, indices, size, deterministic)
    assert counts.dtype == sums.dtype == torch.float32
    assert counts.tolist() == expected_counts
    torch.testing.assert_close(sums.double(), expected_sums, rtol=1e-5, atol=1e-4)


# ---- the update of a codebook ----


def codebook(k, d, seed=0):
    """Return the buffers of a codebook in training: codes, counts, sums, generator, number of updates, births."""
    generator = torch.Generator().manual_seed(seed)
    embed = torch.randn(k, d, generator=generator)
    size = 4 * torch.rand(k, generator=generator) ** 2
    rng, births = torch.tensor([-5 - seed, 7]), torch.arange(k)
    return [embed, size, embed * size[:, None], rng, torch.tensor(11), births]


def check_update(
    buffers, x, indices, counts, sums, threshold, total=None, start=None, eps=1e-5, zero_keeps_place=False
):
    """Assert that the kernels take the step that the operators take in PyTorch; return how many codes were born."""
    arguments = (*buffers[:3], counts, sums, buffers[3], x, indices, total, start, 0.9, eps, threshold)
    found, expected = next_state_triton(*arguments), fused_update.next_state(*arguments)
    for name, a, b in zip(found._fields, found, expected, strict=True):
        assert a.shape == b.shape, name
        if name in ("positions", "candidates", "counts"):
            assert torch.equal(a, b), name
        else:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name, equal_nan=True)
    after = [[tensor.clone() for tensor in buffers] for _ in range(2)]
    state = (found.embed, found.cluster_size, found.embed_avg, found.counts, found.positions, found.candidates)
    write_state_triton(*after[0], *state, zero_keeps_place)
    fused_update.write_state_(*after[1], *state, zero_keeps_place)
    for a, b in zip(*after, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5 if a.is_floating_point() else 0, atol=1e-6)
    return int((after[0][5] - buffers[5]).sum())


def sums_of(x, indices, k):
    counts, sums = code_sums_by_loop(x, indices, k)
    return torch.tensor(counts).float(), sums.float()


@pytest.mark.parametrize("threshold", [None, 0.0, 0.1, 1.0])
@pytest.mark.parametrize(("n", "k", "d"), [(0, 5, 3), (1, 1, 1), (7, 40, 5), (70, 40, 130), (300, 150, 16)])
def test_codebook_update_equals_the_steps_in_pytorch(n, k, d, threshold):
    x, indices = torch.randn(n, d), torch.randint(-1, k, (n,))
    born = check_update(codebook(k, d), x, indices, *sums_of(x, indices, k), threshold)
    assert born == 0 if not threshold or n == 0 or k == 1 else born > 0


def test_codebook_update_with_more_codes_than_one_block_of_sums():
    x, indices = torch.randn(60, 3), torch.randint(-1, 1100, (60,))
    assert check_update(codebook(1100, 3), x, indices, *sums_of(x, indices, 1100), 0.1) > 20


def test_codebook_update_of_a_rank_that_has_some_of_the_tokens():
    x, indices = torch.randn(20, 4), torch.randint(-1, 30, (20,))
    counts, sums = sums_of(x, indices, 30)
    total, start = (indices >= 0).sum() + 35, torch.tensor(15)
    check_update(codebook(30, 4), x, indices, counts * 2, sums * 2, 0.9, total, start)


def test_codebook_update_refuses_repeats_and_skips_tokens_that_do_not_count():
    buffers = codebook(30, 4)
    x = torch.randn(3, 4).repeat(10, 1)
    buffers[0][3], buffers[1][3], buffers[2][3] = x[0], 3.0, 3.0 * x[0]
    x[4] = torch.nan
    indices = torch.arange(30) % 5 * 6
    indices[4] = -1
    assert 0 < check_update(buffers, x, indices, *sums_of(x, indices, 30), 1.0) <= 3


def test_codebook_update_leaves_out_what_is_not_finite():
    buffers = codebook(20, 4)
    x, indices = torch.randn(50, 4), torch.randint(0, 20, (50,))
    counts, sums = sums_of(x, indices, 20)
    sums[3, 1], sums[7, 0], sums[11, 2] = torch.inf, torch.nan, 3.4e38
    buffers[2][11, 2] = 3.4e38
    check_update(buffers, x, indices, counts, sums, 0.5)
    check_update(buffers, x, indices, counts, torch.full_like(sums, torch.nan), 0.5)


def test_codebook_update_keeps_unused_codes_without_smoothing_and_codes_without_a_form():
    buffers = codebook(20, 4)
    buffers[1][2] = 0.0
    buffers[4].fill_(-1)
    x, indices = torch.zeros(50, 4), torch.randint(3, 20, (50,))
    for zero_keeps_place in (False, True):
        check_update(buffers, x, indices, *sums_of(x, indices, 20), 0.9, eps=0.0, zero_keeps_place=zero_keeps_place)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_do_not_matter_to_the_codebook_update(layout):
    x, indices = of_layout(layout, 50, 7), (torch.arange(100) % 20)[::2]
    assert check_update(codebook(20, 7), x, indices, *sums_of(x, indices, 20), 0.5) > 0
