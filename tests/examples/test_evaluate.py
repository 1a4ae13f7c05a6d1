"""Evaluation of finished runs: same subsets for all, encoders left alone, each protocol against a law of its own."""

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import mutual_info_score
from torch import nn

from examples.pretrain import evaluate, evaluation_report
from examples.pretrain.augment import Augmentation, to_float
from examples.pretrain.data import load_images, train_test_split
from examples.pretrain.finished_runs import apart, find, split_of, subject_of
from examples.pretrain.imageset import ImageSet
from examples.pretrain.model import Encoder, Model
from examples.pretrain.phantoms import make_phantoms
from examples.pretrain.probe import fit, knn_auc, knn_monitor, linear_probe, macro_auc
from examples.pretrain.protocols import PROTOCOLS, Settings, Subject, anatomy, codes, finetune, localise, segment
from examples.pretrain.train import Optimization, Pretraining, Run

TINY = Model(width=4, stem_stride=2, codebook_size=16, dim=8, hidden_dim=16, teacher_momentum=0.9)
QUICK = Optimization("adamw", lr=1e-3, weight_decay=1e-4, batch_size=16, epochs=2, warmup_epochs=1)
SETTINGS = Settings(shares=(0.3, 1.0), mask_shares=(0.4, 1.0), subsets=2, steps=3)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder as the example writes it, and the file of its images."""
    folder = tmp_path_factory.mktemp("run")
    phantoms = make_phantoms(96, 32, seed=0)
    path = folder / "images.npz"
    np.savez(path, images=phantoms.images, labels=phantoms.labels, groups=phantoms.groups, masks=phantoms.masks)
    data = load_images(path, 32)
    train = data.subset(train_test_split(data)[0])
    for method in ("byol", "dissect"):
        Run(train, Pretraining(method, TINY, optimization=QUICK), folder / method).train(quiet=True)
    return folder, path


def test_all_protocols_by_one_command(finished, tmp_path, capsys):
    folder, path = finished
    before = (folder / "dissect" / "checkpoint.pt").read_bytes()
    config = evaluate.Evaluation(runs=(folder,), data=path, out=tmp_path, settings=SETTINGS)
    text = evaluate.main(config)
    results = {file.name: file.read_bytes() for file in tmp_path.glob("*.json")}
    assert len(results) == len(PROTOCOLS) * 3
    record = json.loads(results["finetune-dissect-seed0.json"])
    assert {share: len(values) for share, values in record["scores"].items()} == {"30%": 2, "100%": 1}
    assert record["settings"]["steps"] == 3
    assert record["pretraining"]["model"]["codebook_size"] == 16
    # Phantoms have one bit of the mask for each finding, whose names the columns carry.
    assert "finding 1, 40%" in json.loads(results["segment-tuned-byol-seed0.json"])["scores"]
    for protocol in PROTOCOLS.values():
        assert protocol.title in text
    assert "| dissect over byol | 1 |" in text
    assert "Linear probe minus fine-tuning" in text
    assert "95% interval" in capsys.readouterr().out
    pictures = {file.stem for file in tmp_path.glob("*.png")}
    assert {
        "segment-frozen",
        "segment-tuned",
        "localise-finding-0",
        "anatomy",
        "codes-dissect-maps",
        "shares",
    } <= pictures
    assert (folder / "dissect" / "checkpoint.pt").read_bytes() == before
    # What is there is not measured again, and the same settings give the same figures.
    (tmp_path / "linear-byol-seed0.json").unlink()
    assert evaluate.main(replace(config, protocols=("linear", "codes"))) == text
    assert {file.name: file.read_bytes() for file in tmp_path.glob("*.json")}.keys() == results.keys()
    again = json.loads((tmp_path / "linear-byol-seed0.json").read_text())
    assert again["scores"] == json.loads(results["linear-byol-seed0.json"])["scores"]
    with pytest.raises(ValueError, match=r"of something else: settings\.steps was 3, is 4\. Give another --out"):
        evaluate.main(replace(config, settings=replace(SETTINGS, steps=4)))
    assert evaluate.main(evaluate.Evaluation(out=tmp_path, report=True)) == text


def small(
    tmp_path: Path, *, epochs: int = 2, labels: np.ndarray | None = None, groups: np.ndarray | None = None
) -> tuple[Run, evaluate.Evaluation]:
    """A run of one epoch or two and the file of its images, which tests may spoil; the settings to judge it by."""
    phantoms = make_phantoms(64, 32, seed=1)
    path = tmp_path / "images.npz"
    assert phantoms.labels is not None
    labels = phantoms.labels[:, 0].astype(np.int64) if labels is None else labels
    arrays = {"images": phantoms.images, "labels": labels} | ({} if groups is None else {"groups": groups})
    np.savez(path, **arrays)  # type: ignore[arg-type]
    data = load_images(path, 32)
    run = Run(data.subset(train_test_split(data)[0]), Pretraining("byol", TINY, optimization=QUICK), tmp_path / "byol")
    run.train(quiet=True, until=epochs)
    config = evaluate.Evaluation(runs=(tmp_path,), data=path, out=tmp_path / "out", settings=SETTINGS)
    return run, replace(config, protocols=("linear",))


def test_a_result_is_kept_for_the_same_checkpoint_and_images_only(tmp_path):
    run, config = small(tmp_path)
    text = evaluate.main(config)
    assert evaluate.main(config) == text
    assert "Images with labels: 14 are 30%, 48 are 100%." in text
    arrays = dict(np.load(config.data))
    images = arrays["images"].copy()
    images[train_test_split(load_images(config.data, 32))[1][0]] //= 2  # trained on the same, and tested on others
    np.savez(config.data, **{**arrays, "images": images})
    with pytest.raises(ValueError, match=r"images\.test\.sha256 was \w+, is \w+"):
        evaluate.main(config)
    np.savez(config.data, **arrays)
    assert evaluate.main(config) == text
    with torch.no_grad():
        run.model.student.encoder.resnet.conv1.weight.mul_(2)
    run.save()
    with pytest.raises(ValueError, match=r"linear-byol-seed0.json .* checkpoint\.sha256 was \w+, is \w+"):
        evaluate.main(config)
    assert evaluate.main(replace(config, encoders=("random",))) == text  # which no checkpoint has made


def test_masks_may_come_later(tmp_path):
    """What needs none is not measured again, and stands in one report with what does."""
    masked = make_phantoms(64, 32, seed=1)
    groups = np.arange(64)
    _, config = small(tmp_path, groups=groups)
    evaluate.main(config)
    np.savez(tmp_path / "masks.npz", images=masked.images, masks=(masked.masks > 0).astype(np.uint8), groups=groups)
    text = evaluate.main(replace(config, protocols=("linear", "codes"), masks=tmp_path / "masks.npz"))
    assert "Mutual information" in text
    assert "Linear probe" in text


def test_a_mask_file_of_other_things_or_of_255(tmp_path):
    """255 is one kind of mask, not eight; and two organs are not the two findings."""
    groups = np.arange(64)
    images = make_phantoms(64, 32, seed=1)
    two = np.stack([np.arange(64) % 2, np.arange(64) // 2 % 2], 1).astype(np.uint8)
    _, config = small(tmp_path, labels=two, groups=groups)
    masks = np.zeros((64, 32, 32), np.uint8)
    masks[:, 4:9, 4:9] = 255
    np.savez(tmp_path / "masks.npz", images=images.images, masks=masks, groups=groups)
    config = replace(config, masks=tmp_path / "masks.npz", settings=replace(SETTINGS, mask_shares=(1.0,)))
    [found, *_] = find(config.runs, ["byol"], device="cpu", unfinished=False)
    subject = subject_of(found, config.images)
    assert segment.plane_names(subject.masked[0]) == ["mask"]
    assert subject.masked[0].masks.max() == 1
    organs = masks.copy()
    organs[:] = 1
    organs[:, :9] = 3
    np.savez(tmp_path / "organs.npz", images=images.images, masks=organs, groups=groups)
    subject = subject_of(found, replace(config, masks=tmp_path / "organs.npz").images)
    assert PROTOCOLS["localise"].lacking(subject) == "a mask of each finding, as the phantoms have"
    assert PROTOCOLS["segment-frozen"].lacking(subject) is None


def test_runs_that_would_be_judged_by_different_recipes_are_refused(tmp_path):
    run, config = small(tmp_path)
    other = replace(run.config, model=replace(TINY, codebook_size=32))
    Run(run.data, other, tmp_path / "dissect").train(quiet=True)
    with pytest.raises(ValueError, match=r"one recipe, got .*byol and .*dissect, of which codebook_size is 16 and 32"):
        evaluate.main(config)


def test_an_unfinished_run_is_not_judged_unless_asked_for(tmp_path):
    _, config = small(tmp_path, epochs=1)
    with pytest.raises(ValueError, match=r"finished run, got one after epoch 1 of 2: let it go on .* --unfinished"):
        evaluate.main(config)
    text = evaluate.main(replace(config, unfinished=True))
    assert "| byol@1 | 1 |" in text
    assert json.loads((config.out / "linear-byol@1-seed0.json").read_text())["checkpoint"]["epoch"] == 1
    # An encoder that was never trained is not unfinished.
    assert "| random | 1 |" in evaluate.main(replace(config, encoders=("random",), out=tmp_path / "never"))


def test_the_report_refuses_what_does_not_belong_together(tmp_path):
    _, config = small(tmp_path)
    evaluate.main(config)
    path = config.out / "linear-byol-seed0.json"
    record = json.loads(path.read_text())
    other = config.out / "linear-byol-seed1.json"
    for part, change in (
        ("settings", {"subsets": 5}),
        ("pretraining", {"method": "dissect"}),
    ):
        other.write_text(json.dumps({**record, "seed": 1, part: {**record[part], **change}}))
        with pytest.raises(
            ValueError, match=rf"seed0.json and .*seed1.json do not belong .* {part}\.{next(iter(change))} is"
        ):
            evaluation_report.write(config.out)
    other.write_text(json.dumps({**record, "seed": 1}))
    assert "| byol | 2 |" in evaluation_report.write(config.out)
    other.unlink()
    images = {**record["images"], "test": {"count": 13, "sha256": "0"}}
    path.write_text(json.dumps({**record, "images": images}))
    with pytest.raises(ValueError, match=r"images\.sha256 is"):
        evaluation_report.write(config.out)


def test_no_gap_without_an_encoder_that_has_both():
    scores = {0: {"1%": [3.0, 5.0]}}
    assert evaluation_report.gap_of({"byol": scores}, {"random": scores}) == ""
    assert evaluation_report.gap_of({"byol": scores}, {"byol": {1: {"1%": [1.0, 1.0]}}}) == ""
    assert "| byol | 1 |" in evaluation_report.gap_of({"byol": scores, "random": scores}, {"byol": scores})


def test_labels_that_tell_nothing_are_refused_not_scored(tmp_path):
    _, config = small(tmp_path, labels=np.zeros(64, np.int64))
    with pytest.raises(ValueError, match="linear needs labels that tell images apart"):
        evaluate.main(config)
    assert not list(config.out.glob("*.json"))
    evaluate.main(replace(config, protocols=()))
    assert {file.name.partition("-")[0] for file in config.out.glob("*.json")} == {"anatomy"}


def test_findings_that_nobody_has_are_left_out(tmp_path):
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


def test_a_class_that_one_side_lacks_is_left_out():
    rng = np.random.default_rng(0)
    features, labels = rng.standard_normal((90, 4)), np.arange(90) % 3
    features[np.arange(90), labels] += 3
    two = labels[60:] < 2
    found = linear_probe((features[:60], labels[:60]), (features[60:][two], labels[60:][two]), (1.0,))
    assert found[1.0][0] > 0.9  # the third class has no test image
    known = labels[:60] < 2
    found = linear_probe((features[:60][known], labels[:60][known]), (features[60:], labels[60:]), (1.0,))
    assert found[1.0][0] > 0.7  # nor training image


def test_refusals(finished, tmp_path, monkeypatch):
    folder, path = finished
    config = evaluate.Evaluation(runs=(folder,), data=path, out=tmp_path / "out", settings=SETTINGS)
    with pytest.raises(ValueError, match=r"must hold checkpoints of the example or the sweep, got .*nowhere"):
        evaluate.main(replace(config, runs=(tmp_path / "nowhere",)))
    with pytest.raises(ValueError, match="encoders must be of random, byol, dissect, got full"):
        evaluate.main(replace(config, encoders=("full",)))
    twin = tmp_path / "twin" / "byol"
    shutil.copytree(folder / "byol", twin)
    with pytest.raises(ValueError, match="one run a seed"):
        evaluate.main(replace(config, runs=(folder, twin)))
    others = tmp_path / "others.npz"
    np.savez(others, images=make_phantoms(96, 32, seed=5).images)
    with pytest.raises(ValueError, match="was not trained on these images"):
        evaluate.main(replace(config, data=others))
    with pytest.raises(ValueError, match="no results in"):
        evaluate.main(evaluate.Evaluation(out=tmp_path / "out2", report=True))
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "checkpoint.pt").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        evaluate.main(replace(config, runs=(plain,)))
    monkeypatch.chdir(folder / "byol")
    assert [each.name for each in find([Path()], ["byol"], device="cpu", unfinished=False)] == ["byol"]


def test_a_protocol_that_the_images_do_not_allow(tmp_path):
    """Left out aloud where all are asked for, refused where it is asked for by name."""
    config = replace(small(tmp_path)[1], protocols=())
    evaluate.main(config)
    names = {file.name.partition("-byol")[0] for file in config.out.glob("*-byol-seed0.json")}
    assert names == {"linear", "finetune", "anatomy"}
    with pytest.raises(ValueError, match="segment-frozen needs masks"):
        evaluate.main(replace(config, protocols=("segment-frozen",)))


def test_masks_of_their_own_are_tested_on_patients_never_pretrained_on(finished):
    folder, path = finished
    phantoms = make_phantoms(96, 32, seed=0)
    found = find([folder], [], device="cpu", unfinished=False)
    train, test = split_of(load_images(path, 32), found[0])
    known, asked = apart(phantoms, train)
    assert len(known) + len(asked) == 96
    assert set(asked.groups) == set(test.groups)
    assert not set(asked.groups) & set(train.groups)
    # A patient whose image was pretrained on is known, whatever the name.
    renamed = replace(phantoms, groups=phantoms.groups + 1000)
    seen = {image.tobytes() for image in train.images}
    assert not seen & {image.tobytes() for image in apart(renamed, train)[1].images}
    with pytest.raises(ValueError, match="need `groups`"):
        apart(replace(phantoms, groups=None), train)
    with pytest.raises(ValueError, match=r"of both patients pretrained on and others, got \d+ and 0 images"):
        apart(known, train)


# ---- each protocol ----


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
    run = Run(train, Pretraining(name, TINY, augmentation=views, optimization=QUICK), folder)
    return Subject(name, 0, run, run.model.student.encoder, train, test, (train, test))


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def unchanged(module: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_fine_tuning_learns_and_leaves_the_encoder_alone(tmp_path):
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


def test_batches_take_every_image_once_before_any_twice():
    torch.manual_seed(0)
    seen = torch.cat(list(finetune.batches(10, replace(SETTINGS, steps=7, batch_size=4))))
    assert seen.shape == (28,)
    assert seen[:10].sort().values.tolist() == seen[10:20].sort().values.tolist() == list(range(10))
    assert [len(batch) for batch in finetune.batches(3, replace(SETTINGS, steps=2))] == [3, 3]


@pytest.mark.parametrize("frozen", [True, False])
def test_segmentation_finds_the_blob_and_leaves_the_encoder_alone(frozen, tmp_path):
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


def test_segmentation_finds_what_is_rare(tmp_path):
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
    encoder = Encoder(1, replace(TINY, stem_stride=stride))
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


def test_the_probe_as_one_map_is_the_pipeline(tmp_path):
    subject = subject_on(toy(), tmp_path)
    net = localise.Probed(subject)
    features = [
        subject.run.encode(to_float(side.images), subject.encoder)[0].numpy() for side in (subject.train, subject.test)
    ]
    expected = fit(features[0], subject.train.labels[:, 0]).decision_function(features[1])
    with torch.no_grad():
        found = net(subject.run.normalize(to_float(subject.test.images)))[:, 0].numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


def test_grad_cam_looks_at_the_blob(tmp_path):
    subject = subject_on(toy(), tmp_path)
    tuned = replace(SETTINGS, steps=60, mask_lr=5e-3)
    net = segment.trained(subject, subject.train, 1, tuned, 0, frozen=False)
    seeing = replace(subject, encoder=net.encoder)
    scores = localise.measure(seeing, SETTINGS)
    assert scores["blob, by chance"][0] == pytest.approx(100 * 64 / 1024)
    assert max(value[0] for name, value in scores.items() if "layer" in name) > 2 * 6.25


def test_energy_by_hand():
    cam = np.zeros((3, 4, 4))
    cam[0, :2] = 1.0
    cam[1, 0, 0] = 3.0
    mask = np.zeros((3, 4, 4), np.uint8)
    mask[:, 0] = 1
    assert localise.energy(cam, mask).tolist() == [0.5, 1.0, 0.0]  # the empty map points nowhere


class Places(nn.Module):
    """A map that holds the row of each cell and noise; pooled features of no use."""

    scales = ("layer2",)

    def forward(self, images):
        rows = torch.linspace(-1, 1, 8)[None, None, :, None].expand(len(images), 1, 8, 8)
        noise = torch.randn(len(images), 1, 8, 8)
        return images.mean((2, 3)), [torch.cat([rows, noise], 1)]


def test_anatomy_tells_what_the_cell_knows(tmp_path):
    subject = replace(subject_on(toy(), tmp_path), encoder=Places())
    scores = anatomy.measure(subject, SETTINGS)
    assert scores["layer2, row"][0] > 99.9
    assert abs(scores["layer2, column"][0]) < 3
    corners = anatomy.tint(np.array([[-1.0, -1], [-1, 1], [1, -1], [1, 1]]))
    distances = np.abs(corners[:, None] - corners[None]).sum(-1)[np.triu_indices(4, 1)]
    assert distances.min() > 0.5  # four corners, four colours


def test_bits_is_the_mutual_information():
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


def test_place_alone_is_subtracted(tmp_path, monkeypatch):
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
def test_another_image_is_never_the_own(count, seed):
    order = codes.derangement(count, np.random.default_rng(seed))
    assert sorted(order) == list(range(count))
    assert not (order == np.arange(count)).any()


def test_cells_are_covered_not_at_all_by_half_or_more():
    masks = np.zeros((1, 4, 4), np.uint8)
    masks[0, :2, 2:] = 2  # any bit counts
    masks[0, 2:, 0] = 1
    assert codes.covered(masks, (2, 2)).tolist() == [[[0, 2], [1, 0]]]


def test_own_codes_are_those_of_the_teacher(finished):
    folder, path = finished
    found = find([folder], ["random", "dissect"], device="cpu", unfinished=False)
    never, subject = (subject_of(each, evaluate.Images(path, None, 0)) for each in found)
    model = subject.run.model.eval()
    images = subject.run.normalize(to_float(subject.test.images))
    with torch.no_grad():
        expected = model.quantizer(model.teacher(images)[1]).indices
    for stage, indices in zip(TINY.scales, expected, strict=True):
        np.testing.assert_array_equal(codes.own_codes(subject, subject.test)[stage], indices.numpy())
    assert subject.codes
    assert not never.codes
    assert codes.quantised_encoder(subject) is model.teacher.module.encoder
    assert codes.quantised_encoder(never) is never.encoder
    scores = codes.measure(subject, SETTINGS)
    assert {name.partition(", ")[2] for name in scores} == {
        "k-means", "k-means beyond place", "own", "own beyond place", "entropy"
    }  # fmt: skip


# ---- the report ----


def test_intervals_are_over_seeds_where_there_are_some():
    draws = [[70.0, 72.0], [74.0, 74.0], [75.0, 77.0]]
    mean, half = evaluation_report.interval(draws)
    means = [71.0, 74.0, 76.0]
    low, high = stats.t.interval(0.95, 2, np.mean(means), stats.sem(means))
    assert (mean - half, mean + half) == (pytest.approx(low), pytest.approx(high))
    one, half = evaluation_report.interval(draws[:1])
    assert (one, half) == (71.0, pytest.approx(stats.t.ppf(0.975, 1) * stats.sem(draws[0])))
    assert evaluation_report.interval([[5.0]]) == (5.0, None)


def test_differences_are_paired():
    a = {0: {"1%": [3.0, 5.0]}, 1: {"1%": [9.0, 9.0]}, 2: {"1%": [1.0, 1.0]}}
    b = {0: {"1%": [1.0, 1.0]}, 1: {"1%": [9.0, 8.0]}}
    assert evaluation_report.difference(a, b, "1%") == [[2.0, 4.0], [0.0, 1.0]]
    assert "| dissect over byol | 2 | 1.8\N{NO-BREAK SPACE}±" in evaluation_report.table_of(
        {"byol": b, "dissect": a}, 1
    )


# ---- the kNN probe ----


def test_the_knn_probe_tells_signal_from_noise():
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


def test_macro_auc_is_the_mean_over_findings():
    labels = np.array([[1, 0, 1], [0, 0, 1], [1, 0, 1], [0, 0, 1]])
    scores = np.array([[0.9, 0.1, 0.1], [0.8, 0.2, 0.2], [0.7, 0.3, 0.3], [0.1, 0.4, 0.4]])
    assert macro_auc(labels, scores) == 0.75  # of the first; the others have one value only
    with pytest.raises(ValueError, match="no finding has both values"):
        macro_auc(labels[:, 1:], scores[:, 1:])


def test_the_monitor_changes_nothing_about_the_run(finished, tmp_path):
    _, path = finished
    data = load_images(path, 32)
    train = data.subset(train_test_split(data)[0])
    config = Pretraining("dissect", TINY, optimization=QUICK)
    plain, watched = Run(train, config, tmp_path / "plain"), Run(train, config, tmp_path / "watched")
    plain.train(quiet=True)
    watched.train(quiet=True, monitor=knn_monitor(train))
    assert all(0 <= row["knn_auc"] <= 1 for row in watched.rows)
    for (name, a), (_, b) in zip(plain.model.named_parameters(), watched.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    with pytest.raises(ValueError, match="needs labels"):
        knn_monitor(replace(train, labels=None))
