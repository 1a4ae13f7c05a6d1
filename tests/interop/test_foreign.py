"""Runs foreign.py beside the libraries it is about, in a process of its own."""

import pytest

from tests.foreign_libraries import run_beside
from tests.interop.foreign import CHECKS


@pytest.fixture(scope="module")
def passed(request):
    """The names of the checks that passed, and what was printed besides."""
    printed, errors = run_beside(request.config.cache, "tests.interop.foreign")
    return printed.split(), errors


@pytest.mark.slow
@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
def test_beside_the_library_itself(passed, check):
    names, errors = passed
    assert check in names, errors[-3000:]
