"""Evaluation of a finished run: same subsets for all, encoders left alone, labels decide."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from examples.dissect import evaluate
from examples.dissect.imageset import ImageSet
from examples.dissect.model import Model
from examples.dissect.phantoms import make_phantoms
from examples.dissect.probe import knn_auc, knn_monitor, macro_auc
from examples.dissect.train import Optimization, Pretraining, Run

TINY = Model(width=4, stem_stride=2, codebook_size=16, dim=8, hidden_dim=16, teacher_momentum=0.9)
QUICK = Optimization("adamw", lr=1e-3, weight_decay=1e-4, batch_size=16, epochs=2, warmup_epochs=1)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder as the example writes it, and the file of its images."""
    folder = tmp_path_factory.mktemp("run")
    phantoms = make_phantoms(96, 32, seed=0)
    path = folder / "images.npz"
    np.savez(path, images=phantoms.images, labels=phantoms.labels)
    data = evaluate.load_images(path, 32)
    train = data.subset(evaluate.train_test_split(data)[0])
    for method in ("byol", "dissect"):
        Run(train, Pretraining(method, TINY, optimization=QUICK), folder / method).train(quiet=True)
    return folder, path


def test_all_encoders_by_both_protocols(finished, capsys):
    folder, path = finished
    before = (folder / "dissect" / "checkpoint.pt").read_bytes()
    config = evaluate.Evaluation(folder, path, shares=(0.3, 1.0), subsets=2, steps=3)
    result = evaluate.main(config)
    assert list(result["auc"]) == ["random", "byol", "dissect"]
    for protocols in result["auc"].values():
        assert list(protocols) == ["linear", "finetune"]
        for by_share in protocols.values():
            assert {share: len(values) for share, values in by_share.items()} == {"0.3": 2, "1": 1}
            assert all(0 <= value <= 1 for values in by_share.values() for value in values)
    assert json.loads((folder / "evaluation.json").read_text())["auc"] == result["auc"]
    assert "| dissect | linear - finetune |" in (folder / "evaluation.md").read_text()
    assert "95% interval" in capsys.readouterr().out
    assert (folder / "dissect" / "checkpoint.pt").read_bytes() == before
    # The same again: nothing but seeds decides.
    assert evaluate.main(config)["auc"] == result["auc"]


def test_fine_tuning_learns_and_leaves_the_encoder_alone(tmp_path):
    """Bright on the left or on the right: two classes that a few steps tell apart."""
    rng = np.random.default_rng(0)
    labels = np.arange(120) % 2
    images = rng.integers(0, 60, (120, 32, 32))
    images[labels == 1, :, :16] += 150
    images[labels == 0, :, 16:] += 150
    data = ImageSet(images.astype(np.uint8), labels=labels)
    train, test = data.subset(np.arange(80)), data.subset(np.arange(80, 120))
    flipless = replace(Pretraining("byol", TINY, optimization=QUICK).augmentation, flip=0.0, crop_scale=(0.8, 1.0))
    run = Run(train, Pretraining("byol", TINY, augmentation=flipless, optimization=QUICK), tmp_path)
    encoder = run.model.student.encoder
    before = [parameter.clone() for parameter in encoder.parameters()]
    config = evaluate.Evaluation(tmp_path, steps=40)
    assert evaluate.finetuned(run, encoder, train, test, config, seed=0) > 0.9
    assert all(torch.equal(a, b) for a, b in zip(before, encoder.parameters(), strict=True))
    nonsense = replace(train, labels=np.random.default_rng(1).permutation(train.labels))
    assert evaluate.finetuned(run, encoder, nonsense, test, config, seed=0) < 0.9


def test_refusals(finished, tmp_path):
    folder, path = finished
    with pytest.raises(ValueError, match=r"no byol/checkpoint\.pt or dissect/checkpoint"):
        evaluate.main(evaluate.Evaluation(tmp_path, path))
    with pytest.raises(ValueError, match="protocols must be of linear, finetune, got knn"):
        evaluate.main(evaluate.Evaluation(folder, path, protocols=("knn",)))


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
    data = evaluate.load_images(path, 32)
    train = data.subset(evaluate.train_test_split(data)[0])
    config = Pretraining("dissect", TINY, optimization=QUICK)
    plain, watched = Run(train, config, tmp_path / "plain"), Run(train, config, tmp_path / "watched")
    plain.train(quiet=True)
    watched.train(quiet=True, monitor=knn_monitor(train))
    assert all(0 <= row["knn_auc"] <= 1 for row in watched.rows)
    for (name, a), (_, b) in zip(plain.model.named_parameters(), watched.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    with pytest.raises(ValueError, match="needs labels"):
        knn_monitor(replace(train, labels=None))
