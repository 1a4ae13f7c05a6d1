"""nearest_codeword against brute force in float64, written here without a line of the kernel's."""

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from vqssl import kernels
from vqssl.functional import nearest_codeword
from vqssl.kernels import nearest

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
nan, inf = float("nan"), float("inf")


def brute_scores(x, codes, metric):
    """`(N, K)` float64, higher is nearer; a code that may not be chosen has -inf."""
    x, codes = x.double(), codes.double()
    usable = torch.isfinite(codes).all(-1)
    columns = []
    for code in codes:
        if metric == "euclidean":
            columns.append(-((x - code) ** 2).sum(-1))
        else:
            length = math.sqrt(float((code * code).sum()))
            columns.append((x * (code / length if length > 0 else code)).sum(-1))
    scores = torch.stack(columns, 1)
    return torch.where(usable, scores, -inf)


def brute(x, codes, metric="euclidean"):
    """The lowest index of the best score, -1 without one."""
    scores = brute_scores(x, codes, metric)
    found = []
    for row, scored in zip(x, scores, strict=True):
        if not torch.isfinite(row).all() or not torch.isfinite(codes).all(-1).any():
            found.append(-1)
            continue
        best = max(scored.tolist())
        found.append(scored.tolist().index(best))
    return torch.tensor(found, dtype=torch.int64)


def check(x, codes, metric="euclidean"):
    """The op, the reference and brute force agree to the index."""
    found = kernels.nearest_codeword(x, codes, metric)
    assert found.dtype == torch.int64
    assert found.shape == x.shape[:1]
    expected = brute(x, codes, metric)
    reference = torch.cat([kernels.nearest_reference(part, codes, metric) for part in x.split(64)])
    # Two float64 sums in another order may differ in the last bit: only such a tie excuses another answer.
    for answer in (found, reference):
        differs = (answer != expected).nonzero().flatten()
        if len(differs):
            scores = brute_scores(x[differs], codes, metric)
            a = scores.gather(1, answer[differs, None])
            b = scores.gather(1, expected[differs, None])
            size = (
                x[differs].double().square().sum(-1, keepdim=True) + codes.double().nan_to_num(0, 0, 0).square().max()
            )
            assert ((b - a).abs() <= 1e-15 * size).all(), (differs, answer[differs], expected[differs])
    assert torch.equal(found, reference)
    return found


def material(kind, n, k, d, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, codes = (torch.randn(rows, d, generator=generator, dtype=torch.float64) for rows in (n, k))
    if kind == "clustered":  # all scores are close to each other
        centre = torch.randn(1, d, generator=generator, dtype=torch.float64)
        x, codes = 1e-3 * x + centre, 1e-3 * codes + centre
    elif kind == "duplicated":
        codes = codes[torch.randint(max(1, k // 3), (k,), generator=generator)]
    elif kind == "far mean":
        x, codes = x + 300, codes + 300
    elif kind == "tiny":
        x, codes = x * 1e-6, codes * 1e-6
    elif kind == "huge":
        x, codes = x * 3e3, codes * 3e3
    elif kind == "on the codes" and n:
        x = codes[torch.arange(n) % k].clone()
    elif kind == "equal rows":
        x, codes = x[:1].expand(n, d), codes[:1].expand(k, d)
    elif kind == "grid":  # midway between codes: exact ties
        x, codes = (x * 2).round(), (codes * 2).round()
    return x.to(dtype), codes.to(dtype)


KINDS = ["random", "clustered", "duplicated", "far mean", "tiny", "huge", "on the codes", "equal rows", "grid"]


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_material(kind, dtype, metric):
    for n, k, d in [(63, 65, 60), (257, 64, 3)]:
        found = check(*material(kind, n, k, d, dtype), metric)
        assert found.min() >= 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("n", [0, 1, 63, 257])
@pytest.mark.parametrize("k", [1, 64, 65, 1000])
@pytest.mark.parametrize("d", [1, 60, 129])
def test_odd_sizes(n, k, d, dtype):
    x, codes = material("random", n, k, d, dtype)
    if k == 1000:  # brute force in Python is slow
        x = x[:63]
    check(x, codes)


@given(
    st.integers(0, 70),
    st.integers(1, 70),
    st.integers(1, 9),
    st.sampled_from(DTYPES),
    st.sampled_from(DTYPES),
    st.sampled_from(["euclidean", "cosine"]),
    st.sampled_from(KINDS),
    st.integers(-6, 6),
    st.integers(0, 2**20),
)
@example(3, 70, 2, torch.float32, torch.float32, "cosine", "grid", 0, 0)
def test_any_size_dtype_and_scale(n, k, d, dtype, code_dtype, metric, kind, exponent, seed):
    x, codes = material(kind, n, k, d, torch.float64, seed)
    check((x * 2.0**exponent).to(dtype), codes.to(code_dtype), metric)


@given(st.integers(1, 40), st.integers(1, 70), st.floats(0, 1), st.sampled_from(["euclidean", "cosine"]), st.data())
def test_junk_in_tokens_and_codes(n, k, share, metric, data):
    seed = data.draw(st.integers(0, 2**20))
    generator = torch.Generator().manual_seed(seed)
    x, codes = material("random", n, k, 4, torch.float32, seed)
    bad_rows, bad_codes = torch.rand(n, generator=generator) < 0.3, torch.rand(k, generator=generator) < share
    x[bad_rows, 1] = data.draw(st.sampled_from([nan, inf, -inf]))
    codes[bad_codes, 2] = data.draw(st.sampled_from([nan, inf, -inf]))
    found = check(x, codes, metric)
    assert (found[bad_rows] == -1).all()
    rest = found[~bad_rows]
    if bad_codes.all():
        assert (rest == -1).all()
    else:
        assert not bad_codes[rest].any()


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("bad", [nan, inf, -inf])
def test_no_code_left(metric, bad):
    codes = torch.full((70, 3), bad)
    assert kernels.nearest_codeword(torch.randn(5, 3), codes, metric).tolist() == [-1] * 5
    codes[66] = 1.0
    assert kernels.nearest_codeword(torch.randn(5, 3), codes, metric).tolist() == [66] * 5


@pytest.mark.parametrize("dtype", DTYPES)
def test_lowest_index_wins_among_equals(dtype):
    codes = torch.randn(3, 5).to(dtype)[torch.tensor([2, 1, 0] + [0, 1, 2] * 40)]
    x = torch.cat([codes, torch.randn(500, 5).to(dtype)])
    assert set(kernels.nearest_codeword(x, codes, "euclidean").tolist()) == {0, 1, 2}
    assert set(kernels.nearest_codeword(x, codes, "cosine").tolist()) == {0, 1, 2}


def test_zeros():
    codes = torch.randn(70, 3)
    # Nothing is nearer to a zero than the rest, by angle.
    assert kernels.nearest_codeword(torch.zeros(4, 3), codes, "cosine").tolist() == [0] * 4
    codes[40] = 0.0
    assert kernels.nearest_codeword(torch.zeros(4, 3), codes, "euclidean").tolist() == [40] * 4
    # A zero code has similarity 0: below every positive one, above every negative one.
    line = torch.tensor([[-1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [-2.0, 0.0, 0.0]])
    assert kernels.nearest_codeword(torch.tensor([[1.0, 0, 0], [-1.0, 0, 0]]), line, "cosine").tolist() == [1, 0]


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-25, 1e18, 1e25, 1e37])
def test_scales_at_which_float32_squares_are_lost(scale, metric):
    x, codes = (torch.randn(rows, 7) * scale for rows in (63, 65))
    assert torch.isfinite(x).all()
    check(x, codes, metric)


def test_scales_mixed_in_one_batch():
    x = torch.randn(80, 5) * 10.0 ** torch.linspace(-30, 30, 80)[:, None]
    codes = torch.randn(70, 5) * 10.0 ** torch.linspace(-30, 30, 70)[:, None]
    check(x, codes)
    check(x, codes, "cosine")


def test_differences_below_float32():
    """Two codes that only float64 tells apart, and tokens between them: the first look cannot decide."""
    codes = torch.tensor([[1.0, 1.0], [1.0 + 2.0**-23, 1.0]])
    x = torch.tensor([[1.0, 1.0], [1.0 + 2.0**-23, 1.0], [50.0, 1.0], [-50.0, 1.0]])
    assert kernels.nearest_codeword(x, codes, "euclidean").tolist() == [0, 1, 1, 0]
    codes = torch.tensor([[1.0, 1.0], [1.0 + 2.0**-50, 1.0]], dtype=torch.float64)
    x = torch.tensor([[-9.0, 0.0], [9.0, 0.0]], dtype=torch.float64)
    # Here float64 itself rounds: the reference's answer is the rule.
    assert torch.equal(kernels.nearest_codeword(x, codes, "euclidean"), kernels.nearest_reference(x, codes))


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("layout", ["transposed", "strided", "reversed slice", "expanded", "offset"])
def test_strides_do_not_matter(layout, metric):
    base = torch.randn(140, 140)
    x, codes = {
        "transposed": (base[:6, :90].T, base[6:12, :70].T),
        "strided": (base[::2, ::20], base[1::2, 1::20]),
        "reversed slice": (base[:60, 3:10].flip(0), base[60:, 20:27].flip(1)),
        "expanded": (base[:50, :1].expand(50, 7), base[:1, :7].expand(70, 7)),
        "offset": (base.flatten()[5:705].view(100, 7), base.flatten()[900:1400].as_strided((70, 7), (3, 2))),
    }[layout]
    expected = kernels.nearest_codeword(x.contiguous(), codes.contiguous(), metric)
    assert torch.equal(kernels.nearest_codeword(x, codes, metric), expected)
    check(x, codes, metric)


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


def test_error_bound_covers_the_precision_that_was_set(monkeypatch):
    """This machine's products may not round as they are allowed to; so round their inputs to bfloat16 here."""
    x, codes = material("random", 1000, 1000, 3, torch.float32)  # so many codes in so little room are close
    expected = kernels.nearest_reference(x, codes)
    product, calls = torch.mm, []

    def rough(a, b, *, out):
        calls.append(1)
        return product(a.bfloat16().to(a.dtype), b.bfloat16().to(b.dtype), out=out)

    monkeypatch.setattr(torch, "mm", rough)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert torch.equal(kernels.nearest_codeword(x, codes, "euclidean"), expected)
    finally:
        torch.set_float32_matmul_precision(before)
    assert calls, "the search no longer goes through torch.mm: this test checks nothing"
    # And the rounding does decide: without the wider bound some answers are wrong.
    assert not torch.equal(kernels.nearest_codeword(x, codes, "euclidean"), expected)


def largest_allocation(function, *arguments):
    """Bytes, of any one operator, also of those inside a custom operator."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function(*arguments)
    return max(event.self_cpu_memory_usage for event in profile.events())


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("kind", ["random", "equal rows"])
def test_never_holds_tokens_by_codes(kind, metric):
    n, k = 20_000, 512
    x, codes = material(kind, n, k, 8, torch.float32)
    largest = largest_allocation(kernels.nearest_codeword, x, codes, metric)
    assert largest > 0, "the profiler saw no allocation"
    # As much as a matrix of bytes would be already too much. With all rows equal every one takes the second look.
    assert largest < n * k * 4 / 2
    assert largest_allocation(torch.cdist, x, codes) >= n * k * 4  # the gauge sees such a matrix where there is one


def test_passes_no_gradient():
    x, codes = torch.randn(6, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    found = nearest_codeword(x, codes)
    assert not found.requires_grad
    assert found.grad_fn is None


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("n", [0, 5])
def test_is_a_proper_operator(metric, dtype, n):
    x, codes = torch.randn(n, 3).to(dtype), torch.randn(7, 3).to(dtype)
    torch.library.opcheck(torch.ops.vqssl.nearest_codeword.default, (x, codes, metric))
    torch.library.opcheck(torch.ops.vqssl.nearest_codeword.default, (x.T.contiguous().T, codes, metric))


def test_does_not_write_to_its_input():
    x, codes = torch.randn(300, 5), torch.randn(70, 5)
    before = x.clone(), codes.clone()
    kernels.nearest_codeword(x, codes, "euclidean")
    assert torch.equal(x, before[0])
    assert torch.equal(codes, before[1])


# ---- the public face ----


@given(st.lists(st.integers(0, 4), max_size=3))
def test_any_leading_shape(shape):
    x, codes = torch.randn(*shape, 3), torch.randn(5, 3)
    found = nearest_codeword(x, codes)
    assert found.shape == tuple(shape)
    assert torch.equal(found.reshape(-1), brute(x.reshape(-1, 3), codes))


@pytest.mark.parametrize(
    ("x", "codes", "metric", "error", "message"),
    [
        (torch.randn(2, 3), torch.randn(4, 5), "euclidean", ValueError, r"one width D .* and \(4, 5\)"),
        (torch.tensor(1.0), torch.randn(4, 5), "euclidean", ValueError, r"one width D .* and \(4, 5\)"),
        (torch.randn(2, 3), torch.randn(3), "euclidean", ValueError, r"codebook must be \(K, D\)"),
        (torch.randn(2, 3), torch.randn(0, 3), "euclidean", ValueError, "at least one code"),
        (torch.randn(2, 0), torch.randn(3, 0), "euclidean", ValueError, "at least one entry"),
        (torch.randn(2, 3), torch.randn(4, 3), "dot", ValueError, "metric must be one of 'euclidean', 'cosine'"),
        (torch.ones(2, 3).long(), torch.randn(4, 3), "euclidean", TypeError, "x must have a floating dtype"),
        (torch.ones(2, 3), torch.ones(4, 3).long(), "euclidean", TypeError, "codebook must have a floating dtype"),
        (torch.ones(2, 3), torch.ones(4, 3, device="meta"), "euclidean", ValueError, "on one device"),
        ([[1.0]], torch.ones(4, 1), "euclidean", TypeError, "must be a torch.Tensor"),
    ],
)
def test_refusals(x, codes, metric, error, message):
    with pytest.raises(error, match=message):
        nearest_codeword(x, codes, metric)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("kind", ["random", "far mean", "duplicated", "on the codes"])
def test_codes_in_several_blocks(kind, metric, monkeypatch):
    """Codebooks beyond the size that is scored at once, and last blocks that are not full."""
    n, k, d = 500, 5000, 7
    x, codes = material(kind, n, k, d, torch.float32)
    codes = codes.flip(0)  # tokens that lie on codes lie on the last ones
    expected = torch.cat([kernels.nearest_reference(part, codes, metric) for part in x.split(50)])
    found = kernels.nearest_codeword(x, codes, metric)
    assert torch.equal(found, expected)
    assert found.max() > 4096, "the last block was never chosen"
    monkeypatch.setattr(nearest, "_MAX_CODES", 64)
    assert torch.equal(kernels.nearest_codeword(x, codes, metric), expected)


def test_the_certificate_decides_most_rows(monkeypatch):
    """Otherwise the search would be right but slow."""
    x, codes = material("random", 2000, 1000, 64, torch.float32)
    looks, second_look = [], nearest._second_look

    def count(rows, *arguments):
        looks.append(len(rows))
        return second_look(rows, *arguments)

    monkeypatch.setattr(nearest, "_second_look", count)
    kernels.nearest_codeword(x, codes, "euclidean")
    assert sum(looks) < 40
    looks.clear()
    kernels.nearest_codeword(x, codes[torch.arange(2000) % 1000], "euclidean")  # every winner is a tie
    assert sum(looks) == 2000
