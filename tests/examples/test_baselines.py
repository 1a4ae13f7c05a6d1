"""The paper's comparison systems: each learns, its gradient reaches what it should, and its special part is a law."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import tyro
from torch.nn import functional as F

from examples.pretrain.encoder import Encoder
from examples.pretrain.methods import METHODS, title_of
from examples.pretrain.methods.adversary import adversary_loss, judgement
from examples.pretrain.methods.released_lengths import released_lengths
from examples.pretrain.methods.transport import transport_plan
from examples.pretrain.optimization import Optimization
from examples.pretrain.phantoms import make_phantoms
from examples.pretrain.presets import PRESETS
from examples.pretrain.train import Run
from tests.examples.tiny import ENCODER, OPTIONS, pretraining, tiny_method
from tests.laws import assert_same_bits
from tests.profiles import few
from tests.rank_processes import run_ranks

BASELINES = ["coboom", "dino", "pcrlv2", "dira", "transvw", "mlvicx", "adamv2", "otcxr"]
TEACHERS = ["coboom", "dino", "dira", "adamv2"]


def noise(count=2, batch=8, side=32):
    return [torch.randn(batch, 1, side, side) for _ in range(count)]


def views_for(method, batch=8):
    """Return what the trainer would give a method: two views, and local crops where it takes some."""
    local = getattr(getattr(method, "options", None), "local_crops", 0)
    return noise(2, batch) + noise(local, batch, side=16)


def changed(name, **changes):
    return tiny_method(name, replace(OPTIONS[name], **changes))


def reached(method):
    gradients = {name: parameter.grad for name, parameter in method.named_parameters()}
    return {name for name, gradient in gradients.items() if gradient is not None and gradient.any()}


# ---- every method ----


@pytest.fixture(scope="module")
def phantoms():
    return make_phantoms(64, 32, seed=0)


@pytest.mark.parametrize("name", few(BASELINES))
def test_the_loss_falls_on_64_phantoms(name, phantoms, tmp_path):
    short = Optimization("adamw", lr=3e-3, weight_decay=1e-4, batch_size=32, epochs=4, warmup_epochs=1)
    run = Run(phantoms, pretraining(name, short), tmp_path)
    run.train(quiet=True)
    losses = [row["loss"] for row in run.rows]
    assert min(losses[-2:]) < losses[0] - 0.03 * abs(losses[0])


@pytest.mark.thorough
@pytest.mark.parametrize("name", BASELINES)
def test_a_run_continues_to_the_bit(name, phantoms, tmp_path):
    """Draws, running means, queues and words come back with the checkpoint, or follow from images and seed."""
    two = Optimization("adamw", lr=1e-3, batch_size=16, epochs=2, warmup_epochs=0)
    whole, halves = (Run(phantoms, pretraining(name, two), tmp_path / part) for part in ("whole", "halves"))
    whole.train(quiet=True)
    halves.train(quiet=True, until=1)
    again = Run(phantoms, pretraining(name, two), tmp_path / "halves")
    assert again.resume()
    again.train(quiet=True)
    ours, theirs = whole.method.state_dict(), again.method.state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


def train_on_rank(rank, address, folder):
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    data = make_phantoms(32, 32, seed=0)
    for name in BASELINES:
        run = Run(data, pretraining(name, Optimization("adamw", lr=1e-3, batch_size=16, epochs=1)), folder / name)
        run.train(quiet=True)
        torch.save(run.method.state_dict(), folder / f"{name}-{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.thorough
def test_two_ranks_train_the_same_method(tmp_path):
    """Weights, teachers, codes, running means and queues are equal after two steps."""
    run_ranks(train_on_rank, (f"file://{tmp_path}/meet", tmp_path))
    for name in BASELINES:
        first, second = (torch.load(tmp_path / f"{name}-{rank}.pt") for rank in range(2))
        assert_same_bits(dict(first), dict(second))


@pytest.mark.parametrize("name", BASELINES)
def test_gradient_reaches_all_of_the_student_and_nothing_else(name):
    method = tiny_method(name, total_steps=20)
    for _ in range(12 if name == "pcrlv2" else 3):  # PCRLv2 draws one scale a step
        method(views_for(method)).loss.backward()
        method.after_step()
    trained = {name for name, parameter in method.named_parameters() if parameter.requires_grad}
    found = reached(method)
    assert {name for name in trained if "encoder" in name} <= found
    # A bias before a BatchNorm or under a softmax has a gradient of 0, up to rounding.
    assert {name for name in trained - found if not name.endswith("bias")} == set()
    assert not any("teacher" in name for name in found)


@pytest.mark.parametrize("name", TEACHERS)
def test_the_teacher_follows_the_student(name):
    method = tiny_method(name)
    teacher = method.byol.teacher if name == "coboom" else method.teacher
    before = teacher.module.encoder.resnet.conv1.weight.clone()
    with torch.no_grad():
        method.encoder.resnet.conv1.weight.add_(1.0)
    method.after_step()
    torch.testing.assert_close(teacher.module.encoder.resnet.conv1.weight, before + (1 - 0.9))


@pytest.mark.parametrize("name", BASELINES)
def test_option_that_a_method_does_not_have_is_refused(name, capsys):
    with pytest.raises(SystemExit):
        tyro.extras.overridable_config_cli(PRESETS, args=["small", f"--{name}.nonsense", "3"])
    assert f"--{name}.nonsense" in capsys.readouterr().err
    with pytest.raises(TypeError, match="nonsense"):
        METHODS[name].Options(nonsense=3)


def test_simplified_methods_say_so_in_their_name():
    titles = {name: title_of(name) for name in METHODS}
    assert titles["dino"] == "DINOv2-style"
    assert titles["otcxr"] == "OTCXR-like"
    assert titles["transvw"] == "TransVW (2-D, PCA)"
    assert titles["dira"] == "DiRA"
    assert title_of("dira", replace(OPTIONS["dira"], adversary_weight=0.0)) == "DiR"
    assert len(set(titles.values())) == len(titles)


# ---- CoBooM ----


def test_coboom_is_a_quarter_of_four_cosines():
    method = tiny_method("coboom")
    views = noise()
    twin = copy.deepcopy(method)
    step = method(views)
    images = torch.cat(views)
    p = twin.byol.student(images).prediction
    z = twin.byol.teacher(images).embedding
    cells = twin.last_map(images).flatten(2).mT
    codes = twin.codebook(cells).quantized
    fused = twin.fuse(twin.attention(codes, cells, cells)[0].mean(1))
    terms = [
        2 - 2 * F.cosine_similarity(p[a : a + 8], target[b : b + 8]).mean()
        for a, b in ((0, 8), (8, 0))
        for target in (z, fused)
    ]
    torch.testing.assert_close(step.loss - step.parts["commitment"], torch.stack(terms).mean())


def test_coboom_trains_its_second_target():
    method = tiny_method("coboom")
    method(noise()).parts["alignment_fused"].backward()
    found = reached(method)
    assert any(name.startswith("fuse") for name in found)
    assert any(name.startswith("attention") for name in found)
    assert not any(name.startswith(("codebook", "byol.teacher")) for name in found)


def test_released_codes_are_tiny():
    """Sums of indices, where counts belong: the codes come out hundreds of times too short."""
    method = changed("coboom", released_ema=True, codebook_size=64)
    for _ in range(20):
        method(noise())
    indices = method.codebook(method.last_map(noise()[0]).movedim(1, -1)).indices
    assert released_lengths(method.codebook, method.index_sum, indices).max() < 0.05
    torch.testing.assert_close(method.codebook.embed.norm(dim=1), torch.ones(64))


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match=r"--coboom\.heads must divide .* 64, got 5"):
        changed("coboom", heads=5)


# ---- DINOv2-style and Adam-v2 ----


def test_without_hidden_cells_dino_sees_whole_images():
    method = changed("dino", hidden=(0.0, 0.0))
    step = method(views_for(method))
    assert step.parts["cells"] == 0
    hidden = changed("dino", hidden=(0.5, 0.5)).draw_hidden(torch.Size((400, 4, 4)), torch.device("cpu"))
    assert abs(hidden.any((1, 2)).float().mean() - 0.5) < 0.1
    assert abs(hidden[hidden.any((1, 2))].float().mean() - 0.5) < 0.05


def test_dinos_hidden_pixel_is_learnt_and_replaces_hidden_cells():
    method = changed("dino", hidden=(1.0, 1.0), momentum=1.0)
    method(views_for(method)).loss.backward()
    assert method.hidden_pixel.grad.abs().sum() > 0


def test_localisability_is_alone_at_first():
    torch.manual_seed(0)
    method = changed("adamv2", alone=0.5)
    first = method(views_for(method))
    torch.testing.assert_close(first.loss, first.parts["localise"])
    method.teacher.step = 5  # of 10
    later = method(views_for(method))
    torch.testing.assert_close(later.loss, later.parts["localise"] + later.parts["compose"] + later.parts["decompose"])


def test_quarters_are_those_of_each_view():
    """With heads that pass features on, composing and decomposing compare the four quarters in reading order."""
    method = tiny_method("adamv2")
    seen = []
    method.student.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    views = noise()
    method(views)
    quarters = next(each for each in seen if len(each) == 4 * 16)
    whole = torch.cat(views)
    assert torch.equal(quarters[5], whole[1, :, :16, 16:])
    assert torch.equal(quarters[6], whole[1, :, 16:, :16])


# ---- PCRLv2, DiRA, TransVW: restoration ----


def test_pcrlv2_has_five_scales_with_the_usual_stem_and_no_skips():
    encoder = Encoder(1, replace(ENCODER, stem_stride=4))
    method = METHODS["pcrlv2"](encoder, OPTIONS["pcrlv2"], total_steps=10, seed=0)
    assert len(method.projectors) == 5
    pyramid = encoder.pyramid(torch.randn(2, 1, 64, 64))
    others = [torch.randn_like(each) for each in pyramid[:-1]]
    method.eval()
    assert torch.equal(method.decoder(pyramid, (64, 64)), method.decoder([*others, pyramid[-1]], (64, 64)))


def test_restoration_at_a_scale_loses_its_weight_over_the_run():
    method = tiny_method("pcrlv2")
    views = views_for(method)
    for done, weight in ((0, 1.0), (5, 0.5), (10, 0.0), (12, 0.0)):
        method.steps_done.fill_(done)
        step = method(views)
        parts = step.parts
        expected = parts["cosine"] + parts["restoration"] + weight * parts["restoration_scale"]
        torch.testing.assert_close(step.loss, expected)


def test_adversary_learns_from_its_own_loss_alone():
    method = tiny_method("dira")
    restored, real = torch.randn(4, 1, 32, 32, requires_grad=True), torch.randn(4, 1, 32, 32)
    judgement(method.adversary, restored).backward()
    assert restored.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in method.adversary.parameters())
    restored.grad = None
    adversary_loss(method.adversary, restored, real).backward()
    assert restored.grad is None
    assert all(parameter.grad is not None for parameter in method.adversary.parameters())


def test_adversary_counts_after_the_warm_up_and_not_without_a_weight():
    method = changed("dira", warmup=0.5, adversary_weight=1.0)
    for step, counts in ((0, 0), (5, 1)):
        method.teacher.step = step
        found = method(noise())
        parts = found.parts
        expected = parts["contrast"] + 10 * parts["restoration"] + counts * parts["judged"] + parts["adversary"]
        torch.testing.assert_close(found.loss, expected)
    without = changed("dira", adversary_weight=0.0)
    assert without.adversary is None
    assert list(without(noise()).parts) == ["contrast", "restoration"]


def test_words_are_places_and_their_most_alike_images():
    """Ten kinds of images, differing in brightness: the members of a word are of the kind of its anchor."""
    kinds = torch.arange(40) % 4
    images = (kinds / 4)[:, None, None, None] + 0.01 * torch.rand(40, 1, 32, 32)
    method = changed("transvw", words=4, members=10)
    method.prepare(images)
    assert all(len(set(kinds[members].tolist())) == 1 for members in method.members)
    again = changed("transvw", words=4, members=10)
    again.prepare(images)
    assert torch.equal(method.members, again.members)
    assert torch.equal(method.places, again.places)
    [patches] = method.views(images[:8], lambda batch: batch)
    # Row i shows word i mod 4: its brightness is that of the word's members.
    expected = images[method.members[:, 0]].mean((1, 2, 3)).repeat(2)
    torch.testing.assert_close(patches.mean((1, 2, 3)), expected, atol=0.01, rtol=0)


def test_patch_is_the_word_at_its_place():
    rows = torch.linspace(0, 1, 64)[:, None].expand(64, 64)
    images = torch.stack([rows, rows.T])[:, None]  # brightness is the row, or the column
    method = changed("transvw", words=2, members=1, sides=(0.25,))
    method.prepare(images)
    [patches] = method.views(images.repeat(4, 1, 1, 1), lambda batch: batch)
    for row, patch in enumerate(patches):
        word = row % 2
        which = int(method.members[word, 0])
        x, y = method.places[word].tolist()
        assert patch.mean().item() == pytest.approx((y, x)[which], abs=0.02)
        assert (patch.max() - patch.min()).item() == pytest.approx(0.25, abs=0.03)


def test_batch_smaller_than_the_words_is_refused():
    with pytest.raises(ValueError, match=r"--transvw\.words must be at most the batch of a rank, 8, got 9"):
        changed("transvw", words=9)(noise(1))


# ---- MLVICX and OTCXR ----


@pytest.mark.parametrize(("stride", "count"), [(4, 5), (2, 4)])
def test_mlvicx_has_a_side_branch_at_every_stage(stride, count):
    method = tiny_method("mlvicx", encoder=replace(ENCODER, stem_stride=stride))
    assert len(method.sides) == count
    side, features = method.sides[0], torch.randn(3, 8, 4, 4)
    cells = side.map(features).flatten(2)
    weights = torch.softmax(side.score(side.map(features)).flatten(2), -1)
    expected = torch.stack([(cells[i] * weights[i]).sum(-1) for i in range(3)])
    torch.testing.assert_close(side(features), expected)


def test_mlvicx_leaves_its_maps_as_drawn_unless_told():
    assert not any(side.map.weight.requires_grad for side in tiny_method("mlvicx").sides)
    assert all(side.map.weight.requires_grad for side in changed("mlvicx", train_maps=True).sides)


def test_transport_plan_is_the_slow_sinkhorn():
    """In float64 and without logarithms; rows and columns have equal sums."""
    cost = torch.rand(3, 5, 7)
    plan = transport_plan(cost, strength=0.2, iterations=400)
    for each, found in zip(cost.double().numpy(), plan.numpy(), strict=True):
        kernel = np.exp(-each / 0.2)
        u, v = np.ones(5), np.ones(7)
        for _ in range(400):
            u = 1 / 5 / (kernel @ v)
            v = 1 / 7 / (kernel.T @ u)
        np.testing.assert_allclose(found, u[:, None] * kernel * v, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(plan.sum(1), torch.full((3, 7), 1 / 7))
    torch.testing.assert_close(plan.sum(2), torch.full((3, 5), 1 / 5), rtol=1e-3, atol=1e-5)


def test_transport_of_shuffled_cells_costs_nothing():
    method = tiny_method("otcxr")
    cells = F.one_hot(torch.arange(6), 8).float().expand(2, 6, 8)
    assert method.transport(cells, cells[:, torch.randperm(6)]).item() == pytest.approx(0, abs=1e-4)
    other = -cells
    assert method.transport(cells, other).item() > 0.9


def test_otcxr_is_the_slow_formula():
    method = tiny_method("otcxr")
    views = noise()
    cells = [copy.deepcopy(method).embed(view).detach().double().numpy() for view in views]
    unit = [each / np.linalg.norm(each, axis=-1, keepdims=True) for each in cells]
    cost = 1 - unit[0] @ unit[1].transpose(0, 2, 1)
    plan = transport_plan(torch.from_numpy(cost)).numpy()
    transport = (plan * cost).sum((1, 2)).mean()
    means = [each.mean(1) for each in cells]
    variance = np.mean([np.maximum(0, 1 - np.sqrt(m.var(0, ddof=1) + 1e-4)).mean() for m in means])
    covariances = [np.cov(m.T) for m in means]
    covariance = sum((c**2).sum() - (np.diag(c) ** 2).sum() for c in covariances) / 8
    found = method(views).loss.item()
    assert found == pytest.approx(25 * transport + 25 * variance + covariance, rel=1e-4)
    assert math.isfinite(found)
