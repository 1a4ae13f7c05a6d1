"""The split into training and test images: no patient and no identical image is on both sides."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from examples.pretrain.data import ImageSet, load_images, train_test_split
from tests.examples.data.loading import says
from tests.profiles import few

IMAGES = np.zeros((3, 4, 4), np.uint8)


def labelled_by(numbers):
    """One tiny image for each number, equal where the numbers are."""
    return np.repeat(np.array(numbers, np.uint8), 4).reshape(-1, 2, 2)


def components(groups, contents):
    """How many sets of images nothing ties together: the slow way."""
    tied = [{("group", g), ("content", c)} for g, c in zip(groups, contents, strict=True)]
    merged = []
    for node in tied:
        touching = [other for other in merged if other & node]
        merged = [other for other in merged if not other & node] + [set().union(node, *touching)]
    return len(merged)


IMAGE = st.tuples(st.integers(0, 12), st.integers(0, 30), st.integers(0, 2))


@given(
    images=st.lists(IMAGE, min_size=1, max_size=60),
    labelled=st.booleans(),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**32 - 1),
)
@example(images=[(i, i, i % 2) for i in range(12)], labelled=True, fraction=0.5, seed=0)
@example(images=[(0, 0, 0), (0, 1, 1), (1, 1, 0), (2, 2, 1)], labelled=True, fraction=0.5, seed=0)
@example(images=[(0, 0, 0), (1, 0, 1)], labelled=False, fraction=0.5, seed=0)
def test_no_patient_and_no_image_is_on_both_sides(images, labelled, fraction, seed):
    groups, contents, labels = (np.array(column) for column in zip(*images, strict=True))
    data = ImageSet(labelled_by(contents), labels if labelled else None, groups)
    if components(groups, contents) < 2:
        with pytest.raises(ValueError, match="at least 2 groups"):
            train_test_split(data, fraction, seed)
        return
    train, test = train_test_split(data, fraction, seed)
    assert sorted([*train, *test]) == list(range(len(images)))
    assert len(train) > 0
    assert len(test) > 0
    assert (np.diff(train) > 0).all()
    assert (np.diff(test) > 0).all()
    assert not set(groups[train]) & set(groups[test])
    assert not set(contents[train]) & set(contents[test])
    again = train_test_split(data, fraction, seed)
    np.testing.assert_array_equal(again[0], train)
    np.testing.assert_array_equal(again[1], test)


def test_without_groups_every_image_is_its_own_patient():
    images = labelled_by(range(40))
    names = np.array([f"p{i // 4}" for i in range(40)])
    train, test = train_test_split(ImageSet(images, groups=names), 0.3)
    assert not set(names[train]) & set(names[test])
    assert len(test) == 12
    _, test = train_test_split(ImageSet(images), 0.3)
    assert len(test) == 12
    assert len(set(test // 4)) > 3


def test_another_seed_gives_another_split():
    for data in (ImageSet(labelled_by(range(60))), ImageSet(labelled_by(range(60)), np.arange(60) % 3)):
        assert len({tuple(train_test_split(data, 0.25, seed)[1]) for seed in range(5)}) == 5


@pytest.mark.parametrize("fraction", few([0.25, 0.1, 0.3, 0.75]))
def test_the_split_is_stratified_by_class(fraction):
    labels = np.repeat(np.arange(240) < 48, 1).astype(int)
    groups = np.random.default_rng(0).integers(0, 200, 240) * 2 + labels
    data = ImageSet((np.arange(240 * 4).reshape(240, 2, 2)).astype(np.uint16), labels, groups)
    for seed in range(8):
        _, test = train_test_split(data, fraction, seed)
        # chance alone would scatter the 48 by 2 to 4
        assert abs(labels[test].sum() - 48 * fraction) <= 2
        assert abs(len(test) - 240 * fraction) <= 6


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, float("nan")])
def test_the_fraction_must_be_between_0_and_1(fraction):
    with pytest.raises(ValueError, match="test_fraction must be between 0 and 1") as error:
        train_test_split(ImageSet(IMAGES), fraction)
    says(error, str(fraction))


def test_a_single_unit_cannot_be_split():
    for data, got in (
        (ImageSet(IMAGES), "got 1 over 3 images"),  # three times the same
        (ImageSet(labelled_by(range(3)), groups=np.array([4, 4, 4])), "got 1 over 3 images"),
        (ImageSet(IMAGES[:0]), "got 0 over 0 images"),
    ):
        with pytest.raises(ValueError, match="at least 2 groups") as error:
            train_test_split(data)
        says(error, got, "add patients")


def test_a_named_split_must_have_two_sides_and_whole_patients():
    images = labelled_by(range(3))
    for names in (["train", "val", "train"], ["test"] * 3):
        with pytest.raises(ValueError, match="both") as error:
            train_test_split(ImageSet(images, split=np.array(names)))
        says(error, '"train" and "test"', str(sorted(set(names))), "drop the split")
    split = np.array(["train", "test", "val"])
    with pytest.raises(ValueError, match="each group on one side") as error:
        train_test_split(ImageSet(images, groups=np.array(["a", "b", "b"]), split=split))
    says(error, "1 groups", "first b", "drop the split")
    train, test = train_test_split(ImageSet(images, groups=np.array(["a", "b", "a"]), split=split))
    assert (train.tolist(), test.tolist()) == ([0, 2], [1])


def test_real_radiographs_are_split_by_patient(real_data):
    data = load_images(real_data / "kermany_cxr_64.npz", 64)
    assert data.images.shape == (5856, 64, 64)
    assert data.label_names == ("0", "1", "2")
    assert data.split is None  # the official one has 170 patients on both sides
    train, test = train_test_split(data, 0.2)
    assert len(train) + len(test) == 5856
    assert not set(data.groups[train]) & set(data.groups[test])
    assert not {data.images[i].tobytes() for i in train} & {data.images[i].tobytes() for i in test}
    assert abs(len(test) / 5856 - 0.2) < 0.02
    shares = [np.bincount(data.labels[side]) / len(side) for side in (train, test)]
    np.testing.assert_allclose(*shares, atol=0.02)
