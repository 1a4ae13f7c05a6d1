"""Unknown findings take no part: each finding's score is that of the images alone of which it is known."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch.nn import functional as F

from examples.pretrain.data import ImageSet
from examples.pretrain.protocols import PROTOCOLS, finetune
from examples.pretrain.protocols.knn import knn_auc
from examples.pretrain.protocols.labels import label_subset, learnable, macro_auc, subset_size, transfer_auc
from examples.pretrain.protocols.linear import fit, linear_probe
from examples.pretrain.reports import pictures
from tests.examples.test_protocols import SETTINGS, subject_on, toy

UNKNOWN = 0.4


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def side(rng, count, findings=3):
    """Return features that tell something of the findings, and findings of which a part is unknown."""
    truth = rng.integers(0, 2, (count, findings)).astype(np.int8)
    features = np.concatenate([truth, truth], 1) + rng.standard_normal((count, 2 * findings))
    return features, np.where(rng.random(truth.shape) < UNKNOWN, np.int8(-1), truth)


def one_by_one(score, train, test):
    """Return the mean over findings of `score` on the known rows of both sides alone."""
    found = []
    for finding in range(train[1].shape[1]):
        known, asked = train[1][:, finding] >= 0, test[1][:, finding] >= 0
        found.append(score(*((x[rows], y[rows][:, [finding]].astype(np.uint8)) for (x, y), rows in
                             ((train, known), (test, asked)))))  # fmt: skip
    return np.mean(found)


def test_linear_probe_of_each_finding_is_the_one_fit_on_its_known_rows(rng):
    train, test = side(rng, 300), side(rng, 200)

    def oracle(known, asked):
        model = fit(known[0], known[1][:, 0])
        return roc_auc_score(asked[1][:, 0], model.predict_proba(asked[0])[:, 1])

    assert linear_probe(train, test, (1.0,))[1.0] == [one_by_one(oracle, train, test)]
    # What stands at unknown places cannot matter, because no value of them is read as yes or no.
    as_zeros = linear_probe((train[0], np.maximum(train[1], 0)), test, (1.0,))[1.0]
    assert as_zeros != linear_probe(train, test, (1.0,))[1.0]


def test_neighbours_whose_finding_is_unknown_have_no_vote(rng):
    train, test = side(rng, 300), side(rng, 200)
    assert knn_auc(train, test) == pytest.approx(one_by_one(knn_auc, train, test), abs=1e-12)


def test_auc_is_over_known_images(rng):
    (_, known), (_, labels) = side(rng, 50), side(rng, 80)
    scores = rng.random(labels.shape)
    rows = [labels[:, finding] >= 0 for finding in range(3)]
    expected = np.mean([roc_auc_score(labels[row, i], scores[row, i]) for i, row in enumerate(rows)])
    assert macro_auc(labels, scores) == expected
    assert transfer_auc(known, labels, np.arange(3), scores) == expected


def test_finding_that_is_never_known_to_be_absent_is_not_learnable():
    known = np.array([[1, 0, -1], [-1, 1, 0], [1, 1, -1]], np.int8)
    asked = np.array([[1, 0, 1], [0, 1, 0]], np.int8)
    assert learnable(known, asked).tolist() == [1]
    assert learnable(asked, known).tolist() == [1]


def test_subsets_hold_both_known_values_of_each_finding(rng):
    _, labels = side(rng, 400)
    labels[:, 0] = -1
    labels[7:13, 0] = [0, 1, 0, 1, 1, 1]
    assert subset_size(labels, 0.01) == 8
    for seed in range(20):
        drawn = labels[label_subset(labels, 0.05, seed)]
        assert all((column == value).sum() >= 2 for column in drawn.T for value in (0, 1))
    labels[:, 1] = -1  # of a finding of which nothing is known, nothing is asked
    assert len(label_subset(labels, 0.05, 0)) == 20


def test_loss_of_fine_tuning_is_the_mean_over_known_findings(rng):
    logits = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    findings = torch.from_numpy(np.where(rng.random((6, 4)) < UNKNOWN, -1, rng.integers(0, 2, (6, 4)))).double()
    known = findings >= 0
    expected = F.binary_cross_entropy_with_logits(logits[known], findings[known])
    found = finetune.known_findings_loss(logits, findings)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(found, logits)
    assert (gradient[~known] == 0).all()
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, logits)[0], rtol=1e-12, atol=1e-15)
    nothing = finetune.known_findings_loss(logits, torch.full_like(findings, -1))
    assert nothing.item() == 0
    assert (torch.autograd.grad(nothing, logits)[0] == 0).all()


@pytest.mark.thorough
def test_protocols_measure_images_with_unknown_findings(rng, tmp_path):
    """Fine-tuning on images of which nothing is known besides is that on the others, but for BatchNorm's batches."""
    data = toy()
    labels = np.concatenate([data.labels, 1 - data.labels], 1).astype(np.int8)
    labels[rng.random(labels.shape) < UNKNOWN] = -1
    subject = subject_on(replace(data, labels=labels, masks=None, label_names=("blob", "none")), tmp_path)
    for name in ("linear", "finetune"):
        assert PROTOCOLS[name].unfit(subject, SETTINGS) is None
        values = np.concatenate(list(PROTOCOLS[name].measure(subject, SETTINGS).values()))
        assert ((values >= 0) & (values <= 100)).all()
    # Learnt from known findings, found again in those that are known.
    assert finetune.finetuned(subject, subject.train, replace(SETTINGS, steps=60, lr=3e-3), 0) > 0.6


def test_known_findings_train_as_before_they_could_be_unknown(tmp_path):
    data = toy()
    subject = subject_on(data, tmp_path)
    signed = subject_on(replace(data, labels=data.labels.astype(np.int8)), tmp_path)
    for name in ("linear", "finetune"):
        assert PROTOCOLS[name].measure(subject, SETTINGS) == PROTOCOLS[name].measure(signed, SETTINGS)


def test_pictures_name_the_findings_that_are_there(tmp_path, rng, monkeypatch):
    images = rng.integers(0, 255, (4, 16, 16), dtype=np.uint8)
    labels = np.array([[1, -1], [-1, -1], [0, 1], [0, 0]], np.int8)
    data = ImageSet(images, labels, label_names=("edema", "fracture"))
    figures = []
    monkeypatch.setattr(pictures, "save_figure", lambda figure, *_, **__: figures.append(figure))
    pictures.code_maps(data, {"layer2": np.zeros((4, 4, 4), int)}, tmp_path / "maps.png")
    titles = {axes.get_title() for axes in figures[0].axes}
    assert {"edema", "fracture", "no finding"} <= titles
    assert not any("," in title for title in titles)
