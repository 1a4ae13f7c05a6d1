"""Every number among the options of every command: the command works, or refuses in one line before it starts."""

import dataclasses
import math
import warnings

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from examples.pretrain import __main__ as pretrain
from examples.pretrain import ablate, compare, evaluate
from examples.pretrain.divergence import Diverged
from examples.pretrain.methods import METHODS
from examples.pretrain.methods.ranges import RANGES, check_options, numbers
from examples.pretrain.phantoms import make_phantoms
from examples.pretrain.presets import PRESETS, Experiment
from examples.pretrain.train import Run
from tests.examples.tiny import ENCODER, OPTIONS, QUICK

ODD = [-3, -1, 0, 1, 2, 3, 5, 64, math.nan, math.inf, -math.inf, 0.5, 1e-9, 1e30, -1e-3]
LONG = {"phantoms", "subsets", "epochs", "trials", "steps", "image_size", "warmup_epochs", "iterations", "seeds"}
"""Options of which a large number is a long work, and no fault."""


def leaves(options, path=()):
    """Yield path and value of each number, or tuple of numbers, in nested dataclasses and dicts."""
    parts = (
        options.items() if isinstance(options, dict) else [(f.name, getattr(options, f.name)) for f in fields(options)]
    )
    for name, value in parts:
        if dataclasses.is_dataclass(value) or isinstance(value, dict):
            yield from leaves(value, (*path, name))
        elif numbers(value):
            yield (*path, name), value


def fields(options):
    return dataclasses.fields(options)


def changed(options, path, value):
    """Return the options with another value at a path."""
    name, *rest = path
    if isinstance(options, dict):
        return {**options, name: changed(options[name], rest, value) if rest else value}
    return dataclasses.replace(options, **{name: changed(getattr(options, name), rest, value) if rest else value})


def odd_value(like):
    """Draw a value of the type of an option's: an int, a float, or a tuple of as many."""
    if isinstance(like, tuple):
        return st.tuples(*[odd_value(each) for each in like])
    kept = [value for value in ODD if isinstance(value, int) or not isinstance(like, int)]
    return st.sampled_from(kept).map(type(like))


def refused(function):
    """Return what a call says that it refuses in one line; None if it works. Anything else is a fault."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            function()
        except (ValueError, TypeError, Diverged, OSError, MemoryError) as error:
            said = str(error)
        else:
            return None
    assert len(said) > 15
    assert "\n" not in said
    return said


TINY = Experiment("t", phantoms=48, image_size=16, subsets=1, encoder=ENCODER, options=OPTIONS,
                  optimization=dataclasses.replace(QUICK, epochs=1))  # fmt: skip
PLACES = [path for path, _ in leaves(TINY)]


@pytest.fixture(scope="module")
def images():
    return make_phantoms(48, 16, seed=0)


@st.composite
def experiments(draw):
    """The tiny experiment with an odd value for one option, and the method that has it."""
    path, value = draw(st.sampled_from(list(leaves(TINY))))
    method = path[1] if path[0] == "options" else draw(st.sampled_from(["byol", "dissect"]))
    found = draw(odd_value(value))
    assume(path[-1] not in LONG or max(numbers(found)) <= 64)
    return path, dataclasses.replace(changed(TINY, path, found), methods=(method,))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(drawn=experiments())
def test_what_passes_the_checks_builds_a_run(drawn, images, tmp_path):
    _, config = drawn

    def build():
        pretrain.check(config)
        Run(images, config.pretraining(config.methods[0]), tmp_path / "run")

    refused(build)
    assert not (tmp_path / "run").exists()


@pytest.mark.thorough
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(drawn=experiments())
def test_whole_command_works_or_refuses_in_one_line(drawn, tmp_path_factory):
    _, config = drawn
    out = tmp_path_factory.mktemp("run") / "out"
    said = refused(lambda: pretrain.experiment(dataclasses.replace(config, out=out)))
    assert said is None or not list(out.rglob("checkpoint.pt")) or "diverged" in said


OTHERS = {
    "evaluate": (evaluate.Evaluation(), lambda config, folder: evaluate.main(dataclasses.replace(config, out=folder))),
    "compare": (compare.Comparison(), lambda config, folder: compare.check(dataclasses.replace(config, out=folder))),
    "ablate": (
        ablate.Ablation(),
        lambda config, folder: ablate.sweep(dataclasses.replace(config, data=folder / "none.npz", results=folder)),
    ),
}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), name=st.sampled_from(list(OTHERS)))
def test_other_commands_refuse_in_one_line(data, name, tmp_path):
    config, function = OTHERS[name]
    path, value = data.draw(st.sampled_from(list(leaves(config))))
    threads = torch.get_num_threads()
    try:
        refused(lambda: function(changed(config, path, data.draw(odd_value(value))), tmp_path / "out"))
    finally:
        torch.set_num_threads(threads)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", METHODS)
def test_every_number_of_a_method_has_a_range(name):
    assert {path[-1] for path, _ in leaves(METHODS[name].Options())} <= set(RANGES)


@pytest.mark.parametrize("name", METHODS)
def test_the_presets_are_in_the_ranges(name):
    for _, preset in PRESETS.values():
        check_options(name, preset.options[name])
