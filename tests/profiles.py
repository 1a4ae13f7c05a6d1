"""Cases of a law that the default profile leaves out."""

from collections.abc import Iterable
from typing import Any

import pytest


def few(cases: Iterable[Any], count: int = 1) -> list[Any]:
    """Return cases for `parametrize`: the first `count` run always, the others with `--thorough`.

    A case that is a tuple is one value for each argument of the test, as in `parametrize`.
    """
    cases = list(cases)
    return [*cases[:count], *map(thorough, cases[count:])]


def thorough(case: Any) -> Any:
    """Return a case that runs with `--thorough` alone."""
    values = case if isinstance(case, tuple) else (case,)
    return pytest.param(*values, marks=pytest.mark.thorough)
