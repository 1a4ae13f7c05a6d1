"""Runs that take turns within a number of seconds end equally far, and as they would alone."""

from dataclasses import replace

import pytest

from examples.pretrain.__main__ import experiment
from examples.pretrain.phantoms import make_phantoms
from examples.pretrain.train import Run
from examples.pretrain.turns import train_in_turns
from tests.examples.test_pretrain import tiny_experiment
from tests.examples.tiny import QUICK, pretraining
from tests.laws import assert_same_bits

TWO = replace(QUICK, epochs=2)


@pytest.fixture(scope="module")
def phantoms():
    return make_phantoms(48, 32, seed=0)


class Counted:
    """A run that is trained in no time: the clock is set on by the seconds that an epoch takes."""

    def __init__(self, clock, seconds, epoch=0, epochs=3):
        self.clock, self.seconds, self.epoch, self.trained = clock, seconds, epoch, []
        self.config = pretraining("byol", replace(QUICK, epochs=epochs))

    def train(self, *, until, monitor, quiet):
        self.clock.now += self.seconds[min(len(self.trained), len(self.seconds) - 1)]
        self.epoch += 1
        assert self.epoch == until
        self.trained.append(self.epoch)


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.mark.parametrize(
    ("seconds", "reached", "over"),
    [
        (60, [3, 3], 36.0),
        (36, [3, 3], 36.0),  # to the second
        (35, [3, 2], 26.0),  # the last epoch, of 10 s, would end at 36 s
        (3, [1, 0], 2.0),  # another 2 s do not fit
        (0.001, [1, 0], 2.0),  # the first epoch is always begun
    ],
)
def test_turns_end_with_the_time(seconds, reached, over):
    clock = Clock()
    runs = [Counted(clock, [2.0]), Counted(clock, [10.0])]
    assert train_in_turns(runs, seconds, clock=clock) == (reached == [3, 3])
    assert [run.epoch for run in runs] == reached
    assert clock.now - 100 == over


def test_an_epoch_is_expected_to_take_as_long_as_the_longest_before():
    clock = Clock()
    runs = [Counted(clock, [9.0, 1.0], epochs=9)]  # the first one compiles
    assert not train_in_turns(runs, 20, clock=clock)
    assert clock.now - 100 == 12  # 11, and one more that could have taken 9


def test_the_run_that_is_behind_comes_first():
    clock = Clock()
    runs = [Counted(clock, [1.0], epoch=2), Counted(clock, [1.0])]
    assert not train_in_turns(runs, 2, clock=clock)
    assert [run.epoch for run in runs] == [2, 2]


def test_runs_in_turns_are_those_of_each_alone(phantoms, tmp_path):
    plans = [pretraining(name, TWO) for name in ("byol", "dissect")]
    turns = [Run(phantoms, plan, tmp_path / f"{plan.method}-turns") for plan in plans]
    assert train_in_turns(turns, 1e6, quiet=True)
    for run, plan in zip(turns, plans, strict=True):
        alone = Run(phantoms, plan, tmp_path / plan.method)
        alone.train(quiet=True)
        assert_same_bits(run.method.state_dict(), alone.method.state_dict())
        assert [row["loss"] for row in run.rows] == [row["loss"] for row in alone.rows]


def test_experiment_stops_and_continues(tmp_path, capsys):
    config = tiny_experiment(tmp_path, methods=("byol", "dissect"), optimization=TWO)
    assert experiment(replace(config, seconds=0.001)) == {}
    assert "0.001 s are over. Epochs of 2: byol 1, dissect 0." in capsys.readouterr().out
    assert (tmp_path / "curves.png").exists()
    assert not (tmp_path / "table.json").exists()
    assert list(experiment(replace(config, resume=True, seconds=1e6))["auc"]) == ["random", "byol", "dissect"]


def test_no_seconds_are_refused(tmp_path):
    with pytest.raises(ValueError, match="--seconds must be a number above 0, got 0"):
        experiment(tiny_experiment(tmp_path, seconds=0.0))
    assert not any(tmp_path.iterdir())
