"""Image sets and their checks, cropping and resizing."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.pretrain.data import ImageSet, load_images
from examples.pretrain.data.resize import resize
from tests.examples.data.loading import says


def test_a_subset_keeps_labels_groups_masks_and_split(rng):
    data = ImageSet(
        rng.integers(0, 256, (4, 6, 6, 3), np.uint8),
        np.array([0, 1, 2, 1]),
        np.array(["a", "b", "b", "c"]),
        rng.integers(0, 2, (4, 6, 6), np.uint8),
        np.array(["train", "test", "val", "test"]),
        ("x", "y", "z"),
    )
    for index in ([3, 1], np.array([False, True, False, True]), slice(1, 3), []):
        part = data.subset(index)
        where = np.arange(4)[index if len(part) else slice(0)]
        assert len(part) == len(where) == (0 if isinstance(index, list) and not index else 2)
        for name in ("images", "labels", "groups", "masks", "split"):
            np.testing.assert_array_equal(getattr(part, name), getattr(data, name)[where])
        assert part.label_names == data.label_names
    assert data.channels == 3
    assert ImageSet(data.masks).channels == 1


IMAGES = np.zeros((3, 4, 4), np.uint8)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"images": IMAGES.astype(np.float32)}, ("uint8 or uint16", "float32", "scale")),
        ({"images": IMAGES[0]}, ("(N, H, W)", "(4, 4)", "images[None]")),
        ({"images": IMAGES[..., None]}, ("(N, H, W)", "(3, 4, 4, 1)", "images[..., 0]")),
        ({"images": IMAGES[:, :3]}, ("square", "(3, 3, 4)", "load_images")),
        ({"labels": np.zeros(2, int)}, ("labels", "each of the 3", "(2,)", "same list")),
        ({"labels": np.zeros(3)}, ("labels", "integer", "float64")),
        ({"labels": np.zeros((3, 2, 2), int)}, ("labels", "(N, L)", "(3, 2, 2)")),
        ({"groups": np.zeros((3, 1), int)}, ("groups", "(N,)", "(3, 1)", "each patient")),
        ({"groups": np.zeros(3)}, ("groups", "integers or strings", "float64", "each patient")),
        ({"masks": np.zeros((3, 2, 2), np.uint8)}, ("masks", "(3, 4, 4)", "(3, 2, 2)", "size of the images")),
        ({"masks": np.zeros((3, 4, 4))}, ("masks", "uint8", "float64", "astype")),
        ({"split": np.array("train")}, ("split", "each of the 3", "()")),
    ],
)
def test_arrays_that_do_not_fit_are_refused(arguments, parts):
    with pytest.raises(ValueError, match=r".+") as error:
        ImageSet(**{"images": IMAGES, **arguments})
    says(error, *parts)


# ---- cropping and resizing ----


@pytest.mark.parametrize("shape", [(4, 10), (10, 4), (4, 9), (4, 4), (4, 10, 3)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_crop_to_the_centre_square_changes_no_pixel(rng, shape, dtype):
    image = rng.integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)
    top, left = (shape[0] - 4) // 2, (shape[1] - 4) // 2
    cut = resize(image, 4)
    assert cut.dtype == dtype
    np.testing.assert_array_equal(cut, image[top : top + 4, left : left + 4])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_shrinking_averages_and_growing_stays_in_range(dtype):
    top = np.iinfo(dtype).max
    checks = (np.indices((64, 64)).sum(0) % 2 * top).astype(dtype)
    inner = resize(checks, 8)[2:-2, 2:-2].astype(float)
    np.testing.assert_allclose(inner, top / 2, rtol=0.02)  # without antialiasing: 0 and `top`

    ramp = np.tile(np.linspace(0, top, 8), (8, 1)).astype(dtype)
    grown = resize(ramp, 32)
    assert grown.dtype == dtype
    assert (np.diff(grown.astype(int), axis=1) >= 0).all()
    assert (grown.min(), grown.max()) == (0, top)
    if dtype == np.uint16:
        assert (grown % 257 != 0).any()  # more than 8 bits survive


@given(value=st.integers(0, 65535), side=st.integers(1, 40), size=st.integers(1, 40))
def test_resizing_keeps_a_constant(value, side, size):
    assert (resize(np.full((side, side + 3), value, np.uint16), size) == value).all()


@pytest.mark.parametrize(
    ("size", "kind", "got"),
    [(0, ValueError, "0"), (-3, ValueError, "-3"), (32.0, TypeError, "32.0"), (True, TypeError, "True")],
)
def test_image_size_must_be_a_positive_integer(tmp_path, size, kind, got):
    with pytest.raises(kind) as error:
        load_images(tmp_path, size)
    says(error, "image_size must be", got)
