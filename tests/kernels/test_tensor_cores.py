"""The emulation of tensor cores: known cases of what they cut off, and the bound that the search relies on."""

import numpy as np
import pytest

from tests.kernels.tensor_cores import MODELS, product


@pytest.mark.parametrize("core", MODELS.values(), ids=list(MODELS))
def test_small_integers_are_exact(core):
    generator = np.random.default_rng(0)
    a, b = (generator.integers(-8, 9, shape).astype(np.float16) for shape in ((5, 40), (40, 7)))
    start = generator.integers(-9, 10, (5, 7)).astype(np.float32)
    assert np.array_equal(product(a, b, start, core), start + a.astype(np.float32) @ b.astype(np.float32))


@pytest.mark.parametrize("core", MODELS.values(), ids=list(MODELS))
def test_a_number_far_below_the_largest_of_its_block_is_cut_off(core):
    for exponent in range(core.bits - 2, core.bits + 3):
        # Two large products that cancel out, and a 1.
        a = np.array([[2.0**14, -(2.0**14), 1.0]], np.float16)
        b = np.array([[2.0 ** (exponent - 14)], [2.0 ** (exponent - 14)], [1.0]], np.float16)
        assert product(a, b, np.zeros((1, 1), np.float32), core).item() == (1.0 if exponent <= core.bits else 0.0)


@pytest.mark.parametrize("core", MODELS.values(), ids=list(MODELS))
@pytest.mark.parametrize("width", [1, 16, 130])
def test_error_stays_within_the_bound_of_the_search(core, width):
    generator = np.random.default_rng(width)
    a, b = (generator.standard_normal(shape).astype(np.float16) for shape in ((50, width), (width, 60)))
    exact = a.astype(np.float64) @ b.astype(np.float64)
    off = np.abs(product(a, b, np.zeros((50, 60), np.float32), core) - exact)
    lengths = np.linalg.norm(a.astype(np.float64), axis=1)[:, None] * np.linalg.norm(b.astype(np.float64), axis=0)
    assert (off <= (width + 16) * 2.0**-23 * lengths).all()
    assert off.max() > 0 or width == 1


def test_infinities_and_nan_stay():
    a = np.array([[np.inf, 1.0], [np.nan, 1.0], [1.0, 1.0]], np.float16)
    found = product(a, np.ones((2, 1), np.float16), np.zeros((3, 1), np.float32), MODELS["H100"])
    assert np.isposinf(found[0, 0])
    assert np.isnan(found[1, 0])
    assert found[2, 0] == 2
