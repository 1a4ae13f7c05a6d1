"""Run the checks of foreign_losses.py in a process that can import lightly."""

import pytest

from tests.examples.foreign_losses import CHECKS
from tests.foreign_libraries import run_beside


@pytest.fixture(scope="module")
def passed(request):
    """Return the names of the checks that passed, and the errors."""
    printed, errors = run_beside(request.config.cache, "tests.examples.foreign_losses")
    return printed.split(), errors


@pytest.mark.thorough
@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
def test_loss_is_that_of_lightly(passed, check):
    names, errors = passed
    assert check in names, errors[-3000:]
