"""update_codebooks and its steps, quantisers made of public parts, policies by name or function, foreign keywords."""

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import vqssl
from tests.laws import assert_same_bits, correlation, state_of
from vqssl import BatchRevival, EMACodebook, MultiScaleQuantizer, NoRevival, kernels
from vqssl.distributed import TokenPool, rank_counts
from vqssl.functional import batch_mean_ema, commitment_loss, count_weighted_ema, straight_through, unit
from vqssl.fused_update import FusedStep
from vqssl.update import (
    batch_statistics,
    ema_step,
    replaced_codes,
    replacement_positions,
    without_overflow,
    write_back_,
)


def trained(metric="euclidean", seed=0, **options):
    codebook = EMACodebook(
        codebook_size=6, dim=3, decay=0.7, metric=metric, seed=seed, revival=BatchRevival(0.9), **options
    )
    for _ in range(3):
        codebook(torch.randn(40, 3))
    return codebook


# ---- several codebooks, and the steps ----


@pytest.mark.parametrize("metric", ["euclidean", "cosine", correlation])
@pytest.mark.parametrize("compared", [True, False])
def test_several_codebooks_in_one_call_equal_each_alone(metric, compared):
    codebooks = [trained(metric, seed) for seed in range(3)]
    codebooks[1].freeze()
    tokens = [torch.randn(2, 9, 3) for _ in codebooks]
    indices = [codebook.quantize(x).indices for codebook, x in zip(codebooks, tokens, strict=True)]
    alone, without_revival = copy.deepcopy(codebooks), copy.deepcopy(codebooks)
    for codebook, unrevived, x, k in zip(alone, without_revival, tokens, indices, strict=True):
        codebook.update_(x, k)
        unrevived.revival = NoRevival()
        unrevived.update_(x, k)
    if compared:
        tokens = [codebook.as_compared(x) for codebook, x in zip(codebooks, tokens, strict=True)]
    vqssl.update_codebooks(codebooks, tokens, indices, compared=compared)
    assert_same_bits([state_of(codebook) for codebook in codebooks], [state_of(codebook) for codebook in alone])
    assert any(not torch.equal(a.embed, b.embed) for a, b in zip(alone, without_revival, strict=True))


def test_steps_by_hand_equal_update_codebooks():
    codebook = trained()
    other = copy.deepcopy(codebook)
    x = torch.randn(5, 3)
    k = codebook.quantize(x).indices
    vqssl.update_codebooks([codebook], [x], [k])

    statistics = without_overflow(batch_statistics(x, k, 6))
    state = ema_step(other, statistics)
    dead = other.revival.dead(state)
    assert dead.any()
    pool = TokenPool(x, k >= 0, rank_counts(statistics.slots))
    positions = replacement_positions(other, pool, dead)
    tokens = pool.take(positions)
    replaced = replaced_codes(state, dead, positions, tokens)
    write_back_(other, other.revival.replace(state, replaced, tokens), torch.tensor(True), replaced)
    assert_same_bits(state_of(other), state_of(codebook))


def test_births_count_the_codes_that_became_tokens():
    """A code that equals a token of the batch, bit for bit, was replaced; averages are none."""
    codebook = trained()
    born = torch.zeros(6, dtype=torch.int64)
    for _ in range(20):
        before = codebook.births.clone()
        x = torch.randn(5, 3)
        codebook(x)
        replaced = (codebook.embed[:, None] == x).all(-1).any(1)
        assert torch.equal(codebook.births, before + replaced)
        born += replaced
    assert born.sum() > 0
    codebook.set_codes_(torch.randn(6, 3))
    assert codebook.births.tolist() == [0] * 6


def test_birth_that_is_not_written_is_not_counted():
    """A token without a direction cannot become a code, and one whose sum overflows cannot either."""
    codebook = EMACodebook(codebook_size=4, dim=3, metric="cosine", revival=BatchRevival(threshold=0.9))
    codebook.set_codes_(torch.eye(4, 3) + 0.1)
    before = codebook.embed.clone()
    dead = torch.tensor([True, True, False, False])
    state = codebook.revival.replace(codebook.state(), dead, torch.tensor([[0.0] * 3, [0, 1, 0], [0] * 3, [0] * 3]))
    write_back_(codebook, state, torch.tensor(True), dead)
    assert codebook.births.tolist() == [0, 1, 0, 0]
    assert torch.equal(codebook.embed[0], before[0])
    other = EMACodebook(codebook_size=2, dim=1)
    infinite = other.state()._replace(embed_avg=torch.tensor([[float("inf")], [1.0]]))
    write_back_(other, infinite, torch.tensor(True), torch.tensor([True, True]))
    assert other.births.tolist() == [0, 1]
    write_back_(other, other.state(), torch.tensor(False), torch.tensor([True, True]))
    assert other.births.tolist() == [0, 1]


def test_write_back_of_false_changes_nothing():
    codebook = trained()
    before = state_of(codebook)
    write_back_(codebook, codebook.state()._replace(embed=torch.zeros(6, 3)), torch.tensor(False))
    assert_same_bits(state_of(codebook), before)


@pytest.mark.parametrize("metric", ["cosine", unit, correlation])
def test_code_whose_tokens_cancel_out_keeps_its_place(metric):
    codebook = EMACodebook(codebook_size=1, dim=3, metric=metric, decay=0.0, eps=0.0, revival=None)
    codebook.set_codes_(torch.tensor([[1.0, 2.0, -5.0]]))
    codes = codebook.embed.clone()
    x = torch.tensor([[1.0, -2.0, 1.0]])
    codebook(torch.cat([x, -x]))
    assert torch.equal(codebook.embed, codes)
    assert codebook.cluster_size.item() == 2
    assert codebook.num_updates.item() == 1
    codebook(x)  # and moves again with the next token
    torch.testing.assert_close(codebook.embed, codebook.as_compared(x))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (lambda c, x, k: ([c], [x, x], [k]), ValueError, r"one entry for each codebook, got 1, 2 and 1"),
        (lambda c, x, k: ([c], [x[:, :2]], [k]), ValueError, r"tokens\[0\] must be \(\*batch, dim\) with dim = 3"),
        (lambda c, x, k: ([c], [x], [k[:3]]), ValueError, r"indices\[0\] must have one entry for each token"),
        (lambda c, x, k: ([c], [x], [x[:, 0]]), TypeError, r"indices\[0\] must be an integer tensor"),
        (lambda c, x, k: ([c, c], [x, x[:, :2]], [k, k]), ValueError, r"tokens\[1\] must be"),
    ],
)
def test_refusals_leave_the_state(arguments, error, message):
    codebook, x = trained(), torch.randn(5, 3)
    before = state_of(codebook)
    with pytest.raises(error, match=message):
        vqssl.update_codebooks(*arguments(codebook, x, codebook.quantize(x).indices))
    assert_same_bits(state_of(codebook), before)


def test_codebooks_that_are_alike_take_their_step_as_each_alone():
    """Small ones are stacked; those of another size, rule or revival are not."""
    options = [{}, {}, {"decay": 0.9}, {"codebook_size": 7}, {"ema": "batch_mean"}, {"revival": None}, {}]
    codebooks = [
        EMACodebook(**{"codebook_size": 6, "dim": 3, "decay": 0.5, "seed": seed, **each})
        for seed, each in enumerate(options)
    ]
    for step in range(6):
        tokens = [(seed + 1) * torch.randn(20, 3) for seed in range(len(codebooks))]
        if step == 3:
            tokens[1] = tokens[1][:0]
        if step == 4:
            tokens[0][:2] = 3e38  # their sum overflows
        for codebook, x in zip(codebooks, tokens, strict=True):
            codebook.initialize_(x)
        indices = [codebook.quantize(x).indices for codebook, x in zip(codebooks, tokens, strict=True)]
        alone = copy.deepcopy(codebooks)
        for codebook, x, k in zip(alone, tokens, indices, strict=True):
            codebook.update_(x, k)
        vqssl.update_codebooks(codebooks, tokens, indices)
        assert_same_bits([state_of(codebook) for codebook in codebooks], [state_of(codebook) for codebook in alone])
    assert codebooks[1].num_updates == 5


@pytest.mark.parametrize(("metric", "revival"), [("euclidean", 0.9), ("cosine", 0.9), ("euclidean", None)])
def test_fused_operators_equal_the_steps(metric, revival):
    """As they run on CUDA where Triton does not."""
    codebook = trained(metric)
    codebook.revival = NoRevival() if revival is None else BatchRevival(revival)
    for tokens in (40, 3, 0):
        other, x = copy.deepcopy(codebook), codebook.as_compared(torch.randn(tokens, 3))
        k = codebook.quantize(x).indices
        vqssl.update_codebooks([codebook], [x], [k], compared=True)
        step = FusedStep.of(other, x, k, *kernels.code_sums(x, k, 6))
        step.write_(step.candidates)
        for a, b in zip(state_of(other).values(), state_of(codebook).values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


# ---- the number of operators ----


class Counting(TorchDispatchMode):
    """Counts what is dispatched, without what fake tensors ask of themselves."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.count += function is not torch.ops.prim.device.default
        return function(*arguments, **(options or {}))


def operators_of_a_step(device):
    """Return how many operators a training forward of three scales dispatches."""
    model = MultiScaleQuantizer([64, 128, 256], codebook_size=256, dim=64)
    if device == "cuda":
        for part in model.modules():
            for name, buffer in list(part.named_buffers(recurse=False)):
                setattr(part, name, torch.empty(buffer.shape, dtype=buffer.dtype, device=device))
            if isinstance(part, EMACodebook):
                part._known_initialized = part.initialized
    maps = [torch.randn(8, c, side, side, device=device) for c, side in ((64, 16), (128, 8), (256, 4))]
    if device == "cpu":
        model(maps)
    with Counting() as mode:
        model(maps)
    return mode.count


def test_training_step_dispatches_few_operators():
    """428 before codebooks that are alike took their step together; the rest is one call a codebook, or its product."""
    assert operators_of_a_step("cpu") <= 137


def test_training_step_on_cuda_dispatches_few_operators():
    """935 before the fused operators; counted by fake tensors, without a device."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert operators_of_a_step("cuda") <= 83


# ---- a quantiser of public parts ----


class Residual(nn.Module):
    """A residual quantiser of public names alone: each level quantises what the levels before left over."""

    def __init__(self, levels, **options):
        super().__init__()
        self.levels = nn.ModuleList(EMACodebook(seed=level, **options) for level in range(levels))

    def forward(self, x):
        rest, tokens, indices, loss = x.detach(), [], [], 0.0
        for codebook in self.levels:
            if self.training and codebook.needs_codes:
                codebook.initialize_(rest)
            k = codebook.quantize(rest).indices
            tokens.append(rest)
            indices.append(k)
            loss = loss + commitment_loss(x - (x.detach() - rest), codebook.embed, indices=k)
            rest = rest - codebook.lookup(k)
        if self.training:
            vqssl.update_codebooks(list(self.levels), tokens, indices)
        return straight_through(x, x.detach() - rest), torch.stack(indices, -1), loss


def test_residual_quantiser_can_be_built_of_public_names():
    quantizer = Residual(3, codebook_size=8, dim=4, decay=0.5)
    data = torch.randn(512, 4)
    for _ in range(20):
        x = data.clone().requires_grad_()
        quantized, indices, loss = quantizer(x)
        (quantized.sum() + 0 * loss).backward()
        assert torch.equal(x.grad, torch.ones_like(x))  # a total gradient of 1 through all levels
    assert indices.shape == (512, 3)
    errors = [
        (data - sum(quantizer.levels[i].lookup(indices[:, i]) for i in range(n))).square().mean() for n in (1, 2, 3)
    ]
    assert errors[0] > errors[1] > errors[2]
    assert [codebook.num_updates.item() for codebook in quantizer.levels] == [20, 20, 20]


# ---- policies: a name or a function ----


@pytest.mark.parametrize(
    ("named", "given"),
    [
        ({"metric": "cosine"}, {"metric": unit}),
        ({"ema": "count_weighted"}, {"ema": count_weighted_ema}),
        ({"ema": "batch_mean"}, {"ema": batch_mean_ema}),
        ({"estimator": "rotation"}, {"estimator": vqssl.functional.rotation_trick}),
    ],
)
def test_policy_by_name_equals_its_function(named, given):
    a, b = trained(**named), trained(**given)
    b.load_state_dict(a.state_dict())
    for _ in range(3):
        x = torch.randn(50, 3)
        assert_same_bits(a(x), b(x))
    assert_same_bits(state_of(a), state_of(b))


def test_nearest_codeword_takes_a_metric_by_name_or_function():
    x, codes = torch.randn(50, 3), torch.randn(6, 3)
    assert torch.equal(
        vqssl.functional.nearest_codeword(x, codes, unit), vqssl.functional.nearest_codeword(x, codes, "cosine")
    )


def test_metric_and_rule_of_ones_own_are_used_and_named():
    def counts_alone(state, counts, sums, decay, eps):
        return state._replace(cluster_size=counts)

    codebook = trained(metric=correlation, ema=counts_alone)
    codes, x = codebook.embed.clone(), torch.randn(50, 3)
    codebook.revival = NoRevival()
    out = codebook(x)
    assert torch.equal(out.indices, vqssl.functional.nearest_codeword(x, codes, correlation))
    assert torch.equal(codebook.cluster_size, torch.bincount(out.indices, minlength=6).float())
    torch.testing.assert_close(codebook.embed, codes)
    assert "metric=correlation, ema=counts_alone" in repr(codebook)


# ---- keywords of other libraries ----

BY_NAME = r"takes its sizes by name.*got 256, 512: write EMACodebook\(codebook_size=, dim=\)"


@pytest.mark.parametrize(
    ("build", "arguments", "options", "message"),
    [
        (EMACodebook, (256, 512), {}, BY_NAME),
        (EMACodebook, (256,), {"dim": 4}, "takes its sizes by name"),
        (MultiScaleQuantizer, ([3], 8, 4), {}, r"takes its sizes by name.*in_channels, codebook_size=, dim="),
        (EMACodebook, (), {"num_embeddings": 8, "embedding_dim": 4}, "'num_embeddings', .*: write codebook_size="),
        (EMACodebook, (), {"n_embed": 8, "dim": 4}, "write codebook_size="),
        (EMACodebook, (), {"codebook_size": 8, "dim": 4, "ema_decay": 0.9}, "write decay="),
        (EMACodebook, (), {"codebook_size": 8, "dim": 4, "use_cosine_sim": True}, 'write metric="cosine"'),
        (EMACodebook, (), {"codebook_size": 8, "dim": 16, "codebook_dim": 4}, "write dim="),
        (
            MultiScaleQuantizer,
            ([3],),
            {"codebook_size": 8, "dim": 4, "ema_decay": 0.9},
            "MultiScaleQuantizer has no .*decay=",
        ),
        (EMACodebook, (), {"codebook_size": 8, "dim": 4, "no_such_option": 1}, "no_such_option"),
        (EMACodebook, (), {"codebook_size": 8}, "dim"),
    ],
)
def test_positional_sizes_and_foreign_keywords_get_an_error_that_names_ours(build, arguments, options, message):
    with pytest.raises(TypeError, match=message):
        build(*arguments, **options)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_indices_of_any_integer_dtype_update_alike(dtype):
    one = trained()
    other, x = copy.deepcopy(one), torch.randn(20, 3)
    indices = one.quantize(x).indices
    vqssl.update_codebooks([one], [x], [indices])
    vqssl.update_codebooks([other], [x], [indices.to(dtype)])
    assert_same_bits(state_of(other), state_of(one))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"ema": lambda state, n, s, decay, eps: tuple(state)}, TypeError, "ema must return a CodebookState"),
        (
            {"ema": lambda state, n, s, decay, eps: state._replace(embed=s.T)},
            TypeError,
            "ema must return a CodebookState",
        ),
        ({"estimator": lambda x, q: q.sum()}, ValueError, r"estimator must return a tensor of the tokens' shape"),
        ({"estimator": lambda x, q: None}, ValueError, r"estimator must return .*got NoneType"),
        ({"metric": lambda x: x[..., :2]}, ValueError, r"metric must return a tensor of the tokens' shape"),
    ],
)
def test_policy_result_of_another_type_or_shape_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        EMACodebook(codebook_size=6, dim=3, **options)(torch.randn(9, 3))


def test_metric_keeps_the_dtype_of_tokens():
    codebook = EMACodebook(codebook_size=6, dim=3, metric=lambda x: x.float() / 1.0)
    assert codebook(torch.randn(9, 3, dtype=torch.float16)).quantized.dtype == torch.float16


def test_in_channels_given_as_a_number_is_refused():
    with pytest.raises(TypeError, match=r"in_channels must be a sequence.*write \[16\]"):
        vqssl.MultiScaleQuantizer(16, codebook_size=8, dim=4)
