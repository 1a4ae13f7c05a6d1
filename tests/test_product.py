"""ProductQuantizer: the laws, equality with its codebooks called by hand, vector-quantize-pytorch's heads."""

import copy
import math

import pytest
import torch
import vector_quantize_pytorch

from tests.laws import (
    DtypeLaws,
    GraphLaws,
    MaskLaws,
    Material,
    StateLaws,
    assert_differs,
    assert_same_bits,
    state_of,
)
from vqssl import BatchRevival, EMACodebook, KMeansInit, ProductQuantizer

GROUPS = 3


class ProductMaterial(Material):
    def make(self, **options):
        # A high threshold: few parts of two channels are far from all codes.
        options = {"num_groups": GROUPS, "decay": 0.7, "revival": BatchRevival(0.6), **self.options, **options}
        return ProductQuantizer(codebook_size=self.codebook_size, dim=self.dim, **options)

    def codebooks(self, module):
        return list(module.codebooks)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_output_has_the_dtype_of_the_input(self, dtype):
        module = self.trained()
        before = copy.deepcopy(module)
        out = module(self.batch(7).to(dtype))
        assert_same_bits(out.quantized, before.lookup(out.indices).to(dtype))
        assert all(codebook.embed.dtype == torch.float32 for codebook in module.codebooks)
        assert out.commitment_loss.dtype == torch.promote_types(dtype, torch.float32)


class TestGroups(ProductMaterial, StateLaws, MaskLaws, DtypeLaws):
    test_output_has_the_dtype_of_the_input = ProductMaterial.test_output_has_the_dtype_of_the_input


@pytest.mark.thorough
class TestGraphs(ProductMaterial, GraphLaws):
    pass


class TestShared(ProductMaterial, StateLaws, MaskLaws):
    options = {"shared": True}  # noqa: RUF012


@pytest.mark.thorough
class TestOtherLawsOfShared(ProductMaterial, DtypeLaws, GraphLaws):
    options = {"shared": True}  # noqa: RUF012
    test_output_has_the_dtype_of_the_input = ProductMaterial.test_output_has_the_dtype_of_the_input


@pytest.mark.thorough
class TestCosineKMeans(ProductMaterial, StateLaws, MaskLaws, GraphLaws):
    options = {"metric": "cosine", "initialization": KMeansInit(3)}  # noqa: RUF012


def batch(step=0, count=60, dim=6, dtype=torch.float32):
    generator = torch.Generator().manual_seed(step)
    centres = 3 * torch.randn(6, dim, generator=torch.Generator().manual_seed(step // 4), dtype=dtype)
    choice = torch.randint(6, (count,), generator=generator)
    return centres[choice] + 0.5 * torch.randn(count, dim, generator=generator, dtype=dtype)


# ---- what a step computes ----


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"metric": "cosine", "estimator": "rotation"},
        {"ema": "batch_mean", "commitment_weight": 1.0},
    ],
)
def test_groups_equal_codebooks_called_by_hand(options, masked):
    options = {"decay": 0.6, **options}
    quantizer = ProductQuantizer(codebook_size=[5, 7], dim=6, num_groups=2, seed=3, **options)
    codebooks = [EMACodebook(codebook_size=size, dim=3, seed=3 + g, **options) for g, size in enumerate([5, 7])]
    for step in range(8):
        x = batch(step).reshape(3, 20, 6)
        mask = torch.rand(3, 20) < 0.7 if masked else None
        x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
        out = quantizer(x1, mask)
        expected = [codebook(part, mask) for codebook, part in zip(codebooks, x2.chunk(2, -1), strict=True)]
        whole = torch.cat([each.quantized for each in expected], -1)
        assert_same_bits(out.quantized, whole)
        assert_same_bits(out.indices, torch.stack([each.indices for each in expected], -1))
        assert_same_bits(list(out.commitment_losses), [each.commitment_loss for each in expected])
        loss = sum(each.commitment_loss for each in expected) / 2
        torch.testing.assert_close(out.commitment_loss, loss)
        (out.quantized.square().sum() + out.commitment_loss).backward()
        (whole.square().sum() + loss).backward()
        torch.testing.assert_close(x1.grad, x2.grad)
        for found, wanted in zip(quantizer.codebooks, codebooks, strict=True):
            assert_same_bits(state_of(found), state_of(wanted))


def test_shared_codebook_is_one_codebook_of_all_parts():
    quantizer = ProductQuantizer(codebook_size=8, dim=6, num_groups=3, shared=True, decay=0.6)
    codebook = EMACodebook(codebook_size=8, dim=2, decay=0.6)
    assert quantizer.codebook(2) is quantizer.codebook(0)
    for step in range(8):
        x = batch(step)
        out, expected = quantizer(x), codebook(x.reshape(60, 3, 2))
        assert_same_bits(out.indices, expected.indices)
        assert_same_bits(out.quantized, expected.quantized.flatten(1))
        torch.testing.assert_close(out.commitment_loss, expected.commitment_loss)
        assert_same_bits(state_of(quantizer.codebook(0)), state_of(codebook))


def test_commitment_is_that_of_the_whole_token_and_gradient_is_one():
    quantizer = ProductQuantizer(codebook_size=8, dim=6, num_groups=3, commitment_weight=0.5)
    quantizer(batch())
    x = batch(1).requires_grad_()
    before = copy.deepcopy(quantizer)
    out = quantizer(x)
    expected = 0.5 * (x.detach().double() - before.lookup(out.indices).double()).square().mean()
    assert out.commitment_loss.item() == pytest.approx(expected.item(), rel=1e-6)
    cotangent = torch.randn_like(x)
    out.quantized.backward(cotangent)
    assert torch.equal(x.grad, cotangent)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_lookup_of_indices_is_the_output_to_the_bit(training, shared):
    quantizer = ProductQuantizer(codebook_size=8, dim=6, num_groups=2, shared=shared)
    quantizer(batch())
    quantizer.train(training)
    before = copy.deepcopy(quantizer)
    out = quantizer(batch(1).reshape(3, 20, 6))
    assert out.indices.shape == (3, 20, 2)
    assert_same_bits(out.quantized, before.lookup(out.indices))
    assert torch.equal(before.eval()(out.quantized).indices, out.indices)


def test_token_with_one_broken_channel_has_no_code_in_any_group():
    quantizer = ProductQuantizer(codebook_size=8, dim=6, num_groups=3)
    quantizer(batch())
    x = batch(1)
    x[4, 5] = math.inf
    out = quantizer.quantize(x)
    assert (out.indices[4] == -1).all()
    assert out.quantized[4].isnan().all()
    assert (out.indices[torch.arange(60) != 4] >= 0).all()


@pytest.mark.parametrize("shared", [False, True])
def test_initialize_quantize_and_update_equal_forward(shared):
    whole = ProductQuantizer(codebook_size=8, dim=6, num_groups=2, shared=shared, decay=0.7)
    parts = copy.deepcopy(whole)
    for step in range(6):
        x = batch(step)
        x[::17, 0] = math.nan
        mask = torch.rand(60) < 0.8
        out = whole(x, mask)
        parts.initialize_(x, mask)
        found = parts.quantize(x, mask)
        parts.update_(x, found.indices)
        assert_same_bits(found, out)
        assert_same_bits(state_of(parts), state_of(whole))


def test_groups_draw_different_positions():
    quantizer = ProductQuantizer(codebook_size=8, dim=6, num_groups=2)
    x = batch()
    quantizer.initialize_(torch.cat([x[:, :3], x[:, :3]], -1))  # both groups see the same parts
    assert not torch.equal(quantizer.codebook(0).embed, quantizer.codebook(1).embed)


@pytest.mark.parametrize("separate", [True, False])
def test_training_equals_heads_of_vector_quantize_pytorch(separate):
    theirs = vector_quantize_pytorch.VectorQuantize(
        dim=6,
        codebook_dim=2,
        codebook_size=8,
        heads=3,
        separate_codebook_per_head=separate,
        decay=0.8,
        commitment_weight=0.5,
        rotation_trick=False,
        threshold_ema_dead_code=0,
    )
    ours = ProductQuantizer(
        codebook_size=8, dim=6, num_groups=3, shared=not separate, decay=0.8, commitment_weight=0.5, revival=None
    )
    ours.initialize_(batch())
    names = ("embed", "embed_avg", "cluster_size")
    for name in names:
        getattr(theirs._codebook, name).data.copy_(torch.stack([getattr(each, name) for each in ours.codebooks]))
    for step in range(8):
        x = batch(step).reshape(3, 20, 6)
        x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
        found, expected = ours(x1), theirs(x2)
        assert torch.equal(found.indices, expected[1])
        torch.testing.assert_close(found.quantized, expected[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.commitment_loss, expected[2].squeeze(), rtol=1e-5, atol=1e-6)
        (found.quantized.square().sum() + found.commitment_loss).backward()
        (expected[0].square().sum() + expected[2].sum()).backward()
        torch.testing.assert_close(x1.grad, x2.grad, rtol=1e-5, atol=1e-5)
        for name in names:
            wanted = getattr(theirs._codebook, name).data
            for head, codebook in enumerate(ours.codebooks):
                torch.testing.assert_close(getattr(codebook, name), wanted[head], rtol=1e-4, atol=1e-5)


# ---- state and refusals ----


def test_freeze_usage_and_codebook_are_those_of_the_groups():
    quantizer = ProductQuantizer(codebook_size=[8, 9], dim=6, num_groups=2)
    quantizer(batch())
    assert quantizer.freeze() is quantizer
    assert all(codebook.frozen for codebook in quantizer.codebooks)
    assert len(quantizer.usage()) == 2
    for group, usage in enumerate(quantizer.usage(0.5)):
        assert_same_bits(usage, quantizer.codebook(group).usage(0.5))
    with pytest.raises(ValueError, match="group must be from 0 to 1, got -1"):
        quantizer.codebook(-1)


def test_initialisation_that_refuses_a_group_changes_none():
    quantizer = ProductQuantizer(codebook_size=[4, 40], dim=4, num_groups=2, initialization=KMeansInit())
    before = state_of(quantizer)
    with pytest.raises(ValueError, match="k-means needs at least as many tokens as codes"):
        quantizer(batch(count=20, dim=4))
    assert_same_bits(state_of(quantizer), before)


X = torch.ones(3, 6)
REFUSALS = {
    "width": (lambda q: q(X[:, :3]), ValueError, "x must be .* dim = 6"),
    "integers": (lambda q: q(X.long()), TypeError, "floating dtype"),
    "mask": (lambda q: q(X, torch.ones(2, dtype=torch.bool)), ValueError, "mask must have one entry for each token"),
    "groups": (lambda q: q.lookup(torch.zeros(3, 3).long()), ValueError, "with 2 groups in the last axis"),
    "index": (lambda q: q.lookup(torch.tensor([[0, 8]])), ValueError, "from -1 .masked. to 7"),
    "update shape": (lambda q: q.update_(X, torch.zeros(3).long()), ValueError, r"shape \(3, 2\)"),
    "state": (
        lambda q: q.load_state_dict(ProductQuantizer(codebook_size=8, dim=8, num_groups=2).state_dict()),
        ValueError,
        "must have the shapes of this ProductQuantizer",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_name_the_rule_and_leave_the_state(case):
    call, error, message = REFUSALS[case]
    quantizer = ProductQuantizer(codebook_size=8, dim=6, num_groups=2, decay=0.7)
    for _ in range(2):  # before the first update and after it
        before = state_of(quantizer)
        with pytest.raises(error, match=message):
            call(quantizer)
        assert_same_bits(state_of(quantizer), before)
        quantizer(batch())
        assert_differs(state_of(quantizer), before)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_groups": 4}, ValueError, "dim must be a multiple of num_groups, got 6 and 4"),
        ({"num_groups": 0}, ValueError, "num_groups must be at least 1"),
        ({"codebook_size": [8]}, ValueError, "one for each of the 2 groups"),
        ({"codebook_size": [8, 8], "shared": True}, ValueError, "a shared codebook has one codebook_size"),
        ({"seed": None}, TypeError, "seed must be an int"),
        ({"heads": 2}, TypeError, "write num_groups="),
        ({"separate_codebook_per_head": True}, TypeError, "write shared=True if it is False"),
        ({"metric": "dot"}, ValueError, "metric must be one of"),
        ({"decey": 0.9}, TypeError, "ProductQuantizer has no argument 'decey': write decay="),
    ],
)
def test_constructor_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        ProductQuantizer(**{"codebook_size": 8, "dim": 6, "num_groups": 2, **arguments})


def test_sizes_by_position_are_refused():
    with pytest.raises(TypeError, match=r"write ProductQuantizer\(codebook_size=, dim=, num_groups=\)"):
        ProductQuantizer(8, 6, 2)
