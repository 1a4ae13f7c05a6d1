"""Masks as class numbers, bits or planes: said by the file or an option, refused where ambiguous."""

import numpy as np
import pytest

from examples.pretrain.data import Reading, load_images
from examples.pretrain.data.masks import bits_of, joined_planes
from examples.pretrain.protocols.subject import planes
from tests.examples.data.loading import refuses, says

CLASSES = np.zeros((2, 8, 8), np.uint8)
CLASSES[:, :4, :3], CLASSES[:, :4, 5:], CLASSES[:, 5:] = 1, 2, 3


def write(folder, masks, **more):
    path = folder / "x.npz"
    np.savez(path, images=np.zeros((2, 8, 8), np.uint8), masks=masks, **more)
    return path


def test_class_numbers_become_one_plane_each(tmp_path):
    by_file = load_images(write(tmp_path, CLASSES, mask_kind="classes"), 8).masks
    by_option = load_images(write(tmp_path, CLASSES), 8, reading=Reading(mask_kind="classes")).masks
    for masks in (by_file, by_option):
        np.testing.assert_array_equal(planes(masks, 3), np.stack([kind == CLASSES for kind in (1, 2, 3)], 1))


def test_all_eight_classes_have_a_plane():
    masks = np.arange(9, dtype=np.uint8).reshape(1, 3, 3)
    np.testing.assert_array_equal(planes(bits_of(masks, "classes"), 8)[0], [masks[0] == kind for kind in range(1, 9)])


@pytest.mark.parametrize("top", [1, 3])
def test_class_255_is_in_no_plane_and_said(top):
    masks = np.minimum(CLASSES, top)
    masks[:, 4] = 255
    with pytest.warns(UserWarning, match=r"12\.5% of the pixels of masks are 255, to ignore"):
        found = bits_of(masks, "classes")
    np.testing.assert_array_equal(found, bits_of(np.where(masks == 255, 0, masks), "classes"))


@pytest.mark.parametrize("values", [(0,), (1,), (0, 1), (0, 255), (0, 1, 2), (0, 1, 2, 4), (0, 1, 4)])
def test_masks_that_mean_one_thing_need_no_kind(tmp_path, values):
    masks = np.resize(np.array(values, np.uint8), (2, 8, 8))
    np.testing.assert_array_equal(load_images(write(tmp_path, masks), 8).masks, masks)


@pytest.mark.parametrize(
    "values", [(0, 1, 2, 3), (0, 1, 2, 255), (0, 1, 255), (0, 128), (0, 85, 170, 255), (0, 2), (0, 64, 128)]
)
def test_ambiguous_masks_are_refused(tmp_path, values):
    masks = np.resize(np.array(values, np.uint8), (2, 8, 8))
    path = write(tmp_path, masks)
    refuses(path, f"values {', '.join(map(str, values[1:]))}", "class numbers, bits or shades", "--mask-kind", size=8)
    np.testing.assert_array_equal(load_images(path, 8, reading=Reading(mask_kind="bits")).masks, masks)


def test_class_numbers_above_eight_are_refused(tmp_path):
    for value in (9, 128, 254):
        refuses(
            write(tmp_path, np.full((2, 8, 8), value, np.uint8), mask_kind="classes"), "0 to 8", f"{value}", "renumber"
        )


def test_kind_of_file_and_option_must_agree(tmp_path):
    refuses(write(tmp_path, CLASSES, mask_kind="labels"), "`mask_kind` must be", "'labels'")
    with pytest.raises(ValueError, match=r".+") as error:
        load_images(write(tmp_path, CLASSES, mask_kind="classes"), 8, reading=Reading(mask_kind="bits"))
    says(error, "agree with --mask-kind", "'classes' and 'bits'")


@pytest.mark.parametrize("top", [1, 255, True])
def test_planes_become_bits_and_may_overlap(tmp_path, rng, top):
    each = rng.integers(0, 2, (2, 3, 8, 8)).astype(bool)
    masks = load_images(write(tmp_path, each if top is True else each.astype(np.uint8) * np.uint8(top)), 8).masks
    np.testing.assert_array_equal(planes(masks, 3), each)


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.zeros((2, 9, 8, 8), np.uint8), "1 to 8 planes"),
        (np.full((2, 3, 8, 8), 2, np.uint8), "0 and 1, or 0 and 255"),
        (np.zeros((2, 8, 8, 3), np.uint8), "images' shape"),
    ],
)
def test_other_planes_are_refused(tmp_path, array, said):
    refuses(write(tmp_path, array), said, size=8)


def test_planes_and_classes_of_the_same_structures_are_the_same():
    each = np.stack([kind == CLASSES for kind in (1, 2, 3)], 1).astype(np.uint8)
    np.testing.assert_array_equal(joined_planes(each), bits_of(CLASSES, "classes"))
