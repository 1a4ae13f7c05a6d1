"""A random generator for the tests on data."""

import numpy as np
import pytest


@pytest.fixture
def rng():
    return np.random.default_rng(0)
