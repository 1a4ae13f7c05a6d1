"""Evaluation of finished runs: which runs, images and results are accepted, and which are refused."""

import json
import shutil
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.manifold import TSNE

from examples.pretrain import evaluate, finished_runs
from examples.pretrain.augment import Augmentation, to_float
from examples.pretrain.data import load_images, train_test_split
from examples.pretrain.finished_runs import apart, find, settings_of, split_of, subject_of
from examples.pretrain.phantoms import make_phantoms
from examples.pretrain.presets import PRESETS
from examples.pretrain.protocols import PROTOCOLS, Settings, anatomy, codes, segment
from examples.pretrain.reports import evaluation
from examples.pretrain.reports.outputs import Outputs
from examples.pretrain.train import Run
from examples.pretrain.variants import VARIANTS
from tests.examples.tiny import ENCODER, QUICK, pretraining

TWO_EPOCHS = replace(QUICK, epochs=2)
SETTINGS = Settings(shares=(0.3, 1.0), mask_shares=(0.4, 1.0), subsets=2, steps=3, clusters=16)


@pytest.fixture(autouse=True)
def _fast_tsne(monkeypatch):
    """Draw the t-SNE with a quarter of its iterations: tests need the file, not its quality."""
    monkeypatch.setattr(anatomy, "TSNE", partial(TSNE, max_iter=250))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder as the example writes it, and the file of its images."""
    folder = tmp_path_factory.mktemp("run")
    phantoms = make_phantoms(96, 32, seed=0)
    path = folder / "images.npz"
    np.savez(
        path,
        images=phantoms.images,
        labels=phantoms.labels,
        groups=phantoms.groups,
        masks=phantoms.masks,
        mask_kind="bits",
    )
    data = load_images(path, 32)
    train = data.subset(train_test_split(data)[0])
    for method in ("byol", "dissect"):
        Run(train, pretraining(method, TWO_EPOCHS), folder / method).train(quiet=True)
    return folder, path


@pytest.mark.thorough
def test_one_command_runs_all_protocols(finished, tmp_path, capsys):
    folder, path = finished
    before = (folder / "dissect" / "checkpoint.pt").read_bytes()
    config = evaluate.Evaluation(runs=(folder,), data=path, out=tmp_path, settings=SETTINGS)
    text = evaluate.main(config)
    results = {file.name: file.read_bytes() for file in tmp_path.glob("*.json")}
    assert len(results) == len(PROTOCOLS) * 3
    record = json.loads(results["finetune-dissect-seed0.json"])
    assert {share: len(values) for share, values in record["scores"].items()} == {"30%": 2, "100%": 1}
    assert record["settings"]["steps"] == 3
    assert record["pretraining"]["options"]["codebook_size"] == 16
    assert {"command", "date", "commit", "device", "cores", "versions"} <= record.keys()
    assert record["pretrained_on"] == [record["device"]]
    assert f"Device model: {record['device']}." in text
    # Phantoms have one bit of the mask for each finding; the columns have the names of the findings.
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
    # A finished result is not measured again, and the same settings give the same figures.
    (tmp_path / "linear-byol-seed0.json").unlink()
    assert evaluate.main(replace(config, protocols=("linear", "codes"))) == text
    assert {file.name: file.read_bytes() for file in tmp_path.glob("*.json")}.keys() == results.keys()
    again = json.loads((tmp_path / "linear-byol-seed0.json").read_text())
    assert again["scores"] == json.loads(results["linear-byol-seed0.json"])["scores"]
    with pytest.raises(ValueError, match=r"holds another result: settings\.steps was 3, is 4\. Give another --out"):
        evaluate.main(replace(config, settings=replace(SETTINGS, steps=4)))
    assert evaluate.main(evaluate.Evaluation(out=tmp_path, report=True)) == text


def small(
    tmp_path: Path,
    *,
    method: str = "byol",
    epochs: int = 2,
    labels: np.ndarray | None = None,
    groups: np.ndarray | None = None,
) -> tuple[Run, evaluate.Evaluation]:
    """Return a short run with its own file of images, which tests may change, and settings to evaluate it."""
    phantoms = make_phantoms(64, 32, seed=1)
    path = tmp_path / "images.npz"
    assert phantoms.labels is not None
    labels = phantoms.labels[:, 0].astype(np.int64) if labels is None else labels
    arrays = {"images": phantoms.images, "labels": labels} | ({} if groups is None else {"groups": groups})
    np.savez(path, **arrays)  # type: ignore[arg-type]
    data = load_images(path, 32)
    run = Run(data.subset(train_test_split(data)[0]), pretraining(method, TWO_EPOCHS), tmp_path / method)
    run.train(quiet=True, until=epochs)
    config = evaluate.Evaluation(runs=(tmp_path,), data=path, out=tmp_path / "out", settings=SETTINGS)
    return run, replace(config, protocols=("linear",))


@pytest.mark.thorough
def test_a_result_is_kept_for_the_same_checkpoint_and_images_only(tmp_path):
    run, config = small(tmp_path)
    text = evaluate.main(config)
    assert evaluate.main(config) == text
    assert "Images with labels: 14 are 30%, 48 are 100%." in text
    arrays = dict(np.load(config.data))
    images = arrays["images"].copy()
    images[train_test_split(load_images(config.data, 32))[1][0]] //= 2  # the same training images, other test images
    np.savez(config.data, **{**arrays, "images": images})
    with pytest.raises(ValueError, match=r"images\.test\.sha256 was \w+, is \w+"):
        evaluate.main(config)
    np.savez(config.data, **arrays)
    assert evaluate.main(config) == text
    with torch.no_grad():
        run.method.encoder.resnet.conv1.weight.mul_(2)
    run.save()
    with pytest.raises(ValueError, match=r"linear-byol-seed0.json .* checkpoint\.sha256 was \w+, is \w+"):
        evaluate.main(config)
    assert evaluate.main(replace(config, encoders=("random",))) == text  # it has no checkpoint


@pytest.mark.thorough
def test_masks_may_be_added_later(tmp_path):
    """A protocol without masks is not measured again, and shares the report with one that needs them."""
    masked = make_phantoms(64, 32, seed=1)
    groups = np.arange(64)
    _, config = small(tmp_path, groups=groups)
    evaluate.main(config)
    np.savez(tmp_path / "masks.npz", images=masked.images, masks=(masked.masks > 0).astype(np.uint8), groups=groups)
    text = evaluate.main(replace(config, protocols=("linear", "codes"), masks=tmp_path / "masks.npz"))
    assert "Mutual information" in text
    assert "Linear probe" in text


def test_masks_of_255_are_one_plane_and_organs_are_not_findings(tmp_path):
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
    np.savez(tmp_path / "organs.npz", images=images.images, masks=organs, groups=groups, mask_kind="bits")
    subject = subject_of(found, replace(config, masks=tmp_path / "organs.npz").images)
    assert PROTOCOLS["localise"].lacking(subject) == "a mask of each finding, as the phantoms have"
    assert PROTOCOLS["segment-frozen"].lacking(subject) is None


def test_runs_with_different_augmentations_are_refused(tmp_path):
    run, config = small(tmp_path)
    other = replace(run.config, augmentation=Augmentation(flip=0.0))
    Run(run.data, other, tmp_path / "dissect").train(quiet=True)
    with pytest.raises(
        ValueError, match=r"same augmentation, .* got .*byol and .*dissect, of which flip is 0\.5 and 0"
    ):
        evaluate.main(config)


@pytest.mark.thorough
def test_an_unfinished_run_is_only_evaluated_on_request(tmp_path):
    _, config = small(tmp_path, epochs=1)
    with pytest.raises(ValueError, match=r"finished run, got one after epoch 1 of 2: let it go on .* --unfinished"):
        evaluate.main(config)
    text = evaluate.main(replace(config, unfinished=True))
    assert "| byol@1 | 1 |" in text
    assert json.loads((config.out / "linear-byol@1-seed0.json").read_text())["checkpoint"]["epoch"] == 1
    # An untrained encoder is not unfinished.
    assert "| random | 1 |" in evaluate.main(replace(config, encoders=("random",), out=tmp_path / "never"))


def test_the_report_takes_more_seeds_and_refuses_other_settings(tmp_path):
    _, config = small(tmp_path)
    evaluate.main(config)
    record = json.loads((config.out / "linear-byol-seed0.json").read_text())
    other = config.out / "linear-byol-seed1.json"
    other.write_text(json.dumps({**record, "seed": 1, "settings": {**record["settings"], "subsets": 5}}))
    with pytest.raises(ValueError, match=r"seed 0 and linear of byol, seed 1 do not .* settings\.subsets is 2 and 5"):
        evaluation.write(config.out, Outputs())
    other.write_text(json.dumps({**record, "seed": 1}))
    assert "| byol | 2 |" in evaluation.write(config.out, Outputs())


@pytest.mark.thorough
def test_constant_labels_are_refused_not_scored(tmp_path):
    _, config = small(tmp_path, labels=np.zeros(64, np.int64))
    with pytest.raises(ValueError, match="linear needs labels that tell images apart"):
        evaluate.main(config)
    assert not list(config.out.glob("*.json"))
    evaluate.main(replace(config, protocols=()))
    assert {file.name.partition("-")[0] for file in config.out.glob("*.json")} == {"anatomy"}


def test_refusals_name_the_rule(finished, tmp_path, monkeypatch):
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


@pytest.mark.thorough
def test_a_protocol_without_its_masks_is_skipped_or_refused(tmp_path):
    """Skipped with a message if all protocols run, refused if it is named."""
    config = replace(small(tmp_path)[1], protocols=())
    evaluate.main(config)
    names = {file.name.partition("-byol")[0] for file in config.out.glob("*-byol-seed0.json")}
    assert names == {"linear", "finetune", "anatomy"}
    with pytest.raises(ValueError, match="segment-frozen needs masks"):
        evaluate.main(replace(config, protocols=("segment-frozen",)))


def test_separate_masks_are_tested_on_patients_not_pretrained_on(finished):
    folder, path = finished
    phantoms = make_phantoms(96, 32, seed=0)
    found = find([folder], [], device="cpu", unfinished=False)
    train, test = split_of(load_images(path, 32), found[0])
    known, asked = apart(phantoms, train)
    assert len(known) + len(asked) == 96
    assert set(asked.groups) == set(test.groups)
    assert not set(asked.groups) & set(train.groups)
    # An image that was pretrained on marks its patient, whatever the name.
    renamed = replace(phantoms, groups=phantoms.groups + 1000)
    seen = {image.tobytes() for image in train.images}
    assert not seen & {image.tobytes() for image in apart(renamed, train)[1].images}
    with pytest.raises(ValueError, match="need `groups`"):
        apart(replace(phantoms, groups=None), train)
    with pytest.raises(ValueError, match=r"of both patients pretrained on and others, got \d+ and 0 images"):
        apart(known, train)


def test_own_codes_are_those_of_the_teacher(finished):
    folder, path = finished
    found = find([folder], ["random", "dissect"], device="cpu", unfinished=False)
    never, subject = (subject_of(each, evaluate.Images(path, None, 0)) for each in found)
    method = subject.run.method.eval()
    images = subject.run.normalize(to_float(subject.test.images))
    with torch.no_grad():
        expected = method.quantizer(method.byol.teacher(images)[1]).indices
    for stage, indices in zip(ENCODER.scales, expected, strict=True):
        np.testing.assert_array_equal(codes.own_codes(subject, subject.test)[stage], indices.numpy())
    assert subject.codes
    assert not never.codes
    assert codes.quantised_encoder(subject) is method.byol.teacher.module.encoder
    assert codes.quantised_encoder(never) is never.encoder
    scores = codes.measure(subject, SETTINGS)
    assert {name.partition(", ")[2] for name in scores} == {
        "k-means", "k-means beyond place", "own", "own beyond place", "entropy"
    }  # fmt: skip


@pytest.mark.thorough
def test_a_method_without_teacher_or_codes_is_evaluated_by_its_own_maps(tmp_path):
    _, config = small(tmp_path, method="simsiam", groups=np.arange(64))
    images = make_phantoms(64, 32, seed=1)
    masks = (images.masks > 0).astype(np.uint8)
    np.savez(tmp_path / "masks.npz", images=images.images, masks=masks, groups=np.arange(64))
    text = evaluate.main(replace(config, protocols=("linear", "codes"), masks=tmp_path / "masks.npz"))
    assert text.count("| simsiam | 1 |") == 2
    scores = json.loads((config.out / "codes-simsiam-seed0.json").read_text())["scores"]
    assert {name.partition(", ")[2] for name in scores} == {"k-means", "k-means beyond place", "entropy"}
    [found, *_] = find(config.runs, ["simsiam"], device="cpu", unfinished=False)
    subject = subject_of(found, config.images)
    assert codes.quantised_encoder(subject) is subject.encoder
    assert not subject.codes


@pytest.mark.parametrize("name", [*VARIANTS, "simsiam"])
def test_settings_survive_a_checkpoint(name):
    config = VARIANTS[name](PRESETS["small"][1]) if name in VARIANTS else pretraining(name)
    assert settings_of(json.loads(json.dumps(asdict(config)))) == config


def test_a_checkpoint_of_an_unknown_method_is_refused_in_one_sentence(tmp_path, monkeypatch):
    _, config = small(tmp_path)
    monkeypatch.setattr(finished_runs, "METHODS", {})
    with pytest.raises(ValueError, match=r"checkpoint\.pt: .* settings that this version does not have: 'byol'"):
        evaluate.main(config)
