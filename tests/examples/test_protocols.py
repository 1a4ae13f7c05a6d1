"""Each protocol against a law of its own, on images where the answer is known; encoders stay as they were."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize, stats
from sklearn.metrics import mutual_info_score
from torch import nn

from examples.pretrain.augment import Augmentation, to_float
from examples.pretrain.data import ImageSet
from examples.pretrain.divergence import Diverged
from examples.pretrain.encoder import Encoder
from examples.pretrain.protocols import (
    PROTOCOLS,
    Settings,
    Subject,
    anatomy,
    codes,
    finetune,
    lesion_cells,
    localise,
    segment,
)
from examples.pretrain.protocols.knn import knn_auc
from examples.pretrain.protocols.labels import label_subset, learnable, macro_auc, subset_size, transfer_auc
from examples.pretrain.protocols.linear import fit, linear_probe
from examples.pretrain.protocols.subject import check_settings
from examples.pretrain.train import Run
from tests.examples.tiny import ENCODER, pretraining
from tests.profiles import few

SETTINGS = Settings(shares=(0.3, 1.0), mask_shares=(0.4, 1.0), subsets=2, steps=3, clusters=16)


def toy(seed: int = 0, count: int = 160) -> ImageSet:
    """A bright blob of 8 x 8 somewhere, or none: the label says whether, the mask where."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 60, (count, 32, 32))
    labels = (np.arange(count) % 2)[:, None]
    masks = np.zeros((count, 32, 32), np.uint8)
    for i in np.flatnonzero(labels[:, 0]):
        y, x = rng.integers(0, 24, 2)
        masks[i, y : y + 8, x : x + 8] = 1
    return ImageSet((images + 150 * masks).astype(np.uint8), labels.astype(np.uint8), None, masks, None, ("blob",))


def subject_on(data: ImageSet, folder: Path, *, name: str = "byol") -> Subject:
    train, test = data.subset(slice(0, 120)), data.subset(slice(120, None))
    views = Augmentation(crop_scale=(0.8, 1.0), flip=0.0)
    run = Run(train, replace(pretraining(name), augmentation=views), folder)
    return Subject(name, 0, run, run.method.encoder, train, test, (train, test))


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def unchanged(module: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.thorough
def test_fine_tuning_learns_and_does_not_change_the_encoder(tmp_path):
    """Bright on the left or on the right: two classes that a few steps tell apart."""
    rng = np.random.default_rng(0)
    labels = np.arange(160) % 2
    images = rng.integers(0, 60, (160, 32, 32))
    images[labels == 1, :, :16] += 150
    images[labels == 0, :, 16:] += 150
    subject = subject_on(ImageSet(images.astype(np.uint8), labels=labels), tmp_path)
    before = state(subject.encoder)
    assert finetune.finetuned(subject, subject.train, replace(SETTINGS, steps=40), 0) > 0.9
    assert unchanged(subject.encoder, before)
    nonsense = replace(subject.train, labels=np.random.default_rng(1).permutation(subject.train.labels))
    assert finetune.finetuned(subject, nonsense, replace(SETTINGS, steps=40), 0) < 0.9


def test_batches_hold_every_image_once_before_any_twice():
    torch.manual_seed(0)
    seen = torch.cat(list(finetune.batches(10, replace(SETTINGS, steps=7, batch_size=4))))
    assert seen.shape == (28,)
    assert seen[:10].sort().values.tolist() == seen[10:20].sort().values.tolist() == list(range(10))
    assert [len(batch) for batch in finetune.batches(3, replace(SETTINGS, steps=2))] == [3, 3]


@pytest.mark.parametrize("frozen", few([True, False]))
def test_segmentation_finds_the_blob_and_does_not_change_the_encoder(frozen, tmp_path):
    subject = subject_on(toy(), tmp_path)
    before = state(subject.encoder)
    settings = replace(SETTINGS, steps=60, mask_lr=5e-3, batch_size=32)
    net = segment.trained(subject, subject.train, 1, settings, 0, frozen=frozen)
    assert unchanged(subject.encoder, before)
    assert unchanged(net.encoder, before) is frozen  # BatchNorm's statistics too
    assert segment.dice(subject, net, subject.test, 1)[0] > 0.7
    # Images without a mask do not count, and where none has one there is nothing to average.
    empty = subject.test.subset(np.flatnonzero(subject.test.labels[:, 0] == 0))
    full = subject.test.subset(np.flatnonzero(subject.test.labels[:, 0]))
    assert segment.dice(subject, net, subject.test, 1) == pytest.approx(segment.dice(subject, net, full, 1))
    assert "to test on" in segment.lacking_masks(replace(subject, masked=(subject.train, empty)))


@pytest.mark.thorough
def test_segmentation_finds_rare_masks(tmp_path):
    """Three pixels by three in every fourth image are two thousandths of all pixels, yet most of them are found."""
    rng = np.random.default_rng(0)
    masks = np.zeros((160, 32, 32), np.uint8)
    for i in range(0, 160, 4):
        y, x = rng.integers(2, 27, 2)
        masks[i, y : y + 3, x : x + 3] = 1
    images = (rng.integers(0, 60, masks.shape) + 150 * masks).astype(np.uint8)
    subject = subject_on(ImageSet(images, masks=masks), tmp_path)
    net = segment.trained(subject, subject.train, 1, replace(SETTINGS, steps=60, batch_size=32), 0, frozen=True)
    assert segment.dice(subject, net, subject.test, 1)[0] > 0.4


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_the_decoder_fits_every_stem(stride):
    encoder = Encoder(1, replace(ENCODER, stem_stride=stride))
    net = segment.Segmenter(encoder, 2, frozen=False)
    images = torch.rand(2, 1, 64, 64)
    assert net(images).shape == (2, 2, 64, 64)
    sizes = [each.shape[2] for each in encoder.pyramid(images)]
    assert [a / b for a, b in itertools.pairwise(sizes)] == [2.0] * (len(sizes) - 1)
    assert [each.shape[1] for each in encoder.pyramid(images)] == encoder.pyramid_channels
    net(images).sum().backward()
    assert encoder.resnet.conv1.weight.grad.abs().sum() > 0


def test_dice_is_twice_the_overlap_over_the_sum(tmp_path):
    subject = subject_on(toy(), tmp_path)
    net = segment.Segmenter(subject.encoder, 1, frozen=True).eval()
    with torch.no_grad():
        guess = segment.predicted(subject, net, subject.test.images).bool().numpy()[:, 0]
    truth = subject.test.masks > 0
    per_image = [2 * (a & b).sum() / (a.sum() + b.sum()) for a, b in zip(guess, truth, strict=True) if b.any()]
    assert segment.dice(subject, net, subject.test, 1)[0] == pytest.approx(np.mean(per_image), abs=1e-6)


def test_the_probe_as_one_linear_map_equals_the_pipeline(tmp_path):
    subject = subject_on(toy(), tmp_path)
    net = localise.Probed(subject)
    features = [
        subject.run.encode(to_float(side.images), subject.encoder).numpy() for side in (subject.train, subject.test)
    ]
    expected = fit(features[0], subject.train.labels[:, 0]).decision_function(features[1])
    with torch.no_grad():
        found = net(subject.run.normalize(to_float(subject.test.images)))[:, 0].numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.thorough
def test_grad_cam_highlights_the_blob(tmp_path):
    subject = subject_on(toy(), tmp_path)
    tuned = replace(SETTINGS, steps=60, mask_lr=5e-3)
    net = segment.trained(subject, subject.train, 1, tuned, 0, frozen=False)
    seeing = replace(subject, encoder=net.encoder)
    scores = localise.measure(seeing, SETTINGS)
    assert scores["blob, by chance"][0] == pytest.approx(100 * 64 / 1024)
    assert max(value[0] for name, value in scores.items() if "layer" in name) > 2 * 6.25


def test_energy_is_the_share_inside_and_zero_for_an_empty_map():
    cam = np.zeros((3, 4, 4))
    cam[0, :2] = 1.0
    cam[1, 0, 0] = 3.0
    mask = np.zeros((3, 4, 4), np.uint8)
    mask[:, 0] = 1
    assert localise.energy(cam, mask).tolist() == [0.5, 1.0, 0.0]  # the empty map points nowhere


def slow_average_precision(scores, truth):
    """Return the precision at each true cell in falling order of scores, averaged; without ties."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    hits, found = 0, []
    for rank, i in enumerate(order, 1):
        if truth[i]:
            hits += 1
            found.append(hits / rank)
    return sum(found) / len(found)


def test_lesion_probe_is_the_slow_oracle(tmp_path):
    """Cells, logistic regression and average precision written out, in float64; the encoder stays as it was."""
    subject = subject_on(toy(count=160), tmp_path)
    before = state(subject.encoder)
    scores = lesion_cells.measure(subject, SETTINGS)
    assert unchanged(subject.encoder, before)
    for number, stage in enumerate(ENCODER.scales):
        sides = []
        for side in (subject.train, subject.test):
            features = subject.run.maps(to_float(side.images), subject.encoder)[number].double().numpy()
            grid, width = features.shape[2], 32 // features.shape[2]
            x, y = [], []
            for image, mask in zip(features, side.masks, strict=True):
                for row, column in itertools.product(range(grid), repeat=2):
                    x.append(image[:, row, column])
                    pixels = mask[row * width : (row + 1) * width, column * width : (column + 1) * width]
                    y.append(bool(pixels.any()))
            sides.append((np.array(x), np.array(y)))
        (x, y), (asked, truth) = sides
        mean, deviation = x.mean(0), x.std(0)
        x, asked = (x - mean) / deviation, (asked - mean) / deviation
        sign = np.where(y, 1.0, -1.0)

        def objective(w, x=x, sign=sign):
            margin = sign * (x @ w[:-1] + w[-1])
            slope = -sign / (1 + np.exp(margin))
            loss = 0.1 * np.logaddexp(0, -margin).sum() + w[:-1] @ w[:-1] / 2
            return loss, 0.1 * np.append(slope @ x, slope.sum()) + np.append(w[:-1], 0)

        w = optimize.minimize(objective, np.zeros(x.shape[1] + 1), jac=True, options={"gtol": 1e-6}).x
        expected = 100 * slow_average_precision(asked @ w[:-1], truth)
        assert scores[f"blob, {stage}"][0] == pytest.approx(expected, abs=0.3)
        assert scores[f"blob, {stage} by chance"][0] == pytest.approx(100 * truth.mean())


def test_lesion_probe_sees_what_cells_hold_and_nothing_in_noise(tmp_path):
    """A map that holds the brightness of each cell finds every bright cell; one of noise is at chance."""

    class Bright(nn.Module):
        scales = ("layer2",)

        def forward(self, images):
            return images.mean((2, 3)), [nn.functional.max_pool2d(images, 4)]

    class Noise(nn.Module):
        scales = ("layer2",)

        def forward(self, images):
            return images.mean((2, 3)), [torch.randn(len(images), 3, 8, 8)]

    subject = subject_on(toy(), tmp_path)
    scores = lesion_cells.measure(replace(subject, encoder=Bright()), SETTINGS)
    assert scores["blob, layer2"][0] == pytest.approx(100)
    noise = lesion_cells.measure(replace(subject, encoder=Noise()), SETTINGS)
    assert noise["blob, layer2"][0] < noise["blob, layer2 by chance"][0] + 4


@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (1, 1)])
def test_cells_are_those_of_adaptive_pooling(grid):
    masks = (np.random.default_rng(0).random((6, 16, 16)) < 0.02).astype(np.uint8) * 2
    data = ImageSet(np.zeros((6, 16, 16), np.uint8), masks=masks)
    found = lesion_cells.lesion_cells(data, 2, grid)
    expected = nn.functional.adaptive_max_pool2d(torch.from_numpy(masks > 0)[:, None].float(), grid)[:, 0] > 0
    assert not found[:, 0].any()
    assert (found[:, 1] == expected.numpy()).all()


def test_lesion_probe_needs_cells_with_and_without(tmp_path):
    toys = toy()
    subject = subject_on(toys, tmp_path)
    assert "give --masks" in PROTOCOLS["lesion-cells"].lacking(replace(subject, masked=None))
    toys.masks[:] = 1
    assert "some cells have and others have not" in PROTOCOLS["lesion-cells"].lacking(subject)


class Places(nn.Module):
    """A map that holds the row of each cell and noise; pooled features of no use."""

    scales = ("layer2",)

    def forward(self, images):
        rows = torch.linspace(-1, 1, 8)[None, None, :, None].expand(len(images), 1, 8, 8)
        noise = torch.randn(len(images), 1, 8, 8)
        return images.mean((2, 3)), [torch.cat([rows, noise], 1)]


def test_anatomy_explains_the_row_and_not_the_column_of_row_features(tmp_path):
    subject = replace(subject_on(toy(), tmp_path), encoder=Places())
    scores = anatomy.measure(subject, SETTINGS)
    assert scores["layer2, row"][0] > 99.9
    assert abs(scores["layer2, column"][0]) < 3
    corners = anatomy.tint(np.array([[-1.0, -1], [-1, 1], [1, -1], [1, 1]]))
    distances = np.abs(corners[:, None] - corners[None]).sum(-1)[np.triu_indices(4, 1)]
    assert distances.min() > 0.5  # four corners, four colours


def test_bits_is_mutual_information_minus_chance():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 3, (10, 4, 4))
    assert codes.entropy(truth) == pytest.approx(stats.entropy(np.bincount(truth.ravel()), base=2))
    assert codes.bits(np.zeros_like(truth), truth) == pytest.approx(0, abs=1e-12)
    # Less what shuffled codes tell, on average: nothing is left of noise, however many codes there are.
    many = rng.integers(0, 64, truth.shape)
    plain = mutual_info_score(many.ravel(), truth.ravel()) / np.log(2)
    chance = [mutual_info_score(rng.permutation(many.ravel()), truth.ravel()) / np.log(2) for _ in range(300)]
    assert codes.bits(many, truth) == pytest.approx(plain - np.mean(chance), abs=0.02)
    assert plain > 0.3
    assert abs(np.mean([codes.bits(rng.integers(0, 64, truth.shape), truth) for _ in range(50)])) < 0.02


def test_information_beyond_place_is_zero_for_codes_of_the_row(tmp_path, monkeypatch):
    """Codes that are the row of a cell know a mask that is always at the bottom, and nothing beyond its place."""
    data = toy()
    data.masks[:] = 0
    data.masks[:, 16:] = 1
    subject = subject_on(data, tmp_path)

    def rows(known, asked, count, seed):
        return np.broadcast_to(np.arange(asked.shape[2])[None, :, None], (len(asked), *asked.shape[2:]))

    monkeypatch.setattr(codes, "kmeans", rows)
    scores = codes.measure(subject, SETTINGS)
    assert scores["layer2, k-means"][0] == pytest.approx(scores["layer2, entropy"][0], abs=0.02)
    assert scores["layer2, k-means beyond place"][0] == pytest.approx(0, abs=1e-9)


@given(count=st.integers(2, 40), seed=st.integers(0, 10))
def test_a_derangement_has_no_fixed_point(count, seed):
    order = codes.derangement(count, np.random.default_rng(seed))
    assert sorted(order) == list(range(count))
    assert not (order == np.arange(count)).any()


def test_covered_has_three_levels():
    masks = np.zeros((1, 4, 4), np.uint8)
    masks[0, :2, 2:] = 2  # any bit counts
    masks[0, 2:, 0] = 1
    assert codes.covered(masks, (2, 2)).tolist() == [[[0, 2], [1, 0]]]


def test_constant_findings_are_left_out(tmp_path):
    """Of three findings one is in no training image and one in all: the third alone counts."""
    toys = toy()
    findings = np.concatenate([toys.labels, np.zeros_like(toys.labels), np.ones_like(toys.labels)], 1)
    findings[120:, 1] = 1 - toys.labels[120:, 0]
    masks = toys.masks.copy()
    masks[:, 0, 0] |= 4  # a bit for every finding; the second is in no test image
    masks[:2, 0, 0] |= 2
    data = ImageSet(toys.images, findings, None, masks, None, ("blob", "nowhere", "everywhere"))
    subject = subject_on(data, tmp_path)
    alone = replace(
        subject,
        train=replace(subject.train, labels=findings[:120, :1]),
        test=replace(subject.test, labels=findings[120:, :1]),
    )
    for name in ("linear", "finetune"):
        assert PROTOCOLS[name].lacking(subject) is None
    assert (
        PROTOCOLS["linear"].measure(subject, SETTINGS)["100%"] == PROTOCOLS["linear"].measure(alone, SETTINGS)["100%"]
    )
    assert np.isfinite(np.concatenate(list(PROTOCOLS["finetune"].measure(subject, SETTINGS).values()))).all()
    assert PROTOCOLS["localise"].lacking(subject) is None
    assert {name.partition(",")[0] for name in localise.measure(subject, SETTINGS)} == {"blob"}
    assert PROTOCOLS["segment-frozen"].lacking(subject) == "every kind of mask among the images to test on"
    never = replace(subject, train=replace(subject.train, labels=np.zeros_like(findings[:120])))
    assert PROTOCOLS["linear"].lacking(never) == PROTOCOLS["finetune"].lacking(never)
    assert "a probe can learn" in PROTOCOLS["localise"].lacking(never)


# ---- probes ----


def test_label_subsets_hold_every_class_and_repeat_with_the_seed():
    labels = np.repeat([0, 1, 2], [900, 80, 20])
    for seed in range(20):
        index = label_subset(labels, 0.02, seed)
        assert len(index) == 20
        assert np.bincount(labels[index], minlength=3).min() >= 2
        assert (index == label_subset(labels, 0.02, seed)).all()
    findings = np.stack([labels == 2, labels == 1], axis=1).astype(np.uint8)
    drawn = findings[label_subset(findings, 0.02, 0)]
    assert (drawn.sum(0) >= 2).all()
    with pytest.raises(ValueError, match="too rare"):
        label_subset(np.repeat([0, 1], [999, 1]), 0.02, 0)


@given(counts=st.lists(st.integers(2, 40), min_size=2, max_size=40), share=st.floats(0.001, 0.999))
def test_label_subsets_hold_every_class_however_many_and_rare(counts, share):
    labels = np.repeat(np.arange(len(counts)), counts)
    index = label_subset(labels, share, 0)
    assert np.bincount(labels[index], minlength=len(counts)).min() >= 2
    assert len(np.unique(index)) == len(index) == subset_size(labels, share)
    assert (index == np.sort(index)).all()


def test_the_linear_probe_separates_signal_from_noise():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 600)
    signal = np.eye(3)[labels] + 0.3 * rng.standard_normal((600, 3))
    noise = rng.standard_normal((600, 3))
    for features, low, high in ((signal, 0.95, 1.0), (noise, 0.4, 0.6)):
        scores = linear_probe((features[:400], labels[:400]), (features[400:], labels[400:]))
        assert low <= np.mean(scores[1.0]) <= high
        assert len(scores[0.01]) == 3


def test_a_class_missing_on_one_side_is_left_out():
    rng = np.random.default_rng(0)
    features, labels = rng.standard_normal((90, 4)), np.arange(90) % 3
    features[np.arange(90), labels] += 3
    two = labels[60:] < 2
    found = linear_probe((features[:60], labels[:60]), (features[60:][two], labels[60:][two]), (1.0,))
    assert found[1.0][0] > 0.9  # the third class has no test image
    known = labels[:60] < 2
    found = linear_probe((features[:60][known], labels[:60][known]), (features[60:], labels[60:]), (1.0,))
    assert found[1.0][0] > 0.7  # nor training image


def test_the_knn_probe_separates_signal_from_noise():
    rng = np.random.default_rng(0)
    labels = np.arange(400) % 3
    signal = np.eye(3)[labels] + 0.3 * rng.standard_normal((400, 3))
    noise = rng.standard_normal((400, 3))
    sides = [(features[:300], labels[:300]) for features in (signal, noise)]
    tests = [(features[300:], labels[300:]) for features in (signal, noise)]
    assert knn_auc(sides[0], tests[0]) > 0.95
    assert 0.35 < knn_auc(sides[1], tests[1]) < 0.65
    # Findings instead of classes, one of which nobody in the training set has.
    findings = np.stack([labels == 0, labels == 1, np.arange(400) > 350], 1).astype(np.uint8)
    assert knn_auc((signal[:300], findings[:300]), (signal[300:], findings[300:])) > 0.75


def axes(labels, classes, seed):
    """Return features of a perfect encoder: each class lies along an axis of its own, with little noise."""
    return np.eye(classes)[labels] + 0.05 * np.random.default_rng(seed).standard_normal((len(labels), classes))


def missing_on_a_side(count):
    """Yield the classes of both sides for every way of leaving out some, as long as two are shared."""
    subsets = [part for size in range(2, count + 1) for part in itertools.combinations(range(count), size)]
    return [(known, asked) for known in subsets for asked in subsets if len(set(known) & set(asked)) > 1]


@pytest.mark.parametrize(("known", "asked"), missing_on_a_side(3))
def test_perfect_embedding_scores_one_whatever_classes_are_missing(known, asked):
    train, test = np.repeat(known, 30), np.repeat(asked, 10)
    sides = (axes(train, 3, 0), train), (axes(test, 3, 1), test)
    assert knn_auc(*sides) == 1
    assert linear_probe(*sides, fractions=(0.2, 1.0), subsets=2) == {0.2: [1, 1], 1.0: [1]}
    # The numbers of the classes are names: any others in their place give the same.
    names = np.array([-3, 70, 10**12])
    assert knn_auc((sides[0][0], names[train]), (sides[1][0], names[test])) == 1


@given(
    train=st.lists(st.integers(0, 4), min_size=2, max_size=12),
    test=st.lists(st.integers(0, 4), min_size=2, max_size=12),
    seed=st.integers(0, 5),
)
def test_transfer_auc_is_the_mean_over_pairs_of_shared_classes(train, test, seed):
    """The oracle counts pairs: a class is scored if both sides have it and something else that is known."""
    train, test = np.array(train), np.array(test)
    columns = np.unique(train)
    scores = np.random.default_rng(seed).integers(0, 4, (len(test), len(columns)))  # with ties
    asked = [i for i in range(len(test)) if test[i] in train]
    found = []
    for column, label in enumerate(columns):
        inside = [scores[i, column] for i in asked if test[i] == label]
        outside = [scores[i, column] for i in asked if test[i] != label]
        if inside and outside:
            found.append(np.mean([(a > b) + 0.5 * (a == b) for a in inside for b in outside]))
    if found:
        assert transfer_auc(train, test, columns, scores) == pytest.approx(np.mean(found))
        assert len(learnable(train, test)) == len(found)
    else:
        with pytest.raises(ValueError, match="AUC is not defined"):
            transfer_auc(train, test, columns, scores)


def test_constant_findings_are_left_out_of_both_probes():
    labels = np.arange(120) % 2
    rng = np.random.default_rng(0)
    known = np.stack([labels, np.ones(120), np.zeros(120), labels], 1).astype(np.uint8)
    asked = np.stack([labels, rng.integers(0, 2, 120), rng.integers(0, 2, 120), np.ones(120)], 1).astype(np.uint8)
    assert learnable(known, asked).tolist() == [0]
    features = axes(labels, 2, 0), axes(labels, 2, 1)
    assert knn_auc((features[0], known), (features[1], asked)) == 1
    assert linear_probe((features[0], known), (features[1], asked), (1.0,)) == {1.0: [1.0]}
    one = labels[:, None].astype(np.uint8)  # a single column is a finding, not a class
    assert knn_auc((features[0], one), (features[1], one)) == 1


def test_knn_votes_are_the_weighted_shares_of_the_neighbours():
    rng = np.random.default_rng(0)
    train, test = rng.standard_normal((60, 4)), rng.standard_normal((40, 4))
    labels, truth = rng.integers(0, 3, 60), rng.integers(0, 3, 40)
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (train, test)]
    distance = 1 - unit[1] @ unit[0].T
    votes = np.zeros((40, 3))
    for row, line in enumerate(distance):
        for near in np.argsort(line)[:20]:
            votes[row, labels[near]] += 1 / line[near]
    assert knn_auc((train, labels), (test, truth)) == pytest.approx(
        macro_auc(truth, votes / votes.sum(1, keepdims=True))
    )


@pytest.mark.parametrize("name", ["linear", "finetune"])
def test_fine_tuning_and_probe_leave_unknown_classes_out(name, tmp_path):
    """Bright left, bright right, and a class that training lacks: its images change no score."""
    rng = np.random.default_rng(0)
    labels = np.arange(160) % 2
    images = rng.integers(0, 60, (160, 32, 32))
    images[labels == 1, :, :16] += 150
    images[labels == 0, :, 16:] += 150
    names = np.array([4, 9])[labels]
    names[150:] = 6
    images[150:] = 255
    subject = subject_on(ImageSet(images.astype(np.uint8), labels=names), tmp_path)
    without = replace(subject, test=subject.test.subset(slice(0, 30)))
    assert subject.test.labels[-1] == 6
    assert PROTOCOLS[name].measure(subject, SETTINGS) == PROTOCOLS[name].measure(without, SETTINGS)


def test_plane_that_training_lacks_is_missing_not_dropped(tmp_path):
    toys = toy()
    toys.masks[120:, 0, 0] |= 2
    subject = subject_on(toys, tmp_path)
    assert PROTOCOLS["segment-frozen"].lacking(subject) == "every kind of mask among the images to train on"
    assert segment.plane_names(*subject.masked) == ["mask 0", "mask 1"]


def test_subset_that_cannot_be_drawn_is_known_before_measuring(tmp_path):
    labels = np.arange(160) % 2
    labels[3] = 2
    masks = np.zeros((160, 32, 32), np.uint8)
    masks[[3, 150], 4:8, 4:8] = 1
    images = np.random.default_rng(0).integers(0, 255, (160, 32, 32), dtype=np.uint8)
    subject = subject_on(ImageSet(images, labels=labels, masks=masks), tmp_path)
    for name in ("linear", "finetune", "segment-frozen", "segment-tuned"):
        assert PROTOCOLS[name].lacking(subject) is None
        assert "too rare" in PROTOCOLS[name].unfit(subject, SETTINGS)
        assert PROTOCOLS[name].unfit(subject, replace(SETTINGS, shares=(1.0,), mask_shares=(1.0,))) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"shares": (0.1, float("nan"))},
        {"shares": (0.0,)},
        {"shares": (-0.1,)},
        {"shares": (1.5,)},
        {"shares": (100.0,)},
        {"shares": ()},
        {"shares": (0.1, 0.1)},
        {"mask_shares": (0.1, 0.1)},
        {"subsets": 0},
        {"subsets": -1},
        {"steps": 0},
        {"batch_size": 1},
        {"lr": float("nan")},
        {"mask_lr": float("inf")},
        {"clusters": 0},
        {"seed": -1},
    ],
)
def test_settings_out_of_range_are_refused_by_name(changes):
    [name] = changes
    with pytest.raises(ValueError, match=f"^--{name.replace('_', '-')} must "):
        check_settings(replace(SETTINGS, **changes))
    check_settings(SETTINGS)


@pytest.mark.parametrize("name", ["finetune", "segment-frozen", "segment-tuned"])
def test_training_of_a_protocol_that_diverges_is_an_error_not_a_score(name, tmp_path):
    subject = subject_on(toy(), tmp_path)
    settings = replace(SETTINGS, shares=(1.0,), mask_shares=(1.0,), lr=1e30, mask_lr=1e30)
    with pytest.raises(Diverged, match=r"of byol|by byol.* smaller --(mask-)?lr than 1e\+30"):
        PROTOCOLS[name].measure(subject, settings)


def test_anatomy_leaves_out_stages_of_a_single_cell(tmp_path):
    subject = subject_on(toy(), tmp_path)
    small = ImageSet(np.random.default_rng(0).integers(0, 255, (160, 8, 8), dtype=np.uint8))
    run = Run(small, subject.run.config, tmp_path)
    tiny = replace(
        subject, run=run, train=small.subset(slice(0, 120)), test=small.subset(slice(120, None)), masked=None
    )
    stages = {name.partition(",")[0] for name in anatomy.measure(tiny, SETTINGS)}
    assert stages < set(ENCODER.scales)
    assert np.isfinite(list(anatomy.measure(tiny, SETTINGS).values())).all()
    single = replace(tiny, test=ImageSet(np.zeros((40, 2, 2), np.uint8)))
    assert "larger images" in anatomy.lacking(single)


def test_macro_auc_is_the_mean_over_findings():
    labels = np.array([[1, 0, 1], [0, 0, 1], [1, 0, 1], [0, 0, 1]])
    scores = np.array([[0.9, 0.1, 0.1], [0.8, 0.2, 0.2], [0.7, 0.3, 0.3], [0.1, 0.4, 0.4]])
    assert macro_auc(labels, scores) == 0.75  # of the first; the others have one value only
    with pytest.raises(ValueError, match="no finding has both values"):
        macro_auc(labels[:, 1:], scores[:, 1:])
    with pytest.raises(ValueError, match="each class must have a column of scores, got classes 0 to 2 for 2 columns"):
        macro_auc(np.array([0, 1, 2, 0]), scores[:, :2])
