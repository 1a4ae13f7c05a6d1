"""Each drop-in story runs, trains what it says, and is at most fifteen changed lines away from the user's own script.

Stories about timm, lightly, Lightning and transformers run in a process of its own, beside the libraries, which are
fetched into a folder of pytest's cache once and never come into this environment. `python -m
tests.examples.test_drop_in NAME...` is that process: it prints a line of JSON for each story.
"""

import difflib
import json
import math
import runpy
import sys
import traceback
from importlib import import_module

import pytest
import torch

from tests.foreign_libraries import run_beside
from tests.guide_diffs import GUIDES, with_diff
from tests.guide_diffs import STORIES as FOLDER
from tests.interop.foreign import make_torchvision_importable
from vqssl import EMACodebook

HERE = ("byol", "vq_vae", "signals_1d", "volumes_3d")
BESIDE = ("hugging_face", "lightly_byol", "lightly_simsiam", "lightning_module", "timm_features", "timm_vit")
CHANGED = 15  # lines, imports included
STEPS = 10


# ---- the difference ----


def code(path):
    """Lines that are neither blank nor a comment."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


def test_every_story_has_both_scripts():
    for folder in (FOLDER, FOLDER / "before"):
        assert {path.stem for path in folder.glob("*.py")} - {"__init__", "data"} == {*HERE, *BESIDE}


@pytest.mark.parametrize("name", [*HERE, *BESIDE])
def test_a_user_changes_few_lines(name):
    before, after = code(FOLDER / "before" / f"{name}.py"), code(FOLDER / f"{name}.py")
    changed = [line for line in difflib.ndiff(before, after) if line.startswith("+ ")]
    assert 0 < len(changed) <= CHANGED, "\n".join(changed)
    assert len(after) <= 90


@pytest.mark.parametrize("name", [*HERE, *BESIDE])
def test_the_guide_shows_the_difference(name):
    page = (GUIDES / f"{name}.md").read_text(encoding="utf-8")
    assert page == with_diff(page, name), "run python -m tests.guide_diffs"
    assert f"(../../examples/drop_in/{name}.py)" in page  # the whole of it, wherever the page is read


# ---- what a run does ----


def run(name):
    """What there is to know of a story after a few steps, as JSON knows it."""
    script = import_module(f"examples.drop_in.{name}")
    _, early = script.main(1)
    losses, model = script.main(STEPS)
    was = early.state_dict()
    # Projections are fixed; all else that has a fraction is to move: weights, codes, the teacher, BatchNorm.
    moving = {
        key: value
        for key, value in model.state_dict().items()
        if isinstance(value, torch.Tensor) and value.is_floating_point() and "projections" not in key
    }
    trained = [(key, parameter.grad) for key, parameter in model.named_parameters() if parameter.requires_grad]
    return {
        "before": import_module(f"examples.drop_in.before.{name}").main(2)[0],
        "losses": losses,
        "perplexities": [book.usage().perplexity.item() for book in model.modules() if isinstance(book, EMACodebook)],
        "still": [key for key, value in moving.items() if value.equal(was[key])],
        "not finite": [key for key, value in moving.items() if not value.isfinite().all()],
        "without gradient": [key for key, gradient in trained if gradient is None or not gradient.abs().sum() > 0],
    }


def check(found):
    assert len(found["before"]) == 2
    assert all(map(math.isfinite, [*found["before"], *found["losses"]]))
    assert len(found["losses"]) == STEPS
    assert sum(found["losses"][-3:]) < sum(found["losses"][:3]), found["losses"]
    assert found["perplexities"]
    assert min(found["perplexities"]) > 4, found["perplexities"]
    assert (found["still"], found["not finite"], found["without gradient"]) == ([], [], [])


@pytest.mark.parametrize("name", HERE)
def test_a_story(name):
    check(run(name))


@pytest.mark.parametrize("name", ["byol", "before/byol", "vq_vae", "before/vq_vae"])
def test_a_script_says_what_it_did(name, capsys):
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("loss ")
    assert [line.split()[0] for line in said[1:]] == ([] if "before" in name else ["perplexity"])


# ---- beside the libraries ----


@pytest.fixture(scope="module")
def told(request):
    """What each story printed, by name, and the errors."""
    printed, errors = run_beside(request.config.cache, "tests.examples.test_drop_in", *BESIDE)
    lines = [json.loads(line) for line in printed.splitlines() if line.startswith('{"story"')]
    return {line["story"]: line for line in lines}, errors


@pytest.mark.slow
@pytest.mark.parametrize("name", BESIDE)
def test_a_story_beside_its_library(told, name):
    found, errors = told
    assert name in found, errors[-3000:]
    check(found[name])


if __name__ == "__main__":
    registered = make_torchvision_importable()  # gone where nothing holds it
    for story in sys.argv[1:]:
        try:
            print(json.dumps({"story": story, **run(story)}), flush=True)
        except Exception:  # the others are to be heard
            traceback.print_exc()
