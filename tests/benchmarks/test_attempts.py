"""Every attempt to break the library or the example survives."""

import pytest

from benchmarks.attempts.__main__ import run_in
from benchmarks.attempts.attempt import ROOT, Attempt, Outcome, load, run_here


@pytest.mark.thorough
@pytest.mark.parametrize("one", load(), ids=lambda one: one.name)
def test_survives(one):
    outcome = run_in(ROOT, one)
    assert outcome.survived, f"{one.title}: right is {one.right}, seen was {outcome.seen}"


def test_each_says_what_is_done_and_what_is_right():
    attempts = load()
    assert len({one.title for one in attempts}) == len(attempts)
    assert all(one.title and one.right for one in attempts)


def test_exception_is_an_outcome_that_did_not_survive():
    def fails():
        raise ValueError("first line\nsecond line")

    one = Attempt("kind", "kind.name", "title", "right", 1, fails)
    assert run_here(one) == Outcome(False, "ValueError: first line")
