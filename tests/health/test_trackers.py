"""W&B, MLflow and trackio give back what the code of docs/logging.md logs, in a process that can import them."""

import re

import pytest

from tests.foreign_libraries import TRACKERS, run_beside
from tests.health.trackers import READERS, blocks


@pytest.fixture(scope="module")
def passed(request):
    """Return the names of the trackers that passed, and the errors."""
    printed, errors = run_beside(request.config.cache, "tests.health.trackers", libraries=TRACKERS)
    return re.findall(r"gives back every figure: (.*)", printed), errors


def test_page_has_a_block_for_each_tracker():
    assert blocks()[1].keys() == READERS.keys()


@pytest.mark.thorough
@pytest.mark.parametrize("name", READERS)
def test_tracker_gives_back_every_figure(passed, name):
    names, errors = passed
    assert name in names, errors[-3000:]
