"""Fingerprints change with every image, their order, and what is known about them; and with nothing else."""

from dataclasses import replace

import numpy as np
import pytest

from examples.pretrain.data import ImageSet
from examples.pretrain.data.fingerprint import changes, is_fingerprint, side_of


@pytest.fixture
def data(rng):
    count = 200  # more than the 64 that earlier versions looked at
    return ImageSet(
        rng.integers(0, 256, (count, 8, 8), np.uint8),
        labels=np.arange(count) % 3,
        groups=np.array([f"p{number // 2}" for number in range(count)]),
        masks=rng.integers(0, 2, (count, 8, 8), np.uint8),
        label_names=("a", "b", "c"),
        names=np.array([f"{number:03}.png" for number in range(count)]),
    )


def difference(before, now, **options):
    return changes(before.fingerprint, now.fingerprint, now.images, **options)


def test_equal_images_have_equal_fingerprints(data):
    copy = replace(
        data,
        images=np.asfortranarray(data.images),
        labels=data.labels.astype(np.int32),
        groups=data.groups.astype("U40"),  # another longest name elsewhere in the file
    )
    assert copy.fingerprint == data.fingerprint
    assert is_fingerprint(data.fingerprint)
    assert side_of(data.fingerprint) == 8


def test_one_value_of_one_image_changes_it(data):
    for index in (0, 1, 101, 199):
        images = data.images.copy()
        images[index, 3, 5] ^= 1
        assert difference(data, replace(data, images=images)) == ["the training images are others"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda images: images[:, :, ::-1], "the training images are others"),
        (lambda images: images[:, ::-1], "the training images are others"),
        (lambda images: images[::-1], "the training images are in another order"),
        (lambda images: images[:100], "the training images were (200, 8, 8) uint8, are (100, 8, 8) uint8"),
        (lambda images: images.astype(np.uint16), "the training images were (200, 8, 8) uint8, are (200, 8, 8) uint16"),
        (lambda images: np.concatenate([images[:1], images[:-1]]), "the training images are others"),
    ],
    ids=["mirrored", "upside down", "reversed", "half", "depth", "twice"],
)
def test_message_says_how_the_images_differ(data, change, said):
    other = ImageSet(np.ascontiguousarray(change(data.images)))
    assert difference(data, other) == [said]


@pytest.mark.parametrize("name", ["labels", "groups", "masks", "names"])
def test_message_names_what_differs_beside_the_images(data, name):
    other = replace(data, **{name: np.roll(getattr(data, name), 1, axis=0)})
    assert difference(data, other) == [f"their {name} are others"]
    assert difference(data, other, images_only=True) == []
    # What one of the two does not know cannot differ: labels may be added to a run.
    assert difference(data, replace(data, **{name: None})) == []
    assert difference(replace(data, **{name: None}), data) == []


def test_fingerprint_of_an_earlier_version_is_compared_by_its_own_rule(data):
    old = f"{data.images.shape} uint8 {int(data.images[::3].sum(dtype='uint64'))}"
    assert is_fingerprint(old)
    assert side_of(old) == 8
    assert changes(old, data.fingerprint, data.images) == []
    assert changes(old[:-1] + "x", data.fingerprint, data.images) == ["the training images are others"]
    assert not is_fingerprint("images")
