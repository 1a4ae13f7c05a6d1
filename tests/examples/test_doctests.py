"""The examples in the docstrings of the example hold."""

import doctest
import importlib
from pathlib import Path

import pytest

from examples import pretrain

ROOT = Path(pretrain.__path__[0])
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in ROOT.rglob("*.py") if ">>>" in path.read_text()
)


@pytest.mark.parametrize("name", MODULES)
def test_docstrings_hold(name):
    module = importlib.import_module(f"examples.pretrain.{name}")
    failed, attempted = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert failed == 0
    assert attempted > 0
