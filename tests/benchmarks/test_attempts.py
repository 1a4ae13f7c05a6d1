"""Attempts to break the library or the example survive."""

import pytest

from benchmarks.attempts.attempt import Attempt, Outcome, load, run_here

# Those that start programs take half an hour together, and those of the search measure time, which no test does:
# `python -m benchmarks.attempts` runs them. What they found is tested beside the code that it concerns, too.
IN_THIS_PROCESS = ("codebook_state", "codes", "images", "protocols", "teacher")


@pytest.mark.thorough
@pytest.mark.parametrize("one", load(*IN_THIS_PROCESS), ids=lambda one: one.name)
@pytest.mark.filterwarnings("ignore")
def test_survives(one):
    outcome = run_here(one)
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
