"""The contract that all methods keep, and laws of each: DiSSECT is BYOL plus a target, SimSiam its formula."""

import copy
import inspect
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import vqssl
from examples.pretrain.augment import Augmentation, views_of
from examples.pretrain.encoder import Encoder, EncoderOptions
from examples.pretrain.methods import METHODS, default_options
from examples.pretrain.methods.dissect_options import DiSSECTOptions
from examples.pretrain.methods.simsiam import SimSiamOptions
from examples.pretrain.methods.soft_codes import SoftCodes
from examples.pretrain.phantoms import make_phantoms
from examples.pretrain.train import Run
from tests.examples.tiny import BYOL, DISSECT, ENCODER, OPTIONS, pretraining, tiny_method
from tests.laws import assert_same_bits
from tests.profiles import few


def views_of_noise(count=2, batch=8):
    return [torch.randn(batch, 1, 32, 32) for _ in range(count)]


def drawn_views(method, count=2):
    """Return noise, or what a method draws itself that needs to know the places of its crops."""
    if hasattr(method, "matrices"):
        return method.views(torch.rand(8, 1, 32, 32), views_of(32, Augmentation()))
    return views_of_noise(count)


def test_a_resnet18_has_the_papers_maps():
    encoder = Encoder(1, EncoderOptions()).eval()
    with torch.no_grad():
        features, maps = encoder(torch.zeros(1, 1, 224, 224))
    assert features.shape == (1, 512)
    assert [tuple(m.shape) for m in maps] == [(1, 128, 28, 28), (1, 256, 14, 14), (1, 512, 7, 7)]


# ---- every method ----


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_a_file_of_at_most_120_lines(name):
    source = inspect.getsource(inspect.getmodule(METHODS[name]))
    assert len(source.splitlines()) <= 120


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("views", few([2, 3]))
def test_every_method_keeps_the_contract(name, views):
    method = tiny_method(name)
    step = method(drawn_views(method, views))
    assert step.loss.shape == ()
    assert torch.isfinite(step.loss)
    assert all(part.shape == () for part in step.parts.values())
    step.loss.backward()
    assert method.encoder.resnet.conv1.weight.grad.abs().sum() > 0
    method.after_step()
    assert list(method(drawn_views(method, views)).parts) == list(step.parts)
    assert all(isinstance(value, float | int) for value in method.figures().values())
    assert method.exports()["encoder"] is method.encoder
    assert isinstance(default_options()[name], METHODS[name].Options)


@pytest.mark.parametrize("name", ["byol", "dissect", "dissect_codes", "dissect_places"])
def test_the_teacher_gets_no_gradient_and_follows_after_a_step(name):
    method = tiny_method(name)
    byol = method if name == "byol" else method.byol
    method(drawn_views(method)).loss.backward()
    assert all(parameter.grad is None for parameter in byol.teacher.parameters())
    before = byol.teacher.module.projector[0].weight.clone()
    with torch.no_grad():
        byol.student.embedder.projector[0].weight.add_(1.0)
    method.after_step()
    torch.testing.assert_close(byol.teacher.module.projector[0].weight, before + (1 - 0.9))
    assert method.figures()["teacher_momentum"] > 0.9


# ---- DiSSECT ----


@pytest.mark.parametrize(("weights", "same"), few([((1.0, 0.0), True), ((0.5, 0.5), False)]))
def test_the_student_is_byols_without_weight_on_the_refined_target(tmp_path, weights, same):
    """The quantised branch takes no gradient into the student and draws nothing from its generators."""
    phantoms = make_phantoms(48, 32, seed=0)
    states = []
    for config in (pretraining("byol"), pretraining("dissect", target_weights=weights)):
        run = Run(phantoms, config, tmp_path / config.method)
        run.train(until=1, quiet=True)
        states.append((run.method if config.method == "byol" else run.method.byol).student.state_dict())
    if same:
        assert_same_bits(*states)
    else:
        name = "embedder.encoder.resnet.conv1.weight"
        assert not torch.equal(states[0][name], states[1][name])


@pytest.mark.parametrize(
    "options",
    [
        replace(DISSECT, operator="channel", refinement="align", projection="learned"),
        replace(DISSECT, ema="batch_mean", metric="cosine"),
        replace(DISSECT, shared_codebook=True, byol=replace(BYOL, buffers="own")),
    ],
    ids=["align-learned", "eq-1-cosine", "shared-own"],
)
def test_options_of_dissect_combine(options):
    method = tiny_method("dissect", options)
    step = method(views_of_noise())
    step.loss.backward()
    assert torch.isfinite(step.loss)
    assert method.encoder.resnet.conv1.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("source", ["teacher", "student"])
def test_codes_are_those_of_the_quantised_maps(source):
    method = tiny_method("dissect", replace(DISSECT, quantize=source))
    method(views_of_noise())
    method.eval()
    images = torch.randn(3, 1, 32, 32)
    encoder = method.encoder if source == "student" else method.byol.teacher.module.encoder
    assert method.target_encoder is encoder
    expected = method.quantizer(encoder(images)[1]).indices
    assert_same_bits(method.codes(images), dict(zip(ENCODER.scales, expected, strict=True)))


# ---- DiSSECT with code prediction ----


def codes_method(**changes):
    return tiny_method("dissect_codes", replace(OPTIONS["dissect_codes"], **changes))


@pytest.mark.parametrize(
    ("target", "control"),
    [
        ("anchor", "none"),
        ("anchor", "maps"),
        ("anchor", "product"),
        ("anchor", "shuffled"),
        ("bag", "none"),
        ("bag", "shuffled"),
        ("soft-bag", "none"),
    ],
)
def test_loss_is_byols_and_that_of_the_codes(target, control):
    method = codes_method(control=control, target=target, code_weight=0.25)
    views = views_of_noise()
    byol = copy.deepcopy(method.byol)(views)
    step = method(views)
    codes = torch.stack([step.parts[f"code_{scale}"] for scale in ENCODER.scales]).mean()
    torch.testing.assert_close(step.loss, byol.loss + 0.25 * codes)


def test_code_prediction_trains_heads_and_encoder_but_no_teacher_or_codes():
    method = codes_method(code_weight=1.0)
    step = method(views_of_noise())
    (step.loss - step.parts["alignment_global"]).backward()
    reached = {
        name for name, parameter in method.named_parameters() if parameter.grad is not None and parameter.grad.any()
    }
    assert any(name.startswith("prediction.heads") for name in reached)
    assert any(name.startswith("byol.student.embedder.encoder") for name in reached)
    assert not any(part in name for name in reached for part in ("teacher", "projector", "predictor", "quantizer"))


def test_shuffled_codes_are_those_of_the_next_image():
    """With equal images, shuffling changes nothing; with others it does."""
    for views, same in (([torch.randn(1, 1, 32, 32).expand(8, -1, -1, -1)] * 2, True), (views_of_noise(), False)):
        plain, shuffled = codes_method(target="bag"), codes_method(target="bag", control="shuffled")
        shuffled.load_state_dict(plain.state_dict())
        a, b = plain(views).parts["code_layer2"], shuffled(views).parts["code_layer2"]
        assert torch.allclose(a, b) == same


def test_code_prediction_quantises_the_students_maps_where_it_is_told_to():
    method = codes_method(dissect=replace(DISSECT, quantize="student"))
    assert method.target_encoder is method.encoder
    views = views_of_noise()
    encoder = copy.deepcopy(method.encoder)
    expected = copy.deepcopy(method.quantizer)(encoder(torch.cat(views))[1]).commitment_loss
    step = method(views)
    torch.testing.assert_close(step.parts["commitment"], expected)
    step.loss.backward()
    assert all(parameter.grad is None for parameter in method.quantizer.parameters())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target": "bag", "control": "maps"}, "control maps needs target anchor, got bag"),
        ({"target": "soft-bag", "control": "shuffled"}, "no control, got euclidean and shuffled"),
        ({"target": "soft-bag", "dissect": replace(DISSECT, metric="cosine")}, "needs the metric euclidean"),
        ({"dissect": replace(DISSECT, refinement="align")}, "no fusion.* got dissect.refinement = align"),
        ({"dissect": replace(DISSECT, centred=True)}, "no fusion.* got dissect.centred = True"),
        ({"dissect": replace(DISSECT, commitment_weight=2.0)}, "no .* commitment loss, got dissect.commitment_weight"),
    ],
)
def test_options_without_a_use_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        codes_method(**changes)


def test_soft_codes_are_those_of_obow():
    """The formula in float64: softmax of -10 |z - e|^2 over the mean squared distance to the nearest code."""
    soft, quantizer = SoftCodes(1), vqssl.MultiScaleQuantizer([4], codebook_size=8, dim=4, projection="identity")
    maps = [torch.randn(5, 4, 3, 3)]
    codes = quantizer.codebook(0).embed.double()
    tokens = maps[0].double().movedim(1, -1)
    distances = (tokens[..., None, :] - codes).square().sum(-1)
    nearest = codes[distances.argmin(-1)].movedim(-1, 1).float()
    [shares] = soft(maps, [nearest], quantizer)
    expected = torch.softmax(-10 * distances / distances.amin(-1).mean(), -1)
    torch.testing.assert_close(shares.movedim(1, -1), expected.float(), rtol=1e-4, atol=1e-6)
    before = soft.mean_distance.clone()
    soft.eval()(maps, [nearest * 0], quantizer)
    assert torch.equal(soft.mean_distance, before)


def test_centred_inputs_do_not_change_when_all_images_change_alike():
    """What is added to every code and to every z_c has no part in a centred refined target; without, it has."""
    for centred in (True, False):
        method = tiny_method("dissect", replace(DISSECT, centred=centred, residual=False))
        z_c, maps = torch.randn(6, 8), [torch.randn(6, 8, 4, 4), torch.randn(6, 8, 2, 2), torch.randn(6, 8, 1, 1)]
        plain = method.refined(z_c, maps)
        moved = method.refined(z_c + torch.randn(8), [each + torch.randn(8, 1, 1) for each in maps])
        assert torch.allclose(plain, moved, atol=1e-4) == centred


# ---- DiSSECT with place-aligned codes ----


def test_equal_crops_predict_the_code_of_their_own_place():
    """With the identity as augmentation it is the plain loss of each place."""

    class Identity(nn.Module):
        def forward(self, images):
            self.transform_matrix = torch.eye(3).expand(len(images), 3, 3)
            return images

    method = tiny_method("dissect_places")
    images = torch.rand(8, 1, 32, 32)
    plain = copy.deepcopy(method)
    step = method(method.views(images, Identity()))
    seen = plain.byol.compare([images, images])
    centred = [
        centre(each, cells.expand(16, -1, -1))
        for centre, each, cells in zip(plain.centring, seen.target_maps, whole_cells(seen.target_maps), strict=True)
    ]
    expected = plain.prediction(seen.student.maps, plain.quantizer(centred))
    for scale, loss in zip(ENCODER.scales, expected.losses, strict=True):
        torch.testing.assert_close(step.parts[f"code_{scale}"], loss)


def whole_cells(maps, grid=8):
    """Return which cell of an 8 x 8 grid over the image holds the centre of each cell of the maps."""
    found = []
    for each in maps:
        side = each.shape[-1]
        edge = ((torch.arange(side) + 0.5) / side * grid).floor().long()
        found.append(edge[:, None] * grid + edge)
    return found


def test_views_of_unknown_places_are_refused():
    method = tiny_method("dissect_places")
    with pytest.raises(ValueError, match=r"views must be the two that views\(\) drew last"):
        method(views_of_noise())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"operator": "channel"}, "no fusion.* got dissect.operator = channel"),
        ({"quantize": "student"}, "the maps are the teacher's, got dissect.quantize = student"),
    ],
)
def test_options_without_a_use_by_place_are_refused(changes, words):
    options = OPTIONS["dissect_places"]
    with pytest.raises(ValueError, match=words):
        tiny_method("dissect_places", replace(options, dissect=replace(options.dissect, **changes)))


def test_codes_by_place_are_those_of_the_whole_image():
    method = tiny_method("dissect_places")
    method(drawn_views(method))
    method.eval()
    images = torch.rand(3, 1, 32, 32)
    found = method.codes(images)
    assert {name: tuple(each.shape) for name, each in found.items()} == {
        "layer2": (3, 8, 8), "layer3": (3, 4, 4), "layer4": (3, 2, 2)
    }  # fmt: skip
    assert_same_bits(found, method.codes(images))


# ---- SimSiam ----


def simsiam():
    return tiny_method("simsiam")


def test_simsiam_has_the_layers_of_the_reference():
    """facebookresearch/simsiam: no biases but the last, the projector's last BatchNorm without scale and shift."""
    student = METHODS["simsiam"](Encoder(1, EncoderOptions()), SimSiamOptions(), total_steps=1, seed=0).student

    def shapes(module):
        return [
            (type(each).__name__, [tuple(p.shape) for p in each.parameters()])
            for each in module
            if not isinstance(each, nn.ReLU)
        ]

    assert shapes(student.embedder.projector) == [
        ("Linear", [(512, 512)]), ("BatchNorm1d", [(512,), (512,)]),
        ("Linear", [(512, 512)]), ("BatchNorm1d", [(512,), (512,)]),
        ("Linear", [(2048, 512)]), ("BatchNorm1d", []),
    ]  # fmt: skip
    assert shapes(student.predictor) == [
        ("Linear", [(512, 2048)]), ("BatchNorm1d", [(512,), (512,)]), ("Linear", [(2048, 512), (2048,)]),
    ]  # fmt: skip


def test_simsiam_is_minus_one_where_the_prediction_is_the_target():
    method = simsiam()
    method.student.predictor = nn.Identity()
    view = torch.randn(8, 1, 32, 32)
    assert method([view, view]).loss.item() == pytest.approx(-1, abs=1e-6)
    assert -1 < method(views_of_noise()).loss.item() < 1


@pytest.mark.parametrize("count", [2, 3])
def test_simsiam_is_the_slow_formula(count):
    """In numpy and float64: -p z / (|p| |z|), image by image, over all ordered pairs of different views."""
    method = simsiam()
    views = views_of_noise(count)
    seen = [copy.deepcopy(method.student)(view) for view in views]
    p, z = ([getattr(each, name).detach().double().numpy() for each in seen] for name in ("prediction", "embedding"))
    values = []
    for a, b in itertools.product(range(count), repeat=2):
        if a != b:
            for row, target in zip(p[a], z[b], strict=True):
                values.append(-(row @ target) / np.sqrt((row @ row) * (target @ target)))
    assert method(views).loss.item() == pytest.approx(np.mean(values), abs=1e-6)


def test_simsiams_targets_get_no_gradient():
    """The gradient is that of the loss with the targets as constants, and another one without the stop."""
    views = views_of_noise()
    method = simsiam()
    constants = [copy.deepcopy(method.student)(view).embedding.detach() for view in views]
    gradients = {}
    for name in ("method", "constant", "through"):
        twin = copy.deepcopy(method)
        if name == "method":
            loss = twin(views).loss
        else:
            seen = [twin.student(view) for view in views]
            targets = constants if name == "constant" else [each.embedding for each in seen]
            cosine = nn.CosineSimilarity(dim=1)
            loss = -(cosine(seen[0].prediction, targets[1]).mean() + cosine(seen[1].prediction, targets[0]).mean()) / 2
        loss.backward()
        gradients[name] = twin.encoder.resnet.conv1.weight.grad
    torch.testing.assert_close(gradients["method"], gradients["constant"])
    assert (gradients["method"] - gradients["through"]).abs().max() > 1e-3 * gradients["method"].abs().max()


def test_a_step_of_simsiam_lowers_its_loss():
    method = simsiam()
    views = views_of_noise(batch=16)
    optimizer = torch.optim.SGD(method.parameters(), lr=0.05)
    losses = []
    for _ in range(6):
        step = method(views)
        optimizer.zero_grad()
        step.loss.backward()
        optimizer.step()
        losses.append(step.loss.item())
    assert losses[-1] < losses[0]


def test_defaults_are_the_papers():
    options = DiSSECTOptions()
    assert (options.codebook_size, options.byol.dim, options.byol.hidden_dim) == (2048, 128, 2048)
    assert (options.byol.momentum, options.byol.final_momentum, options.codebook_decay) == (0.996, 1.0, 0.99)
    assert options.target_weights == (0.5, 0.5)
