"""ResidualQuantizer: the laws, a training step as loops in float64, vector-quantize-pytorch's ResidualVQ, dropout."""

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
    through_file,
)
from tests.profiles import few
from vqssl import BatchRevival, EMACodebook, KMeansInit, RandomInit, ResidualQuantizer, SampleInit
from vqssl.functional import rotation_trick

LEVELS = 3


class ResidualMaterial(Material):
    def make(self, **options):
        options = {"num_levels": LEVELS, "decay": 0.7, **self.options, **options}
        return ResidualQuantizer(codebook_size=self.codebook_size, dim=self.dim, **options)

    def codebooks(self, module):
        return list(module.codebooks)


class TestLaws(ResidualMaterial, StateLaws, MaskLaws, DtypeLaws):
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_output_has_the_dtype_of_the_input(self, dtype):
        module = self.trained()
        before = copy.deepcopy(module)
        out = module(self.batch(7).to(dtype))
        assert_same_bits(out.quantized, before.lookup(out.indices).to(dtype))
        assert all(codebook.embed.dtype == torch.float32 for codebook in module.codebooks)
        assert all(codebook.embed.isfinite().all() for codebook in module.codebooks)
        assert out.commitment_loss.dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.thorough
class TestGraphs(ResidualMaterial, GraphLaws):
    pass


class TestStateWithDropout(ResidualMaterial, StateLaws):
    options = {"level_dropout": 0.7}  # noqa: RUF012


@pytest.mark.thorough
class TestOtherLawsWithDropout(ResidualMaterial, MaskLaws, GraphLaws):
    options = {"level_dropout": 0.7}  # noqa: RUF012

    @pytest.mark.parametrize("how", ["empty", "fully masked"])
    def test_batch_without_valid_tokens_has_zero_loss_and_changes_nothing(self, how):
        pytest.skip("the draw counter of the dropout moves with each training step")


@pytest.mark.thorough
class TestSample(ResidualMaterial, StateLaws, MaskLaws):
    options = {"initialization": SampleInit()}  # noqa: RUF012


def batch(step=0, count=60, dim=4, dtype=torch.float32):
    generator = torch.Generator().manual_seed(step)
    centres = 3 * torch.randn(6, dim, generator=torch.Generator().manual_seed(step // 4), dtype=dtype)
    choice = torch.randint(6, (count,), generator=generator)
    return centres[choice] + 0.5 * torch.randn(count, dim, generator=generator, dtype=dtype)


# ---- what a step computes ----


def slow_level(rest, codebook):
    """Return indices and the state after one count-weighted step of a level, number by number."""
    embed, counts, sums = (tensor.clone() for tensor in codebook.state())
    indices = [min(range(len(embed)), key=lambda k: float((token - embed[k]).square().sum())) for token in rest]
    for k in range(len(embed)):
        mine = [token for token, chosen in zip(rest, indices, strict=True) if chosen == k]
        counts[k] = codebook.decay * counts[k] + (1 - codebook.decay) * len(mine)
        sums[k] = codebook.decay * sums[k] + (1 - codebook.decay) * sum(mine, torch.zeros(rest.shape[1]).double())
    total, eps = counts.sum(), codebook.eps
    new = [sums[k] / ((counts[k] + eps) / (total + len(embed) * eps) * total) for k in range(len(embed))]
    return torch.tensor(indices), (torch.stack(new), counts, sums)


def test_training_step_equals_loops():
    quantizer = ResidualQuantizer(
        codebook_size=[5, 7, 3],
        dim=4,
        num_levels=3,
        decay=0.6,
        commitment_weight=0.5,
        revival=None,
        dtype=torch.float64,
    )
    quantizer.initialize_(batch(dtype=torch.float64))
    for step in range(1, 5):
        x = batch(step, dtype=torch.float64)
        rest, expected, states, losses = x, 0.0, [], []
        for codebook in quantizer.codebooks:
            indices, state = slow_level(rest, codebook)
            states.append((indices, state))
            codes = codebook.embed[indices]
            losses.append(0.5 * float(((rest - codes) ** 2).mean()))
            expected = expected + codes
            rest = rest - codes
        out = quantizer(x)
        torch.testing.assert_close(out.quantized, expected, rtol=1e-12, atol=1e-12)
        assert [loss.item() for loss in out.commitment_losses] == pytest.approx(losses, rel=1e-12)
        assert out.commitment_loss.item() == pytest.approx(sum(losses), rel=1e-12)
        for level, (indices, state) in enumerate(states):
            assert torch.equal(out.indices[:, level], indices)
            for found, wanted in zip(quantizer.codebook(level).state(), state, strict=True):
                torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("levels", [1, 4])
def test_gradient_to_tokens_is_exactly_one_through_any_number_of_levels(levels, training):
    quantizer = ResidualQuantizer(codebook_size=8, dim=4, num_levels=levels)
    quantizer(batch())
    quantizer.train(training)
    x = batch(1).requires_grad_()
    out = quantizer(x)
    cotangent = torch.randn_like(x)
    out.quantized.backward(cotangent)
    assert torch.equal(x.grad, cotangent)


def test_commitment_of_every_level_has_a_gradient_to_tokens_and_to_no_code():
    quantizer = ResidualQuantizer(codebook_size=8, dim=4, num_levels=4, commitment_weight=1.0)
    quantizer(batch())
    quantizer.eval()
    x = batch(1).requires_grad_()
    out = quantizer(x)
    for level, loss in enumerate(out.commitment_losses):
        (gradient,) = torch.autograd.grad(loss, x, retain_graph=True)
        left = x.detach() - quantizer.lookup(out.indices[:, : level + 1])
        torch.testing.assert_close(gradient, 2 * left / x.numel(), rtol=1e-4, atol=1e-7)
        assert gradient.abs().sum() > 0
    assert not any(buffer.requires_grad for buffer in quantizer.buffers())


def test_rotation_carries_the_gradient_past_all_levels_at_once():
    quantizer = ResidualQuantizer(codebook_size=8, dim=4, num_levels=3, estimator="rotation")
    quantizer(batch())
    quantizer.eval()
    x, again = batch(1).requires_grad_(), batch(1).requires_grad_()
    cotangent = torch.randn_like(x)
    out = quantizer(x)
    out.quantized.backward(cotangent)
    rotation_trick(again, quantizer.lookup(out.indices)).backward(cotangent)
    torch.testing.assert_close(x.grad, again.grad)


@pytest.mark.parametrize("training", [True, False])
def test_lookup_of_indices_is_the_output_to_the_bit(training):
    quantizer = ResidualQuantizer(codebook_size=8, dim=4, num_levels=5)
    quantizer(batch())
    quantizer.train(training)
    before = copy.deepcopy(quantizer)
    out = quantizer(batch(1).reshape(3, 20, 4))
    assert out.indices.shape == (3, 20, 5)
    assert_same_bits(out.quantized, before.lookup(out.indices))


def test_first_levels_decode_alone_and_each_further_level_brings_the_code_nearer():
    quantizer = ResidualQuantizer(codebook_size=16, dim=4, num_levels=5)
    for step in range(40):
        quantizer(batch(step % 4))
    x = batch(2)
    indices = quantizer.quantize(x).indices
    errors = [(x - quantizer.lookup(indices[:, :levels])).square().mean().item() for levels in range(1, 6)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.2 * errors[0]
    assert_same_bits(quantizer.lookup(indices[:, :1]), quantizer.codebook(0).embed[indices[:, 0]])


def test_one_level_is_a_codebook():
    options = {"codebook_size": 8, "dim": 4, "decay": 0.6, "seed": 3, "initialization": KMeansInit()}
    residual, codebook = ResidualQuantizer(num_levels=1, **options), EMACodebook(**options)
    for step in range(8):
        found, expected = residual(batch(step)), codebook(batch(step))
        assert_same_bits([found.quantized, found.indices[:, 0], found.commitment_loss], list(expected))
        assert_same_bits(state_of(residual.codebook(0)), state_of(codebook))


def test_permuting_codes_of_a_level_permutes_its_indices_and_nothing_else():
    a = ResidualQuantizer(codebook_size=8, dim=4, num_levels=3, revival=None, dtype=torch.float64)
    a(batch(dtype=torch.float64))
    b = copy.deepcopy(a)
    orders = [torch.randperm(8, generator=torch.Generator().manual_seed(level)) for level in range(3)]
    a.set_codes_([codebook.embed.clone() for codebook in a.codebooks])
    b.set_codes_([codebook.embed[order] for codebook, order in zip(a.codebooks, orders, strict=True)])
    for step in range(3):
        x = batch(step, dtype=torch.float64)
        found, expected = b(x), a(x)
        torch.testing.assert_close(found.quantized, expected.quantized, rtol=1e-12, atol=1e-12)
        for level, order in enumerate(orders):
            assert torch.equal(order[found.indices[:, level]], expected.indices[:, level])


def test_initialize_quantize_and_update_equal_forward():
    whole = ResidualQuantizer(codebook_size=8, dim=4, num_levels=3, decay=0.7)
    parts = copy.deepcopy(whole)
    for step in range(6):
        x = batch(step)
        x[::17] = math.nan
        mask = torch.rand(60) < 0.8
        out = whole(x, mask)
        parts.initialize_(x, mask)
        found = parts.quantize(x, mask)
        parts.update_(x, found.indices)
        assert_same_bits(found, out)
        assert_same_bits(state_of(parts), state_of(whole))


# ---- first codes ----


@pytest.mark.parametrize("options", [{}, {"initialization": SampleInit()}], ids=["k-means", "sample"])
@pytest.mark.parametrize("count", [20, 12, 8, 2])
def test_first_codes_of_no_level_are_zero_also_with_fewer_tokens_than_codes(count, options):
    """Tokens that are codes of a level leave 0: without care, all further levels would begin at 0."""
    quantizer = ResidualQuantizer(codebook_size=12, dim=4, num_levels=4, **options)
    quantizer(batch(count=count))
    for level, codebook in enumerate(quantizer.codebooks):
        assert codebook.initialized
        distinct = codebook.embed.unique(dim=0)
        assert len(distinct) == 12, f"level {level}"
        assert (codebook.embed != 0).any(-1).all()


def test_levels_begin_with_distinct_codes_and_shrink():
    quantizer = ResidualQuantizer(codebook_size=16, dim=4, num_levels=4)
    quantizer.initialize_(batch(count=200))
    codes = torch.cat([codebook.embed for codebook in quantizer.codebooks])
    assert len(codes.unique(dim=0)) == 64
    lengths = [codebook.embed.norm(dim=-1).mean().item() for codebook in quantizer.codebooks]
    assert lengths == sorted(lengths, reverse=True)


def test_k_means_starts_with_a_smaller_error_than_tokens():
    """The default, for its reason: tokens as codes are longer than what other tokens leave."""
    x = torch.randn(2000, 32)
    errors = []
    for initialization in (KMeansInit(few_tokens="sample"), SampleInit()):
        quantizer = ResidualQuantizer(codebook_size=64, dim=32, num_levels=4, initialization=initialization)
        quantizer.initialize_(x[:1000])
        errors.append((x - quantizer.quantize(x).quantized).square().mean().item())
    assert errors[0] < 0.75 * errors[1]
    assert ResidualQuantizer(codebook_size=4, dim=2, num_levels=1).codebook(0).initialization == KMeansInit(
        few_tokens="sample"
    )


def test_random_codes_differ_between_levels():
    quantizer = ResidualQuantizer(codebook_size=8, dim=4, num_levels=3, initialization=RandomInit())
    assert len(torch.cat([codebook.embed for codebook in quantizer.codebooks]).unique(dim=0)) == 24
    assert [int(codebook.rng[0]) for codebook in quantizer.codebooks] == [0, 1, 2]


def test_initialisation_that_refuses_a_level_changes_none():
    quantizer = ResidualQuantizer(codebook_size=[4, 40], dim=4, num_levels=2, initialization=KMeansInit())
    before = state_of(quantizer)
    with pytest.raises(ValueError, match="k-means needs at least as many tokens as codes"):
        quantizer(batch(count=20))
    assert_same_bits(state_of(quantizer), before)


@pytest.mark.thorough
def test_error_is_no_worse_than_of_levels_trained_one_after_another():
    """All levels at once, from one batch on: after 200 steps within 10% of levels that were each trained to the end."""
    quantizer = ResidualQuantizer(codebook_size=16, dim=4, num_levels=3, decay=0.9)
    alone = [EMACodebook(codebook_size=16, dim=4, decay=0.9, seed=level) for level in range(3)]
    for step in range(200):
        quantizer(batch(step % 4 + 8, count=256))
    for level, codebook in enumerate(alone):
        for step in range(200):
            rest = batch(step % 4 + 8, count=256)
            for earlier in alone[:level]:
                rest = rest - earlier.lookup(earlier.quantize(rest).indices)
            codebook(rest)
    x = batch(9, count=1000)
    rest = x
    for codebook in alone:
        rest = rest - codebook.lookup(codebook.quantize(rest).indices)
    error = (x - quantizer.quantize(x).quantized).square().mean()
    assert error < 1.1 * rest.square().mean()


# ---- level dropout ----


def levels_used(indices):
    """Return how many levels a batch used, which is the same for every token."""
    (used,) = (indices >= 0).sum(-1).unique().tolist()
    return used


@pytest.mark.parametrize("steps", few([100, 400]))
def test_dropout_keeps_the_first_levels_with_the_given_probability(steps):
    quantizer = ResidualQuantizer(codebook_size=4, dim=4, num_levels=4, level_dropout=0.5, min_levels=2)
    drawn = []
    for step in range(steps):
        out = quantizer(batch(step))
        drawn.append(levels_used(out.indices))
        assert (out.indices[:, : drawn[-1]] >= 0).all()
        if drawn[-1] < 4:
            assert all(loss == 0 for loss in out.commitment_losses[drawn[-1] :])
    # A half uses all, the other half 2, 3 or 4 alike; the draws are within three standard deviations.
    for levels, share in ((2, 1 / 6), (3, 1 / 6), (4, 4 / 6)):
        assert abs(drawn.count(levels) / steps - share) < 3 * math.sqrt(share * (1 - share) / steps)


def test_dropped_levels_are_not_updated_and_the_code_is_that_of_the_others():
    quantizer = ResidualQuantizer(codebook_size=8, dim=4, num_levels=3, level_dropout=1.0, min_levels=1)
    quantizer(batch())
    seen = set()
    for step in range(12):
        before = copy.deepcopy(quantizer)
        x = batch(step)
        out = quantizer(x)
        used = levels_used(out.indices)
        seen.add(used)
        whole = before.quantize(x).indices
        assert torch.equal(out.indices[:, :used], whole[:, :used])
        assert_same_bits(out.quantized, before.lookup(whole[:, :used]))
        for level in range(3):
            same = torch.equal(quantizer.codebook(level).embed, before.codebook(level).embed)
            assert same == (level >= used)
    assert seen == {1, 2, 3}


def test_nothing_is_dropped_in_eval_or_frozen_or_by_quantize():
    quantizer = ResidualQuantizer(codebook_size=8, dim=4, num_levels=3, level_dropout=1.0)
    quantizer(batch())
    for _ in range(6):
        assert levels_used(quantizer.quantize(batch(1)).indices) == 3
        assert levels_used(quantizer.eval()(batch(1)).indices) == 3
        assert levels_used(quantizer.train().freeze()(batch(1)).indices) == 3
        quantizer.freeze(False)


def test_draws_of_the_dropout_go_on_after_a_level_is_frozen():
    quantizer = ResidualQuantizer(codebook_size=8, dim=4, num_levels=3, level_dropout=1.0)
    quantizer(batch())
    quantizer.codebook(0).freeze()
    assert {levels_used(quantizer(batch(step)).indices) for step in range(20)} == {1, 2, 3}


# ---- vector-quantize-pytorch ----


@pytest.mark.parametrize("sizes", [8, (8, 5, 6)])
def test_training_equals_vector_quantize_pytorch(sizes):
    """Values, indices, losses and state; theirs adds up the gradients of all levels, ours is 1."""
    theirs = vector_quantize_pytorch.ResidualVQ(
        dim=4,
        num_quantizers=3,
        codebook_size=sizes,
        decay=0.8,
        commitment_weight=0.5,
        rotation_trick=False,
        threshold_ema_dead_code=0,
    )
    ours = ResidualQuantizer(codebook_size=sizes, dim=4, num_levels=3, decay=0.8, commitment_weight=0.5, revival=None)
    ours.initialize_(batch())
    names = ("embed", "embed_avg", "cluster_size")
    for level, layer in enumerate(theirs.layers):
        for name in names:
            getattr(layer._codebook, name).data.copy_(getattr(ours.codebook(level), name)[None])
    for step in range(8):
        x = batch(step).reshape(3, 20, 4)
        x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
        found, expected = ours(x1), theirs(x2)
        torch.testing.assert_close(found.quantized, expected[0], rtol=1e-5, atol=1e-5)
        assert torch.equal(found.indices, expected[1])
        torch.testing.assert_close(torch.stack(found.commitment_losses), expected[2].flatten(), rtol=1e-5, atol=1e-6)
        found.quantized.sum().backward()
        expected[0].sum().backward()
        torch.testing.assert_close(x1.grad, x2.grad / 3)
        for level, layer in enumerate(theirs.layers):
            for name in names:
                wanted = getattr(layer._codebook, name).data[0]
                torch.testing.assert_close(getattr(ours.codebook(level), name), wanted, rtol=1e-4, atol=1e-5)
    theirs.eval()
    indices = ours.quantize(x).indices
    torch.testing.assert_close(ours.lookup(indices), theirs.get_output_from_indices(indices), rtol=1e-4, atol=1e-5)


# ---- state ----


def test_freeze_usage_and_codebook_are_those_of_the_levels():
    quantizer = ResidualQuantizer(codebook_size=8, dim=4, num_levels=3, revival=BatchRevival(0.2))
    quantizer(batch())
    assert quantizer.freeze() is quantizer
    assert all(codebook.frozen for codebook in quantizer.codebooks)
    for level, usage in enumerate(quantizer.usage(0.5)):
        assert_same_bits(usage, quantizer.codebook(level).usage(0.5))
    with pytest.raises(ValueError, match="level must be from 0 to 2, got 3"):
        quantizer.codebook(3)


def test_dropout_continues_after_a_checkpoint():
    quantizer = ResidualQuantizer(codebook_size=4, dim=4, num_levels=4, level_dropout=1.0, seed=5)
    for step in range(5):
        quantizer(batch(step))
    other = ResidualQuantizer(codebook_size=4, dim=4, num_levels=4, level_dropout=1.0)
    other.load_state_dict(through_file(quantizer.state_dict()))
    drawn = [[levels_used(module(batch(step)).indices) for step in range(30)] for module in (quantizer, other)]
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) > 1


def test_damaged_state_changes_nothing():
    quantizer = ResidualQuantizer(codebook_size=4, dim=4, num_levels=2)
    quantizer(batch())
    before = state_of(quantizer)
    for name, value in (("codebooks.1.embed", torch.full((4, 4), math.nan)), ("rng", torch.tensor([0, 2**62 + 1]))):
        with pytest.raises(ValueError, match=name):
            quantizer.load_state_dict({**before, name: value})
        assert_same_bits(state_of(quantizer), before)
    fresh = ResidualQuantizer(codebook_size=5, dim=4, num_levels=2)
    with pytest.raises(ValueError, match="must have the shapes of this ResidualQuantizer"):
        quantizer.load_state_dict(fresh.state_dict())
    assert_same_bits(state_of(quantizer), before)


# ---- refusals ----

X = torch.ones(3, 4)
REFUSALS = {
    "width": (lambda q: q(X[:, :3]), ValueError, "x must be .* dim = 4"),
    "integers": (lambda q: q(X.long()), TypeError, "floating dtype"),
    "mask": (lambda q: q(X, torch.ones(2, dtype=torch.bool)), ValueError, "mask must have one entry for each token"),
    "too many levels": (lambda q: q.lookup(torch.zeros(3, 3).long()), ValueError, "with 1 to 2 levels"),
    "no level": (lambda q: q.lookup(torch.zeros(3, 0).long()), ValueError, "with 1 to 2 levels"),
    "scalar": (lambda q: q.lookup(torch.tensor(1)), ValueError, r"write indices\[..., None\]"),
    "index": (lambda q: q.lookup(torch.tensor([[0, 8]])), ValueError, "from -1 .masked. to 7"),
    "float indices": (lambda q: q.lookup(torch.zeros(3, 2)), TypeError, "integer tensor"),
    "update by a result": (
        lambda q: q.update_(X, q.quantize(X)),
        TypeError,
        "got MultiCodeQuantized: give its .indices",
    ),
    "update shape": (lambda q: q.update_(X, torch.zeros(3).long()), ValueError, r"shape \(3, 2\)"),
    "few codes": (lambda q: q.set_codes_([torch.ones(8, 4)]), ValueError, "each of the 2 levels, got 1"),
    "shape of codes": (
        lambda q: q.set_codes_([torch.ones(8, 4), torch.ones(7, 4)]),
        ValueError,
        r"codes\[1\] must be \(codebook_size, dim\) = \(8, 4\)",
    ),
    "codes not finite": (
        lambda q: q.set_codes_([torch.ones(8, 4), torch.full((8, 4), math.inf)]),
        ValueError,
        r"codes\[1\] must be finite",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_name_the_rule_and_leave_the_state(case):
    call, error, message = REFUSALS[case]
    quantizer = ResidualQuantizer(codebook_size=8, dim=4, num_levels=2, decay=0.7)
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
        ({"num_levels": 0}, ValueError, "num_levels must be at least 1"),
        ({"codebook_size": [8]}, ValueError, "one for each of the 2 levels"),
        ({"metric": "cosine"}, ValueError, "metric must be 'euclidean'.*got 'cosine'"),
        ({"level_dropout": 1.5}, ValueError, "level_dropout must be from 0 to 1"),
        ({"min_levels": 3}, ValueError, "min_levels must be at most num_levels = 2, got 3"),
        ({"min_levels": 0}, ValueError, "min_levels must be at least 1"),
        ({"seed": 0.5}, TypeError, "seed must be an int"),
        ({"num_quantizers": 3}, TypeError, "write num_levels="),
        ({"quantize_dropout": True}, TypeError, "write level_dropout=1.0"),
        ({"estimator": "rotate"}, ValueError, "estimator must be one of"),
        ({"estimator": lambda x, q: q[:1]}, None, "estimator must return a tensor of the tokens' shape"),
        ({"decey": 0.9}, TypeError, "ResidualQuantizer has no argument 'decey': write decay="),
    ],
)
def test_constructor_refuses(arguments, error, message):
    with pytest.raises(error or ValueError, match=message):
        ResidualQuantizer(**{"codebook_size": 8, "dim": 4, "num_levels": 2, **arguments})(batch())


def test_sizes_by_position_are_refused():
    with pytest.raises(TypeError, match=r"write ResidualQuantizer\(codebook_size=, dim=, num_levels=\)"):
        ResidualQuantizer(8, 4, 2)
