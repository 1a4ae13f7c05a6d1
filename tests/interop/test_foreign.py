"""Run the checks of foreign.py in a process that can import the libraries."""

import pytest

from tests.foreign_libraries import run_beside
from tests.interop.foreign import CHECKS


@pytest.fixture(scope="module")
def passed(request):
    """Return the names of the checks that passed, and the errors."""
    printed, errors = run_beside(request.config.cache, "tests.interop.foreign")
    return printed.split(), errors


@pytest.mark.thorough
@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
def test_check_passes_with_the_library_itself(passed, check):
    names, errors = passed
    assert check in names, errors[-3000:]
