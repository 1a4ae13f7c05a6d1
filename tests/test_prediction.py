"""CodePrediction against the formula a pair of views at a time, and the promises that all modules keep."""

import copy
import pickle
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from tests.laws import assert_same_bits, through_file
from tests.rank_processes import run_ranks
from vqssl import BagTarget, BatchRevival, CodePrediction, CodePredictionLoss, EMACodebook, MultiScaleQuantizer
from vqssl.code_heads import GeneratedHead, HeadSizes
from vqssl.functional import anchor_loss, bag_of_codes, code_anchor, code_cross_entropy

C, D, SIZES = 6, 4, (8, 12)
CHANNELS = (5, 7)
SHAPES = ((4, 4), (2, 3))
POOLED = ("anchor", "bag")


def quantizer(**options):
    return MultiScaleQuantizer(CHANNELS, codebook_size=SIZES, dim=D, **options)


def maps(seed, rows, channels=CHANNELS):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, c, *shape, generator=generator) for c, shape in zip(channels, SHAPES, strict=True)]


def codes(seed=0, rows=6, **options):
    return quantizer(**options)(maps(seed, rows))


def features(seed=1, rows=6):
    return torch.randn(rows, C, generator=torch.Generator().manual_seed(seed), requires_grad=True)


def make(target="bag", **options):
    torch.manual_seed(3)
    return CodePrediction(C, quantizer(), **{"target": target, "hidden_dim": 16, **options})


def slow_target(name, quantized, indices, size):
    if name == "bag":
        return bag_of_codes(indices, size)
    anchors = code_anchor(quantized.movedim(1, -1), indices)
    return anchors - anchors.mean(0)


def slow_loss(name, prediction, target):
    return code_cross_entropy(prediction, target) if name == "bag" else anchor_loss(prediction, target)


# ---- values ----


@pytest.mark.parametrize("name", POOLED)
@pytest.mark.parametrize(("views", "predicting"), [(1, 1), (2, 2), (3, 3), (2, 5)])
def test_loss_is_the_mean_over_scales_and_pairs_of_different_views(name, views, predicting):
    module, batch = make(name), 4
    f, q = features(rows=batch * predicting), codes(rows=batch * views)
    found = module(f, q, views=views)
    assert type(found) is CodePredictionLoss
    expected = []
    for scale, size in enumerate(SIZES):
        p = module.heads[scale](f).split(batch)
        t = slow_target(name, q.quantized[scale], q.indices[scale], size).split(batch)
        pairs = [(0, 0)] if views == 1 else [(v, w) for v in range(predicting) for w in range(views) if v != w]
        expected.append(sum(slow_loss(name, p[v], t[w]) for v, w in pairs) / len(pairs))
    torch.testing.assert_close(torch.stack(found.losses), torch.stack(expected))
    torch.testing.assert_close(found.total, sum(expected) / len(expected))


def test_place_predicts_the_code_of_each_place():
    module = CodePrediction(CHANNELS, quantizer(), target="place", hidden_dim=16)
    student, q = maps(5, 6), codes()
    found = module(student, q)
    for scale, size in enumerate(SIZES):
        tokens = student[scale].movedim(1, -1).reshape(-1, CHANNELS[scale])
        logits = module.heads[scale](tokens)
        torch.testing.assert_close(found.losses[scale], F.cross_entropy(logits, q.indices[scale].flatten()))
        assert logits.shape[-1] == size


def test_places_name_the_cell_of_the_other_map():
    module = CodePrediction(CHANNELS, quantizer(), target="place", hidden_dim=16).eval()
    student, q = maps(5, 6), codes()
    same = [torch.arange(shape[0] * shape[1]).view(1, *shape).expand(6, *shape) for shape in SHAPES]
    assert_same_bits(module(student, q, places=same), module(student, q))
    generator = torch.Generator().manual_seed(2)
    places = [torch.randint(-1, shape[0] * shape[1], (6, 2, 2), generator=generator) for shape in SHAPES]
    small = [m[:, :, :2, :2] for m in student]
    found = module(small, q, places=places)
    for scale in range(2):
        logits = module.heads[scale](small[scale].movedim(1, -1).flatten(0, -2)).view(6, 2, 2, -1)
        losses = [
            F.cross_entropy(logits[b, i, j], q.indices[scale][b].flatten()[places[scale][b, i, j]])
            for b in range(6)
            for i in range(2)
            for j in range(2)
            if places[scale][b, i, j] >= 0
        ]
        torch.testing.assert_close(found.losses[scale], torch.stack(losses).mean())


def test_maps_are_pooled_where_the_target_is_one_a_view():
    module = CodePrediction(CHANNELS, quantizer(), target="bag", hidden_dim=16).eval()
    student, q = maps(5, 6), codes()
    pooled = [head(m.mean((2, 3))) for head, m in zip(module.heads, student, strict=True)]
    expected = [
        code_cross_entropy(p, bag_of_codes(k, size)) for p, k, size in zip(pooled, q.indices, SIZES, strict=True)
    ]
    torch.testing.assert_close(torch.stack(module(student, q).losses), torch.stack(expected))


def test_indices_from_anywhere_are_enough_for_bags():
    q = codes()
    module = CodePrediction(C, SIZES, target="bag", hidden_dim=16).eval()
    assert_same_bits(module(features(), list(q.indices)), module(features(), q))


def test_tokens_with_channels_last_give_the_same():
    first, last = make("anchor"), make("anchor", channels_last=True)
    q = codes()
    tokens = q._replace(quantized=tuple(each.movedim(1, -1) for each in q.quantized))
    last.channels_last = True
    assert_same_bits(last(features(), tokens), first(features(), q))


@pytest.mark.parametrize("name", POOLED)
def test_masked_places_have_no_part(name):
    module = make(name).eval()
    full = maps(0, 6)
    masks = [torch.rand(6, *shape, generator=torch.Generator().manual_seed(7)) < 0.7 for shape in SHAPES]
    masks[0][0] = False  # a view without any place at one scale
    trained = quantizer()
    trained(full)
    q = trained.eval()(full, masks)
    found = module(features(), q)
    for scale, size in enumerate(SIZES):
        prediction = module.heads[scale](features())
        there = masks[scale].flatten(1).any(1)
        targets = []
        for b in range(6):
            kept = masks[scale][b]
            if name == "bag":
                targets.append(torch.bincount(q.indices[scale][b][kept], minlength=size) / max(kept.sum(), 1))
            else:
                targets.append(F.layer_norm(q.quantized[scale][b][:, kept].mean(1), (D,)))
        targets = torch.stack(targets)
        if name == "anchor":
            targets = targets - targets[there].mean(0)
        expected = slow_loss(name, prediction[there], targets[there])
        torch.testing.assert_close(found.losses[scale], expected)


# ---- options ----


@dataclass(frozen=True)
class LargestCode:
    """A target of one's own: whether the last code occurs, by squared error."""

    per_place: bool = False
    centred: bool = False

    def width(self, dim, codebook_size):
        return 1

    def of_scale(self, quantized, indices, codebook_size):
        return (indices == codebook_size - 1).flatten(1).any(1, keepdim=True).float()

    def loss(self, prediction, target):
        return F.mse_loss(prediction, target)


def test_target_and_head_may_be_ones_own():
    module = CodePrediction(C, quantizer(), target=LargestCode(), head=lambda sizes: nn.Linear(sizes.in_dim, 1))
    q, f = codes(), features()
    expected = [
        F.mse_loss(head(f), (k == size - 1).flatten(1).any(1, keepdim=True).float())
        for head, k, size in zip(module.heads, q.indices, SIZES, strict=True)
    ]
    torch.testing.assert_close(torch.stack(module(f, q).losses), torch.stack(expected))
    assert "target='LargestCode'" in repr(module)


def test_bags_of_presence_differ_from_bags_of_counts():
    q, f = codes(), features()
    assert not make(BagTarget("max"))(f, q).total.equal(make("bag")(f, q).total)


def test_generated_weights_are_a_function_of_the_codes():
    head = GeneratedHead(HeadSizes(in_dim=C, hidden_dim=16, out_dim=8, dim=D, codebook_size=8)).eval()
    f = features()
    logits = head(f)
    order = torch.randperm(8)
    head.codes.copy_(head.codes[order].clone())
    torch.testing.assert_close(head(f), logits[:, order])
    head.codes.mul_(3)  # lengths do not matter
    torch.testing.assert_close(head(f), logits[:, order])


def test_generated_heads_follow_the_codes():
    module, other = make("bag", head="generated"), quantizer()
    other(maps(0, 6))
    module.follow_(other)
    for scale, head in enumerate(module.heads):
        assert torch.equal(head.codes, other.codebook(scale).embed)
    with pytest.raises(ValueError, match=r"codebooks of \[8, 12\] codes of width 4, got \[8, 8\]"):
        module.follow_(MultiScaleQuantizer(CHANNELS, codebook_size=8, dim=D))


def reviving(**options):
    """Return a quantiser of which codes die at most steps."""
    return quantizer(decay=0.5, revival=BatchRevival(threshold=0.9), **options)


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_rows_of_revived_codes_start_again(head):
    source = reviving()
    for step in range(3):
        source(maps(step, 6))
    torch.manual_seed(3)
    module = CodePrediction(C, source, target="bag", head=head, hidden_dim=16)
    assert torch.equal(module.births, torch.cat([source.codebook(scale).births for scale in range(2)]))
    layers = [each if head == "linear" else each[-1] for each in module.heads]
    before = copy.deepcopy([(layer.weight, layer.bias) for layer in layers])
    seen = module.births.split(SIZES)
    module.follow_(source)  # nothing was born since
    assert_same_bits([(layer.weight, layer.bias) for layer in layers], before)
    source(maps(7, 6))
    born = [source.codebook(scale).births != old for scale, old in enumerate(seen)]
    assert all(each.any() and not each.all() for each in born)
    module.follow_(source)
    for layer, (weight, bias), rows in zip(layers, before, born, strict=True):
        assert (layer.weight[rows] == 0).all()
        assert (layer.bias[rows] == bias.mean()).all()
        assert torch.equal(layer.weight[~rows], weight[~rows])
        assert torch.equal(layer.bias[~rows], bias[~rows])
    after = copy.deepcopy(module.state_dict())
    module.follow_(source)
    assert_same_bits(dict(module.state_dict()), dict(after))


def test_heads_without_a_row_a_code_know_no_births():
    """Anchors have the width of the codes, generated heads compute their rows, and some heads have no linear layer."""
    source = reviving()
    modules = [
        CodePrediction(C, source, hidden_dim=16),
        CodePrediction(C, source, target="bag", head="generated", hidden_dim=16),
        CodePrediction(C, source, target="bag", head=lambda sizes: nn.Conv1d(sizes.in_dim, sizes.out_dim, 1)),
    ]
    source(maps(0, 6))
    for module in modules:
        parameters = copy.deepcopy(dict(module.named_parameters()))
        assert module.births is None
        module.follow_(source)
        assert_same_bits(dict(module.named_parameters()), parameters)
    by_sizes = CodePrediction(C, SIZES, target="bag", hidden_dim=16)
    by_sizes.follow_(source)
    assert torch.equal(by_sizes.births, torch.cat([source.codebook(scale).births for scale in range(2)]))


class BagTraining(nn.Module):
    """A quantiser whose codes die and the heads that predict its bags."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.quantizer = reviving()
        self.prediction = CodePrediction(C, self.quantizer, target="bag", head="linear")

    def forward(self, f, m):
        return self.prediction(f, self.quantizer(m), views=2).total


def train_bags(module, optimizer, steps, part=slice(None), world_size=1):
    """Train, with gradients averaged over ranks; return how many rows started again."""
    restarted = 0
    inner = getattr(module, "_orig_mod", module)
    for step in steps:
        optimizer.zero_grad()
        loss = module(features(step, 8).detach()[part], [each[part] for each in maps(step, 8)])
        loss.backward()
        for parameter in inner.parameters() if world_size > 1 else ():
            dist.all_reduce(parameter.grad)
            parameter.grad /= world_size
        optimizer.step()
        before = inner.prediction.births.clone()
        inner.prediction.follow_(inner.quantizer)
        restarted += int((inner.prediction.births != before).sum())
    return restarted


def test_training_with_births_resumes_to_the_bit():
    whole, halves = BagTraining(), BagTraining()
    optimizers = [torch.optim.AdamW(each.parameters(), lr=0.01) for each in (whole, halves)]
    assert train_bags(whole, optimizers[0], range(6)) > 0
    train_bags(halves, optimizers[1], range(3))
    again = BagTraining()
    optimizer = torch.optim.AdamW(again.parameters(), lr=0.01)
    again.load_state_dict(through_file(halves.state_dict()))
    optimizer.load_state_dict(through_file(optimizers[1].state_dict()))
    train_bags(again, optimizer, range(3, 6))
    assert_same_bits(dict(again.state_dict()), dict(whole.state_dict()))


@pytest.mark.thorough
def test_births_are_those_of_a_compiled_step():
    eager, compiled = BagTraining(), BagTraining()
    for each in (eager, compiled):
        each.quantizer(maps(9, 8))  # the first codes are drawn outside of graphs
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.01) for each in (eager, compiled)]
    graph = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    restarted = [train_bags(*each, range(4)) for each in zip((eager, graph), optimizers, strict=True)]
    assert restarted[0] == restarted[1] > 0
    assert_same_bits(compiled.prediction.births, eager.prediction.births)
    torch.testing.assert_close(dict(compiled.state_dict()), dict(eager.state_dict()))


def train_bags_on_rank(rank, address, folder):
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    module = BagTraining()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    part = [0, 1, 4, 5] if rank == 0 else [2, 3, 6, 7]  # halves of both views
    restarted = train_bags(module, optimizer, range(4), part, world_size=2)
    torch.save((restarted, module.state_dict()), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_start_the_same_rows_again(tmp_path):
    run_ranks(train_bags_on_rank, (f"file://{tmp_path}/meet", str(tmp_path)))
    (restarted, first), (_, second) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert restarted > 0
    assert_same_bits(dict(first), dict(second))


# ---- promises ----


@pytest.mark.parametrize(
    ("name", "head"),
    [("anchor", "mlp"), ("anchor", "linear"), ("bag", "mlp"), ("bag", "linear"), ("bag", "generated")],
)
def test_gradient_reaches_features_and_heads_only(name, head):
    module = make(name, head=head)
    student = features()
    teacher = [m.requires_grad_() for m in maps(0, 6)]
    q = quantizer(commitment_weight=1.0)(teacher)
    module(student, q, views=2).total.backward()
    assert student.grad.abs().sum() > 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
    assert all(m.grad is None for m in teacher)


@pytest.mark.parametrize("name", POOLED)
def test_eval_and_prediction_change_nothing_and_copies_agree(name):
    module = make(name, centring="running")
    module(features(), codes())
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert_same_bits(copied(features(2), codes(2)), copy.deepcopy(module)(features(2), codes(2)))
    fresh = make(name, centring="running")
    fresh.load_state_dict(through_file(module.state_dict()))
    module.eval()
    before = copy.deepcopy(module.state_dict())
    assert_same_bits(fresh.eval()(features(2), codes(2)), module(features(2), codes(2)))
    assert_same_bits(dict(module.state_dict()), dict(before))


@pytest.mark.thorough
@pytest.mark.parametrize("name", POOLED)
def test_compiles_to_one_graph_and_exports(name):
    module = make(name)
    compiled = torch.compile(copy.deepcopy(module), fullgraph=True, backend="aot_eager")
    q = codes()
    found, expected = compiled(features(), q, views=2), module(features(), q, views=2)
    assert type(found) is CodePredictionLoss
    torch.testing.assert_close(found, expected)
    module.eval()
    program = torch.export.export(module, (features().detach(), q))
    torch.testing.assert_close(program.module()(features().detach(), q), module(features(), q))


@pytest.mark.parametrize("name", POOLED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_the_loss_in_float32_and_close(name, dtype):
    module, q = make(name), codes()
    expected = copy.deepcopy(module)(features(), q).total
    with torch.autocast("cpu", dtype):
        found = module(features(), q).total
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0)


def test_accumulated_micro_batches_equal_the_whole_batch():
    """Bags have no statistics of the batch, and the head here has none either."""
    q, f = codes(), features()
    whole, parts = make("bag", head="linear"), make("bag", head="linear")
    whole(f, q).total.backward()
    for half in (slice(0, 3), slice(3, 6)):
        indices = [k[half] for k in q.indices]
        (parts(features()[half], indices).total / 2).backward()
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("name", POOLED)
@pytest.mark.parametrize("views", [1, 2])
def test_batch_without_images_has_zero_loss_and_a_gradient_of_zeros(name, views):
    module, student = make(name, head="linear"), features(rows=0)
    loss = module(student, codes(rows=0), views=views).total
    loss.backward()
    assert loss.item() == 0
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in module.parameters())


def train_on_rank(rank, address, folder):
    batches = [codes(step) for step in range(4)]  # before the ranks meet: a quantiser in training would use both
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    torch.save(run(batches, rank), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def run(batches, rank=None):
    """Return losses and centre of four steps: of uneven halves of the batch on two ranks, or of the whole."""
    module = make("anchor", head="linear", centring="running")
    split = {None: slice(0, 6), 0: slice(0, 2), 1: slice(2, 6)}[rank]
    found = []
    for step, q in enumerate(batches):
        part = q._replace(quantized=tuple(t[split] for t in q.quantized), indices=tuple(k[split] for k in q.indices))
        found.append(torch.stack(module(features(step)[split], part).losses).detach())
    return torch.stack(found), module.centring.centre


def test_two_ranks_centre_on_the_mean_of_both(tmp_path):
    run_ranks(train_on_rank, (f"file://{tmp_path}/meet", str(tmp_path)))
    (first, centre), (second, other) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    losses, expected = run([codes(step) for step in range(4)])
    assert_same_bits(centre, other)
    torch.testing.assert_close(centre, expected)
    torch.testing.assert_close((2 * first + 4 * second) / 6, losses)


# ---- errors ----


def z(*shape):
    return torch.ones(shape)


@pytest.mark.parametrize(
    ("error", "says", "call"),
    [
        (ValueError, "target must be one of 'anchor', 'bag', 'place'", lambda: CodePrediction(4, [8], target="code")),  # type: ignore[arg-type]
        (
            TypeError,
            "target must be an object, got the class BagTarget",
            lambda: CodePrediction(4, [8], target=BagTarget),  # type: ignore[arg-type]
        ),
        (ValueError, "head must be one of", lambda: CodePrediction(4, [8], target="bag", head="deep")),  # type: ignore[arg-type]
        (ValueError, "'batch' or 'running'", lambda: CodePrediction(4, [8], dim=2, centring="mean")),  # type: ignore[arg-type]
        (ValueError, "dim must say how wide", lambda: CodePrediction(4, [8])),
        (ValueError, "dim must say how wide", lambda: CodePrediction(4, [8], target="bag", head="generated")),
        (ValueError, "write target='bag'", lambda: CodePrediction(4, [8], dim=2, head="generated")),
        (TypeError, r"got 8: write \[K\]", lambda: CodePrediction(4, 8, target="bag")),  # type: ignore[arg-type]
        (TypeError, r"got Linear: write \[K\]", lambda: CodePrediction(4, nn.Linear(2, 2), target="bag")),  # type: ignore[arg-type]
        (ValueError, "at least one scale", lambda: CodePrediction(4, [], target="bag")),
        (
            ValueError,
            "each of the quantiser's 2 scales, got \\[3\\]",
            lambda: CodePrediction([3], [8, 8], target="bag"),
        ),
        (ValueError, "one width a scale for a target of places", lambda: CodePrediction(4, [8], target="place")),
        (ValueError, "hidden_dim must be at least 1", lambda: CodePrediction(4, [8], target="bag", hidden_dim=0)),
    ],
)
def test_wrong_options_are_refused(error, says, call):
    with pytest.raises(error, match=says):
        call()


INDICES = torch.zeros(2, 3, dtype=torch.int64)


def codebook_alone():
    return EMACodebook(codebook_size=8, dim=4)


def quantized_alone():
    return codebook_alone().quantize(z(2, 3, 4))


@pytest.mark.parametrize(
    ("error", "says", "options", "call"),
    [
        (TypeError, "the first", {}, lambda m: m([z(2, 4)], [INDICES])),
        (ValueError, "pool maps first", {}, lambda m: m(z(2, 4, 3, 3), [INDICES])),
        (ValueError, "C = 4", {}, lambda m: m(z(2, 5), [INDICES])),
        (ValueError, "one entry for each of the 1 scales", {}, lambda m: m(z(2, 4), [INDICES, INDICES])),
        (TypeError, "one entry for each of the 1 scales", {}, lambda m: m(z(2, 4), INDICES)),
        (TypeError, "integer tensor", {}, lambda m: m(z(2, 4), [z(2, 3)])),
        (ValueError, "from -1 .* to 7", {}, lambda m: m(z(2, 4), [INDICES + 8])),
        (ValueError, "one row for each row of the codes, 2, got 3", {}, lambda m: m(z(3, 4), [INDICES])),
        (
            ValueError,
            "one row for each row of the codes, 4, .*got 2",
            {},
            lambda m: m(z(2, 4), [torch.cat([INDICES] * 2)], views=2),
        ),
        (ValueError, "3 views of equally many images, got 2 rows", {}, lambda m: m(z(2, 4), [INDICES], views=3)),
        (ValueError, "views must be at least 1", {}, lambda m: m(z(2, 4), [INDICES], views=0)),
        (TypeError, "must hold the codes", {"target": "anchor", "dim": 2}, lambda m: m(z(2, 4), [INDICES])),
        (TypeError, "one tensor a scale, got Quantized of a single", {}, lambda m: m(z(2, 4), quantized_alone())),
        (TypeError, "got Quantized: give its .indices", {}, lambda m: m(z(2, 4), [quantized_alone()])),
        (
            TypeError,
            "must be the MultiScaleQuantizer whose codes are predicted, got EMACodebook",
            {},
            lambda m: m.follow_(codebook_alone()),
        ),
        (ValueError, "only for a target of places", {}, lambda m: m(z(2, 4), [INDICES], places=[INDICES])),
    ],
)
def test_wrong_input_is_refused_and_changes_nothing(error, says, options, call):
    module = CodePrediction(4, [8], **{"target": "bag", "centring": "running", **options})
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(error, match=says):
        call(module)
    assert_same_bits(dict(module.state_dict()), dict(before))


@pytest.mark.parametrize(
    ("error", "says", "places"),
    [
        (
            ValueError,
            r"one entry for each cell of features\[0\], \(6, 4, 4\), got \(6, 2, 2\)",
            [z(6, 2, 2).long()] * 2,
        ),
        (ValueError, r"features\[0\], \(6, 4, 4\), got \(5, 4, 4\)", [z(5, 4, 4).long()] * 2),
        (TypeError, "integer tensor", [z(6, 4, 4)] * 2),
        (ValueError, "one entry for each of the 2 scales", [z(6, 4, 4).long()]),
    ],
)
def test_wrong_places_are_refused(error, says, places):
    module = CodePrediction(CHANNELS, quantizer(), target="place")
    with pytest.raises(error, match=says):
        module(maps(5, 6), codes(), places=places)


def test_maps_of_another_size_need_places():
    module = CodePrediction(CHANNELS, quantizer(), target="place")
    with pytest.raises(ValueError, match=r"give places from vqssl\.functional\.matched_cells"):
        module([m[:, :, :2, :2] for m in maps(5, 6)], codes())


@pytest.mark.parametrize("target", ["anchor", "bag"])
def test_codes_of_a_larger_codebook_are_refused(target):
    module = CodePrediction(C, quantizer(), target=target, centring="running")
    larger = MultiScaleQuantizer(CHANNELS, codebook_size=(8, 64), dim=D)(maps(0, 6))
    assert larger.indices[1].max() >= 12  # else nothing says so
    before = copy.deepcopy(module.state_dict())
    for call in (lambda: module(features(), larger), lambda: module.targets(larger)):
        with pytest.raises(ValueError, match=r"quantized.indices\[1\] must be from -1 \(masked\) to 11 "):
            call()
    assert_same_bits(dict(module.state_dict()), dict(before))


def test_codes_of_other_scales_are_refused():
    with pytest.raises(ValueError, match="one entry for each of the 1 scales"):
        CodePrediction(C, [8], target="bag")(features(), codes())


def test_backward_of_the_loss_tuple_names_total():
    loss = make()(features(), codes())
    with pytest.raises(AttributeError, match=r"write .total.backward\(\)"):
        loss.backward()


@pytest.mark.parametrize(("target", "head"), [("anchor", "mlp"), ("bag", "linear"), ("bag", "generated")])
def test_runs_on_the_meta_device(target, head):
    with torch.device("meta"):
        there = MultiScaleQuantizer(CHANNELS, codebook_size=8, dim=D)
        module = CodePrediction(C, there, target=target, head=head)
        loss = module(torch.randn(6, C), there([torch.randn(m.shape) for m in maps(5, 6)]), views=2)
    assert loss.total.is_meta
    module.follow_(there)
    # Built elsewhere than the quantiser, of which no value is read.
    elsewhere = CodePrediction(C, there, target=target, head=head)
    assert not any(parameter.is_meta for parameter in elsewhere.parameters())
