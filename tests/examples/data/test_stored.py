"""Images in a file behave as the array that they are."""

import pickle

import numpy as np
import pytest

from examples.pretrain.augment import Normalize, to_float
from examples.pretrain.data import ImageSet
from examples.pretrain.data.stored import StoredImages
from tests.laws import assert_same_bits


@pytest.fixture(params=[((9, 6, 6), np.uint8), ((9, 6, 6, 3), np.uint16)], ids=["grey", "deep colour"])
def both(request, tmp_path, rng):
    shape, dtype = request.param
    array = rng.integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)
    np.save(tmp_path / "images.npy", array)
    return array, StoredImages(tmp_path / "images.npy")


WHERE = [3, slice(2, 5), slice(None, None, -2), [4, 1, 4], np.array([7, 0]), np.arange(9) % 2 == 0, np.array([], int)]


@pytest.mark.parametrize("where", WHERE, ids=str)
def test_index_gives_the_same_array(both, where):
    array, stored = both
    found = stored[where]
    assert type(found) is np.ndarray
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found, array[where])
    if not isinstance(where, int):
        selected = stored.select(where)
        assert selected.shape == array[where].shape
        np.testing.assert_array_equal(selected[::-1], array[where][::-1])
        np.testing.assert_array_equal(np.asarray(pickle.loads(pickle.dumps(selected))), array[where])


def test_shape_iteration_and_pixels_are_those_of_the_array(both):
    array, stored = both
    assert (stored.shape, stored.dtype, stored.ndim, len(stored)) == (array.shape, array.dtype, array.ndim, len(array))
    np.testing.assert_array_equal(list(stored), array)
    np.testing.assert_array_equal(stored[:, ::-1], array[:, ::-1])
    assert len(pickle.dumps(stored)) < 1000


def test_image_set_of_stored_images_is_the_same_set(both):
    array, stored = both
    groups = np.arange(9) // 2
    plain, kept = ImageSet(array, groups=groups), ImageSet(stored, groups=groups)
    assert plain.fingerprint == kept.fingerprint
    assert isinstance(kept.subset([8, 2]).images, StoredImages)
    assert plain.subset([8, 2]).fingerprint == kept.subset([8, 2]).fingerprint


def test_floats_and_statistics_are_the_same_bits(both):
    array, stored = both
    floats = to_float(stored)
    assert_same_bits(to_float(array), floats[:])
    for ours, theirs in zip(floats.split(4), to_float(array).split(4), strict=True):
        assert_same_bits(ours, theirs)
    assert_same_bits(to_float(array), floats.to("cpu"))
    assert_same_bits(dict(Normalize(array).state_dict()), dict(Normalize(stored).state_dict()))
    full = np.iinfo(array.dtype).max
    pixels = array.reshape(-1, Normalize(array).mean.numel()) / full
    np.testing.assert_allclose(Normalize(array).mean, pixels.mean(0), rtol=1e-6)
    np.testing.assert_allclose(Normalize(array).std, pixels.std(0), rtol=1e-6)
