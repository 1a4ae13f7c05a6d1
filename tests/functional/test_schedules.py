"""The momentum schedule: known values, ends, monotonicity, errors."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vqssl.functional import cosine_momentum

# 1 - (1 - m_0)(cos(pi t / T) + 1) / 2, BYOL's form, with the cosines written as roots.
TABLE = [
    (0, 12, 0.996, 0.996),
    (2, 12, 0.996, 1 - 0.004 * (math.sqrt(3) / 2 + 1) / 2),
    (3, 12, 0.996, 1 - 0.004 * (math.sqrt(2) / 2 + 1) / 2),
    (4, 12, 0.996, 0.997),
    (6, 12, 0.996, 0.998),
    (8, 12, 0.996, 0.999),
    (12, 12, 0.996, 1.0),
    (100, 12, 0.996, 1.0),
    (0, 1, 0.5, 0.5),
    (1, 1, 0.5, 1.0),
]


@pytest.mark.parametrize(("step", "total", "start", "expected"), TABLE)
def test_known_values(step, total, start, expected):
    found = cosine_momentum(step, total, start)
    assert type(found) is float
    assert found == pytest.approx(expected, rel=1e-15)


def test_default_start_and_end_are_those_of_the_paper():
    assert cosine_momentum(0, 300) == pytest.approx(0.996, rel=1e-15)
    assert cosine_momentum(300, 300) == 1.0


@given(
    total=st.integers(1, 10**6),
    start=st.floats(0, 1),
    end=st.floats(0, 1),
    steps=st.lists(st.integers(0, 2 * 10**6), min_size=2, max_size=8),
)
def test_is_monotonic_between_start_and_end(total, start, end, steps):
    values = [cosine_momentum(step, total, start, end) for step in sorted(steps)]
    rises = [(later - earlier) * (1 if end >= start else -1) for earlier, later in itertools.pairwise(values)]
    assert all(rise >= -1e-15 for rise in rises)
    assert all(min(start, end) - 1e-15 <= value <= max(start, end) + 1e-15 for value in values)
    assert cosine_momentum(0, total, start, end) == pytest.approx(start, abs=1e-15)
    assert cosine_momentum(total, total, start, end) == end
    assert cosine_momentum(total + 1, total, start, end) == end


@given(step=st.integers(0, 100), start=st.floats(0, 1), end=st.floats(0, 1))
def test_is_symmetric_about_half_the_run(step, start, end):
    there, back = cosine_momentum(step, 100, start, end), cosine_momentum(100 - step, 100, start, end)
    assert there + back == pytest.approx(start + end, abs=1e-15)


def test_numpy_numbers_give_a_python_float():
    """torch.load(weights_only=True) refuses NumPy scalars in a checkpoint."""
    assert type(cosine_momentum(np.int64(3), np.int64(10), np.float64(0.9), np.float64(1.0))) is float
    assert type(cosine_momentum(3, 10, 0, 1)) is float


@pytest.mark.parametrize(
    ("error", "says", "arguments"),
    [
        (ValueError, "start must be from 0 to 1", {"start": 1.1}),
        (ValueError, "start must be from 0 to 1", {"start": math.nan}),
        (ValueError, "end must be from 0 to 1", {"end": -0.1}),
        (TypeError, "start must be a number", {"start": "0.9"}),
        (ValueError, "total_steps must be at least 0", {"total_steps": -1}),
        (ValueError, "step must not be negative", {"step": -1}),
    ],
)
def test_wrong_arguments_are_refused(error, says, arguments):
    with pytest.raises(error, match=says):
        cosine_momentum(**{"step": 0, "total_steps": 10, **arguments})
