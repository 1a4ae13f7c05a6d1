"""Protocols that train read each batch from the images' file: the same bits, and never many images at a time."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from examples.pretrain.data.stored import StoredImages
from examples.pretrain.protocols import PROTOCOLS, segment
from examples.pretrain.protocols.subject import areas, planes
from tests.examples.test_protocols import SETTINGS, subject_on, toy
from tests.profiles import few

FEW = replace(SETTINGS, batch_size=8)


class Watched(StoredImages):
    """Images in a file that count how many are read at a time."""

    most = 0

    def __getitem__(self, where):
        found = super().__getitem__(where)
        Watched.most = max(Watched.most, len(found))
        return found

    def select(self, where):
        return Watched(self.path, self.index[where])


@pytest.mark.parametrize("name", few(["finetune", "segment-frozen", "segment-tuned"]))
def test_images_in_a_file_give_the_same_scores_and_are_read_by_batches(name, tmp_path, monkeypatch):
    data = toy(count=400)
    np.save(tmp_path / "images.npy", data.images)
    subject = subject_on(data, tmp_path)
    stored = subject_on(replace(data, images=Watched(tmp_path / "images.npy")), tmp_path)
    monkeypatch.setattr(Watched, "most", 0)
    assert PROTOCOLS[name].measure(stored, FEW) == PROTOCOLS[name].measure(subject, FEW)
    # The largest are those of encode, and of a network's predictions.
    assert Watched.most == (256 if name == "finetune" else segment.BATCH)


def test_dice_by_batches_is_dice_at_once(tmp_path, monkeypatch):
    subject = subject_on(toy(), tmp_path)
    net = segment.trained(subject, subject.train, 1, FEW, 0, frozen=True)
    whole = segment.dice(subject, net, subject.test, 1)
    monkeypatch.setattr(segment, "BATCH", 7)
    assert segment.dice(subject, net, subject.test, 1) == whole


def test_areas_are_the_sums_of_the_planes():
    masks = np.random.default_rng(0).integers(0, 8, (150, 5, 5), dtype=np.uint8)
    np.testing.assert_array_equal(areas(masks, 3), planes(masks, 3).sum((2, 3)))
    assert areas(masks[:0], 3).shape == (0, 3)
    expected = torch.from_numpy(planes(masks, 3)).float().mean((0, 2, 3))
    np.testing.assert_allclose(areas(masks, 3).sum(0) / masks.size, expected)
