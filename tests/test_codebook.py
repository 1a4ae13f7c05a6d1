"""EMACodebook: the laws, one EMA step against loops and against vector-quantize-pytorch, and its refusals."""

import copy
import math
import pickle

import pytest
import torch
import vector_quantize_pytorch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import functional_call

from tests.laws import (
    DtypeLaws,
    GraphLaws,
    MaskLaws,
    Material,
    QuantizerLaws,
    StateLaws,
    ValueLaws,
    assert_differs,
    assert_same_bits,
    correlation,
    state_of,
)
from vqssl import BatchRevival, EMACodebook, KMeansInit
from vqssl import codebook as codebook_module


class CodebookMaterial(Material):
    def make(self, **options):
        options = {"decay": 0.7, **self.options, **options}
        return EMACodebook(codebook_size=self.codebook_size, dim=self.dim, **options)


class TestEuclidean(CodebookMaterial, QuantizerLaws):
    pass


class CosineMaterial(CodebookMaterial):
    options = {"metric": "cosine"}  # noqa: RUF012

    def projected(self, module, tokens):
        return [z / z.norm(dim=-1, keepdim=True) for z in tokens]


class TestCosine(CosineMaterial, ValueLaws, StateLaws, MaskLaws, DtypeLaws):
    def test_length_of_tokens_does_not_matter(self):
        module = self.trained().eval()
        x = self.batch(7)
        # Powers of two, so that nothing is rounded.
        found, expected = module(x * torch.tensor([0.25, 64.0, 2.0**40])[:, None, None, None]), module(x)
        for quantized, indices in zip(found.quantized, found.indices, strict=True):
            assert_same_bits(indices, expected.indices)
            assert_same_bits(quantized, expected.quantized)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_zero_and_very_long_tokens_have_a_code_and_a_finite_gradient(self, dtype):
        module = self.trained()
        x = torch.zeros(3, self.dim, dtype=dtype)
        x[1], x[2] = 60000.0, 1.0  # the length of x[1] is beyond float16
        x.requires_grad_()
        out = module(x)
        assert out.indices[0] >= 0
        assert out.indices[1] == out.indices[2]
        (out.quantized.float().sum() + out.commitment_loss).backward()
        assert x.grad.isfinite().all()
        assert x.grad.abs().max() < 10
        assert torch.isfinite(module.embed).all()

    def test_codes_have_length_one(self):
        norms = self.trained(6).embed.norm(dim=-1)
        torch.testing.assert_close(norms, torch.ones_like(norms), rtol=1e-6, atol=0)


class TestMetricGivenAsFunction(CodebookMaterial, ValueLaws, StateLaws, MaskLaws, DtypeLaws):
    """With k-means, so that each part that compares tokens and codes calls the function."""

    options = {"metric": correlation, "initialization": KMeansInit(iterations=2)}  # noqa: RUF012

    def projected(self, module, tokens):
        centred = [z - z.mean(-1, keepdim=True) for z in tokens]
        return [z / z.norm(dim=-1, keepdim=True) for z in centred]

    def test_offset_and_length_of_tokens_do_not_matter(self):
        module = self.trained().eval()
        x = self.batch(7).double()
        # Not bit for bit: the offset rounds the tokens.
        torch.testing.assert_close(module(0.5 * x + 3).quantized, module(x).quantized)
        assert torch.equal(module(0.5 * x + 3).indices, module(x).indices)

    def test_codes_are_in_the_compared_form(self):
        codes = self.trained(6).embed
        torch.testing.assert_close(correlation(codes), codes, rtol=0, atol=1e-6)


class TestBatchMean(CodebookMaterial, StateLaws, MaskLaws):
    """Eq. 1 of the paper."""

    options = {"ema": "batch_mean"}  # noqa: RUF012


class TestKMeans(CodebookMaterial, StateLaws, MaskLaws):
    options = {"initialization": KMeansInit(iterations=4)}  # noqa: RUF012


class RotationMaterial(CodebookMaterial):
    options = {"estimator": "rotation"}  # noqa: RUF012

    def expected_gradient(self, tokens, codes, cotangent):
        """Return the gradient by the matrix itself, one token at a time, in float64."""
        found = torch.empty_like(tokens, dtype=torch.float64)
        rows = zip(
            tokens.reshape(-1, self.dim).double(),
            codes.reshape(-1, self.dim).double(),
            cotangent.reshape(-1, self.dim).double(),
            strict=True,
        )
        for i, (z, q, g) in enumerate(rows):
            unit_z, unit_q = z / z.norm(), q / q.norm()
            r = (unit_z + unit_q) / (unit_z + unit_q).norm()
            rotation = torch.eye(self.dim).double() - 2 * torch.outer(r, r) + 2 * torch.outer(unit_q, unit_z)
            torch.testing.assert_close(rotation @ unit_z, unit_q, rtol=0, atol=1e-12)  # the oracle's own check
            found.view(-1, self.dim)[i] = (q.norm() / z.norm() * rotation).T @ g
        return found.float()


class TestRotation(RotationMaterial, ValueLaws, MaskLaws, DtypeLaws):
    pass


# The graphs that a policy changes. Those of a codebook with the default policies are in TestEuclidean.


# The laws that do not depend on the policy of a variant, for every variant all the same.


@pytest.mark.thorough
class TestOtherLawsOfBatchMean(CodebookMaterial, ValueLaws, DtypeLaws, GraphLaws):
    options = {"ema": "batch_mean"}  # noqa: RUF012


@pytest.mark.thorough
class TestOtherLawsOfKMeans(CodebookMaterial, ValueLaws, DtypeLaws, GraphLaws):
    options = {"initialization": KMeansInit(iterations=4)}  # noqa: RUF012


@pytest.mark.thorough
class TestOtherLawsOfRotation(RotationMaterial, StateLaws):
    pass


@pytest.mark.thorough
class TestGraphsOfCosine(CosineMaterial, GraphLaws):
    pass


@pytest.mark.thorough
class TestGraphsOfRotation(RotationMaterial, GraphLaws):
    pass


@pytest.mark.thorough
class TestGraphsOfPoliciesGivenAsFunctions(CodebookMaterial, GraphLaws):
    options = {"metric": correlation, "ema": "batch_mean"}  # noqa: RUF012


# ---- one step against a loop ----


def slow_step(codebook, x, mask=None):
    """Return embed, cluster_size and embed_avg after one training step without revival, by Python floats."""
    codes = codebook.embed.double().tolist()
    sizes = codebook.cluster_size.double().tolist()
    sums = codebook.embed_avg.double().tolist()
    rows = x.reshape(-1, codebook.dim).double().tolist()
    keep = [True] * len(rows) if mask is None else mask.reshape(-1).tolist()
    d, eps, size, dim = codebook.decay, codebook.eps, codebook.codebook_size, codebook.dim
    n, total = [0] * size, [[0.0] * dim for _ in range(size)]
    for row, kept in zip(rows, keep, strict=True):
        if not kept:
            continue
        if codebook.metric == "cosine":
            length = math.hypot(*row)
            row = [v / length for v in row]
        k = min(range(size), key=lambda j: sum((a - b) ** 2 for a, b in zip(row, codes[j], strict=True)))
        n[k] += 1
        total[k] = [a + b for a, b in zip(total[k], row, strict=True)]
    new_sizes = [d * s + (1 - d) * c for s, c in zip(sizes, n, strict=True)]
    if codebook.ema.__name__ == "batch_mean_ema":
        new = [
            [d * e + (1 - d) * t / n[k] for e, t in zip(codes[k], total[k], strict=True)] if n[k] else codes[k]
            for k in range(size)
        ]
        new_sums = [[e * new_sizes[k] for e in new[k]] for k in range(size)]
    else:
        new_sums = [[d * m + (1 - d) * t for m, t in zip(sums[k], total[k], strict=True)] for k in range(size)]
        every = sum(new_sizes)
        weight = [(s + eps) / (every + size * eps) * every for s in new_sizes]
        new = [[m / weight[k] for m in new_sums[k]] for k in range(size)]
    if codebook.metric == "cosine":
        new = [[e / math.hypot(*row) for e in row] for row in new]
    return [torch.tensor(v, dtype=torch.float64) for v in (new, new_sizes, new_sums)]


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("ema", ["count_weighted", "batch_mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_step_equals_the_loop(metric, ema, dtype):
    codebook = EMACodebook(
        codebook_size=7, dim=3, decay=0.8, eps=1e-3, metric=metric, ema=ema, revival=None, dtype=dtype
    )
    codebook.set_codes_(torch.randn(7, 3, dtype=dtype))
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-6}
    for step in range(4):
        x = torch.randn(2, 11, 3, dtype=dtype) + 0.3 * step
        mask = torch.rand(2, 11) < 0.7 if step % 2 else None
        expected = slow_step(codebook, x, mask)
        codebook(x, mask)
        for name, value in zip(("embed", "cluster_size", "embed_avg"), expected, strict=True):
            torch.testing.assert_close(getattr(codebook, name).double(), value, **tolerance)


@given(st.integers(1, 9), st.integers(1, 5), st.integers(0, 30), st.floats(0, 1), st.integers(0, 2**20))
def test_step_equals_the_loop_for_any_size(size, dim, tokens, decay, seed):
    generator = torch.Generator().manual_seed(seed)
    codebook = EMACodebook(codebook_size=size, dim=dim, decay=decay, eps=1e-4, revival=None, dtype=torch.float64)
    codebook.set_codes_(torch.randn(size, dim, generator=generator, dtype=torch.float64))
    # Quarters: ties between codes and equal tokens occur.
    x = torch.randint(-8, 8, (tokens, dim), generator=generator).double() / 4
    expected = slow_step(codebook, x) if tokens else [codebook.embed, codebook.cluster_size, codebook.embed_avg]
    expected = [value.clone() for value in expected]
    codebook(x)
    for name, value in zip(("embed", "cluster_size", "embed_avg"), expected, strict=True):
        torch.testing.assert_close(getattr(codebook, name), value, rtol=1e-10, atol=1e-10)


def test_batch_mean_moves_codes_elsewhere_and_counts_alike():
    a, b = (
        EMACodebook(codebook_size=4, dim=2, ema=ema, revival=None, decay=0.5)
        for ema in ("count_weighted", "batch_mean")
    )
    x = torch.randn(40, 2)
    a(x)
    b(x)
    assert not torch.allclose(a.embed, b.embed)
    assert torch.equal(a.cluster_size, b.cluster_size)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_training_equals_vector_quantize_pytorch(metric):
    ours = EMACodebook(codebook_size=16, dim=8, decay=0.8, eps=1e-5, metric=metric, commitment_weight=0.6, revival=None)
    theirs = vector_quantize_pytorch.VectorQuantize(
        dim=8,
        codebook_size=16,
        decay=0.8,
        eps=1e-5,
        use_cosine_sim=metric == "cosine",
        rotation_trick=False,
        threshold_ema_dead_code=0,
        commitment_weight=0.6,
    )
    state = theirs._codebook
    ours.set_codes_(torch.randn(16, 8))
    for name in ("embed", "embed_avg", "cluster_size"):
        getattr(state, name).data.copy_(getattr(ours, name)[None])
    for step in range(12):
        x = torch.randn(3, 20, 8) + 0.1 * step
        if metric == "cosine":
            # Theirs measures commitment from the token as given, ours from the token at length 1.
            x = torch.nn.functional.normalize(x, dim=-1)
        mask = torch.rand(3, 20) < 0.8 if step % 3 == 2 else None
        training = step % 4 != 3
        ours.train(training)
        theirs.train(training)
        x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
        found, expected = ours(x1, mask), theirs(x2, mask=mask)
        kept = torch.ones(3, 20, dtype=torch.bool) if mask is None else mask
        assert torch.equal(found.indices[kept], expected[1][kept])
        torch.testing.assert_close(found.quantized[kept], expected[0][kept], rtol=1e-6, atol=1e-6)
        if training:  # theirs has no commitment loss in eval mode
            torch.testing.assert_close(found.commitment_loss, expected[2].squeeze(), rtol=1e-6, atol=1e-6)
            (found.quantized[kept].square().sum() + found.commitment_loss).backward()
            (expected[0][kept].square().sum() + expected[2].sum()).backward()
            wanted = x2.grad
            if metric == "cosine":  # its gradient skips the normalisation; ours passes through it
                wanted = wanted - (wanted * x).sum(-1, keepdim=True) * x
            torch.testing.assert_close(x1.grad, wanted, rtol=1e-5, atol=1e-5)
        for name in ("embed", "embed_avg", "cluster_size"):
            torch.testing.assert_close(getattr(ours, name), getattr(state, name).data[0], rtol=1e-6, atol=1e-6)
    assert not torch.equal(ours.cluster_size, torch.ones(16))


# ---- parts of a step ----


def test_initialize_quantize_and_update_equal_forward():
    whole = EMACodebook(codebook_size=8, dim=4, decay=0.7)
    halves = copy.deepcopy(whole).eval()
    for step in range(5):
        x = torch.randn(6, 10, 4) + step
        mask = torch.rand(6, 10) < 0.7
        expected = whole(x, mask)
        halves.initialize_(x, mask)
        out = halves.quantize(x, mask)
        before = state_of(halves)
        assert_same_bits(halves.quantize(x, mask), out)
        assert_same_bits(state_of(halves), before)
        halves.update_(x, out.indices)
        assert_same_bits(out, expected)
        assert_same_bits(state_of(halves), state_of(whole))


def test_outputs_use_the_codes_before_the_update():
    codebook = EMACodebook(codebook_size=4, dim=2, decay=0.0)
    codebook.set_codes_(torch.randn(4, 2))
    codes, x = codebook.embed.clone(), torch.randn(50, 2)
    out = codebook(x)
    assert torch.equal(out.quantized, codes[out.indices])
    assert not torch.equal(codebook.embed, codes)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_set_codes_sets_counts_and_sums_to_match(metric):
    codebook = EMACodebook(codebook_size=5, dim=3, metric=metric)
    codes = torch.randn(5, 3)
    codebook.set_codes_(codes)
    expected = codes / codes.norm(dim=-1, keepdim=True) if metric == "cosine" else codes
    torch.testing.assert_close(codebook.embed, expected)
    assert torch.equal(codebook.embed_avg / codebook.cluster_size[:, None], codebook.embed)
    assert codebook.initialized
    before = codebook.embed.clone()
    codebook.initialize_(torch.randn(20, 3))  # set codes count as initialised
    assert torch.equal(codebook.embed, before)


def test_tie_goes_to_lowest_index():
    codebook = EMACodebook(codebook_size=4, dim=2).eval()
    codebook.set_codes_(torch.tensor([[5.0, 5.0], [1.0, 1.0], [1.0, 1.0], [5.0, 5.0]]))
    assert codebook(torch.tensor([[1.0, 0.0], [6.0, 6.0], [3.0, 3.0]])).indices.tolist() == [1, 0, 0]


def test_without_smoothing_and_memory_unused_codes_stay():
    codebook = EMACodebook(codebook_size=3, dim=1, decay=0.0, eps=0.0, revival=None)
    codebook.set_codes_(torch.tensor([[0.0], [10.0], [20.0]]))
    codebook(torch.tensor([[1.0], [3.0]]))
    assert codebook.embed.tolist() == [[2.0], [10.0], [20.0]]
    codebook(torch.tensor([[12.0]]))
    assert codebook.embed.tolist() == [[2.0], [12.0], [20.0]]


def test_sum_that_overflows_does_not_enter_the_state():
    codebook = EMACodebook(codebook_size=2, dim=2, decay=0.5, revival=None)
    codebook.set_codes_(torch.tensor([[0.0, 0.0], [3e38, 3e38]]))
    codebook(torch.tensor([[1.0, 1.0], [3e38, 3e38], [3e38, 3e38]]))
    assert torch.isfinite(codebook.embed).all()
    assert torch.isfinite(codebook.embed_avg).all()
    assert 0.3 < codebook.embed[0, 0] < 0.7  # other codes are updated


@pytest.mark.parametrize("ema", ["count_weighted", "batch_mean"])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_state_stays_finite_for_tokens_near_the_largest_float(metric, ema):
    """A count times such a code, or such a token, overflows."""
    codebook = EMACodebook(
        codebook_size=6, dim=4, decay=0.5, metric=metric, ema=ema, revival=BatchRevival(threshold=1.0)
    )
    for _ in range(8):
        codebook(3.3e38 * (1 - 0.1 * torch.rand(40, 4)) * torch.randn(40, 4).sign())
        for tensor in (codebook.embed, codebook.cluster_size, codebook.embed_avg):
            assert torch.isfinite(tensor).all()
    codebook(torch.randn(40, 4))
    assert torch.isfinite(codebook.quantize(torch.randn(9, 4)).quantized).all()


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_float64_tokens_beyond_float32_do_not_enter_the_state(metric):
    codebook = EMACodebook(codebook_size=4, dim=2, metric=metric, decay=0.5, revival=BatchRevival(threshold=1.0))
    x = torch.randn(3, 2, dtype=torch.float64)
    for step in range(10):
        codebook(torch.cat([x + step, torch.full((5, 2), 1e200, dtype=torch.float64)]))
        for name in ("embed", "cluster_size", "embed_avg"):
            assert torch.isfinite(getattr(codebook, name)).all()


def test_update_ignores_non_finite_tokens_whatever_their_index():
    codebook = EMACodebook(codebook_size=4, dim=2, decay=0.5, revival=BatchRevival(threshold=1.0))
    x = torch.randn(8, 2)
    codebook(x)
    x[::2] = float("nan")
    for _ in range(5):
        codebook.update_(x, torch.arange(8) % 4)
        assert torch.isfinite(codebook.embed).all()


@given(
    st.lists(st.integers(0, 4), max_size=4),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    st.sampled_from(["plain", "transposed", "strided", "expanded"]),
    st.booleans(),
    st.booleans(),
)
def test_shape_dtype_and_strides_do_not_matter(shape, dtype, layout, masked, training):
    codebook = EMACodebook(codebook_size=5, dim=3, decay=0.9).train(training)
    codebook.set_codes_(torch.randn(5, 3))
    flat, strided = copy.deepcopy(codebook), copy.deepcopy(codebook)
    x = torch.randn(*shape, 3).to(dtype)
    if layout == "transposed":
        x = torch.randn(3, *shape).to(dtype).movedim(0, -1)
    elif layout == "strided":
        x = torch.randn(*shape, 6).to(dtype)[..., ::2]
    elif layout == "expanded" and shape:
        x = torch.randn(1, *shape[1:], 3).to(dtype).expand(*shape, 3)
    mask = torch.rand(shape) < 0.5 if masked else None
    found = strided(x, mask)
    expected = flat(x.contiguous().reshape(-1, 3), None if mask is None else mask.reshape(-1))
    assert found.quantized.shape == x.shape
    assert found.indices.shape == x.shape[:-1]
    assert_same_bits(found.quantized.reshape(-1, 3), expected.quantized)
    assert_same_bits(found.indices.reshape(-1), expected.indices)
    torch.testing.assert_close(found.commitment_loss, expected.commitment_loss, rtol=1e-6, atol=0)
    assert_same_bits(state_of(strided), state_of(flat))


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(autocast):
    a = EMACodebook(codebook_size=32, dim=16, decay=0.7)
    b = copy.deepcopy(a)
    for step in range(4):
        x = torch.randn(200, 16) + 10
        with torch.autocast("cpu", dtype=autocast):
            found = a(x)
        assert_same_bits(found, b(x))
        assert_same_bits(state_of(a), state_of(b))
        assert step == 0 or not torch.equal(a.cluster_size, torch.ones(32))


def test_gradient_of_an_encoder_is_finite_behind_masked_infinities():
    for metric in ("euclidean", "cosine"):
        for estimator in ("straight_through", "rotation"):
            codebook = EMACodebook(codebook_size=4, dim=3, metric=metric, estimator=estimator)
            x = torch.randn(6, 3, requires_grad=True)
            scale = torch.ones(6, 1)
            scale[3:] = float("inf")
            mask = torch.arange(6) < 3
            out = codebook(x * scale, mask)
            (out.quantized.sum() + out.commitment_loss).backward()
            assert torch.isfinite(x.grad[:3]).all()
            assert x.grad[:3].abs().sum() > 0


def test_state_dict_has_these_names_and_shapes():
    assert {name: tuple(t.shape) for name, t in EMACodebook(codebook_size=5, dim=3).state_dict().items()} == {
        "embed": (5, 3),
        "cluster_size": (5,),
        "embed_avg": (5, 3),
        "initialized": (),
        "num_updates": (),
        "births": (5,),
        "rng": (2,),
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, None, torch.float64])
def test_state_of_a_half_precision_codebook_is_float32(dtype):
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert EMACodebook(codebook_size=5, dim=3, dtype=dtype).embed.dtype == expected


def test_usage_is_that_of_the_running_counts():
    codebook = EMACodebook(codebook_size=4, dim=2, decay=0.0, revival=None)
    codebook.set_codes_(torch.tensor([[0.0, 0], [10, 0], [20, 0], [30, 0]]))
    codebook(torch.tensor([[0.0, 0], [10, 0], [10, 0], [0, 0]]))
    usage = codebook.usage()
    assert usage.dead.item() == 2
    assert usage.fraction.item() == 0.5
    assert usage.perplexity.item() == pytest.approx(2.0)


def test_lookup_gives_codes_zeros_where_masked_and_the_dtype_of_the_state():
    codebook = EMACodebook(codebook_size=5, dim=3)
    indices = torch.tensor([[0, -1], [4, 4]])
    found = codebook.lookup(indices)
    assert found.shape == (2, 2, 3)
    assert torch.equal(found[0, 1], torch.zeros(3))
    assert torch.equal(found[1, 0], codebook.embed[4])
    assert codebook.lookup(torch.zeros(0, 2, dtype=torch.int32)).shape == (0, 2, 3)
    codebook.double()
    assert codebook.lookup(indices).dtype == torch.float64


# ---- directions ----


@pytest.mark.parametrize(("metric", "nothing"), [("cosine", 0.0), (correlation, 3.0)])
def test_tokens_without_a_direction_do_not_become_first_codes(metric, nothing):
    x = torch.randn(64, 4)
    x[8:] = nothing
    for initialization in (None, KMeansInit()):
        codebook = EMACodebook(codebook_size=8, dim=4, metric=metric, initialization=initialization, revival=None)
        codebook(x)
        assert codebook.initialized
        torch.testing.assert_close(codebook.embed.norm(dim=-1), torch.ones(8), rtol=1e-5, atol=0)
        assert len(codebook.embed.unique(dim=0)) == 8
    waiting = EMACodebook(codebook_size=8, dim=4, metric=metric)
    waiting.initialize_(torch.full((20, 4), nothing))  # as an empty batch
    assert not waiting.initialized


def test_first_code_without_a_direction_keeps_its_place():
    drawn = torch.randn(8, 4)
    drawn[3] = 0

    def draw(pool, codebook_size, rng, metric):
        return drawn

    for metric, kept in (("cosine", True), ("euclidean", False)):
        codebook = EMACodebook(codebook_size=8, dim=4, metric=metric, initialization=draw)
        before = codebook.embed.clone()
        codebook.initialize_(torch.randn(20, 4))
        torch.testing.assert_close(codebook.embed[3], before[3] if kept else drawn[3])
        assert not torch.allclose(codebook.embed[2], before[2])


@pytest.mark.parametrize("metric", ["cosine", correlation])
def test_codes_without_a_direction_are_not_set(metric):
    codebook = EMACodebook(codebook_size=8, dim=4, metric=metric)
    before, codes = state_of(codebook), torch.randn(8, 4)
    codes[5:7] = 0
    with pytest.raises(ValueError, match=r"codes must have a direction in each row.* got 2 of 8 rows"):
        codebook.set_codes_(codes)
    assert_same_bits(state_of(codebook), before)
    EMACodebook(codebook_size=8, dim=4).set_codes_(codes)


# ---- states that others put in place ----


def assert_initialises(codebook):
    """Assert that a codebook with random codes draws its codes from the next batch, as a new one does."""
    expected = EMACodebook(codebook_size=8, dim=4)
    expected.load_state_dict(codebook.state_dict())
    assert not codebook.initialized
    assert codebook.needs_codes
    x = torch.randn(40, 4)
    assert_same_bits(codebook(x), expected(x))
    assert codebook.initialized
    assert_same_bits(state_of(codebook), state_of(expected))


def trained(**options):
    codebook = EMACodebook(codebook_size=8, dim=4, **options)
    codebook(torch.randn(40, 4))
    return codebook


def call_with_trained_state(codebook):
    state = state_of(trained(seed=1))
    functional_call(codebook, state, (torch.randn(40, 4),))
    assert state["num_updates"] == 2
    return codebook


def swap_with_fresh(codebook):
    codebook(torch.randn(40, 4))
    fresh = EMACodebook(codebook_size=8, dim=4, seed=2)
    for name in state_of(codebook):
        torch.utils.swap_tensors(getattr(codebook, name), getattr(fresh, name))
    return codebook


def copy_fresh_in_place(codebook):
    codebook(torch.randn(40, 4))
    for name, value in state_of(EMACodebook(codebook_size=8, dim=4, seed=2)).items():
        getattr(codebook, name).copy_(value)
    return codebook


def empty_and_reset(codebook):
    codebook(torch.randn(40, 4))
    codebook.to_empty(device="cpu").reset_parameters()
    return codebook


def load_fresh(codebook, **how):
    codebook(torch.randn(40, 4))
    codebook.load_state_dict(state_of(EMACodebook(codebook_size=8, dim=4, seed=2)), **how)
    return codebook


WAYS = {
    "functional_call": call_with_trained_state,
    "copy of functional_call": lambda codebook: copy.deepcopy(call_with_trained_state(codebook)),
    "pickle of functional_call": lambda codebook: pickle.loads(pickle.dumps(call_with_trained_state(codebook))),
    "swap_tensors": swap_with_fresh,
    "in place": copy_fresh_in_place,
    "to_empty": empty_and_reset,
    "load_state_dict": load_fresh,
    "assign": lambda codebook: load_fresh(codebook, assign=True),
    "cast": lambda codebook: call_with_trained_state(codebook).double().float(),
}


@pytest.mark.parametrize("way", WAYS)
def test_codebook_left_with_random_codes_initialises(way):
    assert_initialises(WAYS[way](EMACodebook(codebook_size=8, dim=4)))


@pytest.mark.parametrize("way", WAYS)
def test_codebook_left_with_random_codes_initialises_where_reading_would_synchronise(way, monkeypatch):
    """As on a GPU, where only the buffer that is in place tells. What is written into that buffer goes unseen there."""
    monkeypatch.setattr(codebook_module, "can_read_without_sync", lambda tensor: False)
    codebook = WAYS[way](EMACodebook(codebook_size=8, dim=4))
    if way in ("swap_tensors", "in place"):
        assert not codebook.needs_codes
    else:
        assert_initialises(codebook)


def test_trained_codebook_stays_known_on_the_way_to_a_compiled_step(monkeypatch):
    """A compiled step cannot read `initialized`: what was known must survive casts, copies and loading."""
    monkeypatch.setattr(codebook_module, "can_read_without_sync", lambda tensor: False)
    codebook, other = trained(), EMACodebook(codebook_size=8, dim=4)
    other.load_state_dict(codebook.state_dict())
    for known in (codebook, other, codebook.double(), copy.deepcopy(codebook), pickle.loads(pickle.dumps(codebook))):
        assert not known.needs_codes


def test_functional_call_changes_the_given_state_alone():
    codebook, state = trained(), state_of(EMACodebook(codebook_size=8, dim=4, seed=3))
    expected = EMACodebook(codebook_size=8, dim=4, seed=3)
    before, x = state_of(codebook), torch.randn(40, 4)
    assert_same_bits(functional_call(codebook, state, (x,)), expected(x))
    assert_same_bits(state, state_of(expected))
    assert_same_bits(state_of(codebook), before)


@pytest.mark.thorough
def test_loaded_codebook_compiles_to_one_graph_without_a_step_before():
    source, x = trained(), torch.randn(40, 4)
    codebook = EMACodebook(codebook_size=8, dim=4)
    codebook.load_state_dict(source.state_dict())
    step = torch.compile(codebook, fullgraph=True, backend="aot_eager")
    assert_same_bits(step(x), source(x))
    assert_same_bits(state_of(codebook), state_of(source))


# ---- refusals ----

X = torch.randn(2, 5, 4)
REFUSALS = {
    "width": (lambda c: c(torch.randn(2, 5, 3)), ValueError, r"dim = 4 in its last axis.*\(2, 5, 3\)"),
    "channels first": (lambda c: c(torch.randn(2, 4, 5)), ValueError, "channels first, write vqssl.ChannelsFirst"),
    "scalar": (lambda c: c(torch.tensor(1.0)), ValueError, "dim = 4 in its last axis"),
    "integers": (lambda c: c(torch.ones(2, 4, dtype=torch.int64)), TypeError, "floating dtype.*float()"),
    "complex": (lambda c: c(torch.ones(2, 4, dtype=torch.complex64)), TypeError, "floating dtype"),
    "numpy": (lambda c: c(X.numpy()), TypeError, "must be a torch.Tensor, got ndarray"),
    "device": (lambda c: c(X.to("meta")), ValueError, r"device of the codes, cpu, got meta: write x.to\('cpu'\)"),
    "update device": (
        lambda c: c.update_(X.to("meta"), torch.zeros(2, 5, dtype=torch.int64)),
        ValueError,
        "device of the codes",
    ),
    "state of another size": (
        lambda c: c.load_state_dict(EMACodebook(codebook_size=6, dim=4).state_dict()),
        ValueError,
        r"shapes of this EMACodebook: embed \(8, 4\), got \(6, 4\); cluster_size \(8,\), got \(6,\)",
    ),
    "state of another width": (
        lambda c: c.load_state_dict(EMACodebook(codebook_size=8, dim=3).state_dict(), strict=False),
        ValueError,
        r"embed \(8, 4\), got \(8, 3\).*build the module with the sizes",
    ),
    "mask shape": (
        lambda c: c(X, torch.ones(2, 4, dtype=torch.bool)),
        ValueError,
        r"one entry for each token.*\(2, 5\)",
    ),
    "mask broadcast": (lambda c: c(X, torch.ones(5, dtype=torch.bool)), ValueError, "one entry for each token"),
    "mask width": (lambda c: c(X, torch.ones(2, 5, 4, dtype=torch.bool)), ValueError, "one entry for each token"),
    "mask dtype": (lambda c: c(X, torch.ones(2, 5)), TypeError, "boolean tensor.*torch.float32.*!= 0"),
    "mask list": (lambda c: c(X, [True]), TypeError, "boolean tensor.*list"),
    "quantize width": (lambda c: c.quantize(torch.randn(3)), ValueError, "dim = 4"),
    "quantize mask": (lambda c: c.quantize(X, torch.ones(2, 5)), TypeError, "boolean"),
    "initialize width": (lambda c: c.initialize_(torch.randn(3)), ValueError, "dim = 4"),
    "initialize mask": (lambda c: c.initialize_(X, torch.ones(2, 5)), TypeError, "boolean"),
    "update shape": (lambda c: c.update_(X, torch.zeros(5, dtype=torch.int64)), ValueError, "indices that quantize"),
    "update dtype": (lambda c: c.update_(X, torch.zeros(2, 5)), TypeError, "integer tensor of code numbers"),
    "update width": (lambda c: c.update_(X[..., :3], torch.zeros(2, 5).long()), ValueError, "dim = 4"),
    "lookup high": (lambda c: c.lookup(torch.tensor([0, 8])), ValueError, r"-1 \(masked\) to 7 .*got 0 to 8"),
    "lookup low": (lambda c: c.lookup(torch.tensor([-2])), ValueError, r"-1 \(masked\) to 7"),
    "lookup float": (lambda c: c.lookup(torch.tensor([0.0])), TypeError, "integer tensor of code numbers"),
    "lookup bool": (lambda c: c.lookup(torch.tensor([True])), TypeError, "integer tensor of code numbers"),
    "codes shape": (lambda c: c.set_codes_(torch.randn(4, 8)), ValueError, r"\(codebook_size, dim\) = \(8, 4\)"),
    "codes nan": (lambda c: c.set_codes_(torch.full((8, 4), float("nan"))), ValueError, "codes must be finite"),
    "codes overflow": (
        lambda c: c.set_codes_(torch.full((8, 4), 1e200, dtype=torch.float64)),
        ValueError,
        "codes must be finite",
    ),
    "state of another library": (
        lambda c: c.load_state_dict({"_codebook.embed": 0, "_codebook.cluster_size": 0, "_codebook.initted": 0}),
        ValueError,
        "another library's: write vqssl.interop.codebook_from_vector_quantize_pytorch",
    ),
    "tuple": (lambda c: c((X, X)), TypeError, r"got a tuple of 2: .*model\(x\)\[0\], here x\[0\]"),
    "result": (lambda c: c(c.quantize(X)), TypeError, r"got Quantized: write x.quantized"),
    "list of numbers": (lambda c: c([0.0] * 4), TypeError, r"got a list of 4: write torch.as_tensor\(x\)"),
    "indices": (lambda c: c(torch.ones(3, 4).long()), TypeError, r"write codebook.lookup\(x\) for code numbers"),
    "image": (lambda c: c(torch.ones(3, 4).byte()), TypeError, r"torch.uint8: write x.float\(\)$"),
    "codes integers": (lambda c: c.set_codes_(torch.ones(8, 4).long()), TypeError, "floating dtype"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_name_the_rule_and_leave_the_state(case):
    call, error, message = REFUSALS[case]
    codebook = EMACodebook(codebook_size=8, dim=4, decay=0.7)
    for _ in range(2):  # before the first update and after it
        before = state_of(codebook)
        with pytest.raises(error, match=message):
            call(codebook)
        assert_same_bits(state_of(codebook), before)
        codebook(torch.randn(30, 4))
        assert_differs(state_of(codebook), before)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"codebook_size": 0}, ValueError, "codebook_size must be at least 1, got 0"),
        ({"codebook_size": 2.0}, TypeError, "codebook_size must be an int"),
        ({"codebook_size": True}, TypeError, "codebook_size must be an int"),
        ({"dim": 0}, ValueError, "dim must be at least 1"),
        ({"seed": 1.0}, TypeError, "seed must be an int"),
        ({"dtype": torch.int64}, TypeError, "dtype must be a floating dtype, got torch.int64"),
        ({"dtype": "float32"}, TypeError, "dtype must be a torch.dtype, got 'float32': write torch.float32$"),
        ({"dtype": "tensor"}, TypeError, "dtype must be a torch.dtype, got 'tensor': write torch.float32 or"),
        ({"dtype": float}, TypeError, "dtype must be a torch.dtype, got <class 'float'>"),
        ({"process_group": "x"}, TypeError, "process_group must be a ProcessGroup or None, got 'x'"),
        ({"process_group": [0, 1]}, TypeError, "process_group must be a ProcessGroup or None"),
        ({"metric": torch.nn.Identity}, TypeError, "metric must be a function or an object, got the class Identity"),
        ({"ema": dict}, TypeError, "ema must be a function or an object, got the class dict"),
        ({"estimator": torch.nn.Identity}, TypeError, "estimator must be a function or an object, got the class"),
        ({"codebok_size": 8}, TypeError, "EMACodebook has no argument 'codebok_size': write codebook_size="),
        ({"initialisation": None}, TypeError, "has no argument 'initialisation': write initialization="),
        ({"zzz": 1}, TypeError, "has no argument 'zzz': it takes codebook_size, dim, decay"),
        ({"decay": 1.5}, ValueError, "decay must be from 0 to 1.*share of the old statistics"),
        ({"decay": "0.9"}, TypeError, "decay must be a number"),
        ({"eps": -1.0}, ValueError, "eps must be from 0"),
        ({"eps": float("nan")}, ValueError, "eps must be from 0"),
        ({"commitment_weight": -0.1}, ValueError, "commitment_weight must be from 0"),
        ({"metric": "dot"}, ValueError, "metric must be one of 'euclidean', 'cosine', or a callable, got 'dot'"),
        ({"ema": "mean"}, ValueError, "ema must be one of 'count_weighted', 'batch_mean', or a callable, got 'mean'"),
        ({"ema": 3}, TypeError, "ema must be a name"),
        (
            {"initialization": "kmeans"},
            TypeError,
            r"must be an object, got 'kmeans': write .*KMeansInit\(\)",
        ),
        ({"initialization": KMeansInit}, TypeError, "must be an object, got the class KMeansInit"),
        ({"revival": 0.1}, TypeError, r"revival must be an object, got 0.1: write revival=BatchRevival\(\)"),
        ({"estimator": "gumbel"}, ValueError, "estimator must be one of 'straight_through', 'rotation'"),
    ],
)
def test_constructor_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        EMACodebook(**{"codebook_size": 8, "dim": 4, **arguments})
