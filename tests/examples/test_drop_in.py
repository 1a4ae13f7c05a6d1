"""Each drop-in script runs, trains all its parts, and differs in at most fifteen lines from the script without vqssl.

Scripts about timm, lightly, Lightning and transformers run in a separate process. These libraries are fetched once into
a folder of pytest's cache, and are never installed in this environment. `python -m tests.examples.test_drop_in NAME...`
is that process: it prints a line of JSON for each script.
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
from tests.guide_diffs import GUIDES, SCRIPTS, with_diff
from tests.interop.foreign import make_torchvision_importable
from tests.profiles import few
from vqssl import EMACodebook

ALONE = ("byol", "vq_vae", "signals_1d", "volumes_3d")
WITH_LIBRARIES = ("hugging_face", "lightly_byol", "lightly_simsiam", "lightning_module", "timm_features", "timm_vit")
CHANGED = 15  # lines, imports included
STEPS = 10


# ---- the difference ----


def code(path):
    """Return the lines that are neither blank nor a comment."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


def test_every_guide_has_both_scripts():
    for folder in (SCRIPTS, SCRIPTS / "before"):
        assert {path.stem for path in folder.glob("*.py")} - {"__init__", "data"} == {*ALONE, *WITH_LIBRARIES}


@pytest.mark.parametrize("name", [*ALONE, *WITH_LIBRARIES])
def test_scripts_differ_in_few_lines(name):
    before, after = code(SCRIPTS / "before" / f"{name}.py"), code(SCRIPTS / f"{name}.py")
    changed = [line for line in difflib.ndiff(before, after) if line.startswith("+ ")]
    assert 0 < len(changed) <= CHANGED, "\n".join(changed)
    assert len(after) <= 90


@pytest.mark.parametrize("name", [*ALONE, *WITH_LIBRARIES])
def test_guide_shows_the_current_difference(name):
    page = (GUIDES / f"{name}.md").read_text(encoding="utf-8")
    assert page == with_diff(page, name), "run python -m tests.guide_diffs"
    assert f"(../../examples/drop_in/{name}.py)" in page  # readable on GitHub and on the site


# ---- a run ----


def run(name):
    """Train a script for a few steps; return what `check` needs, in JSON's types."""
    script = import_module(f"examples.drop_in.{name}")
    _, early = script.main(1)
    losses, model = script.main(STEPS)
    old = early.state_dict()
    # Projections are fixed. All other floating tensors must move: weights, codes, the teacher, BatchNorm.
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
        "still": [key for key, value in moving.items() if value.equal(old[key])],
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


@pytest.mark.parametrize("name", few(ALONE, 3))
def test_script_trains_all_parts(name):
    check(run(name))


@pytest.mark.parametrize("name", few(["vq_vae", "before/vq_vae", "byol", "before/byol"], 2))
def test_script_prints_loss_and_perplexity(name, capsys):
    runpy.run_path(str(SCRIPTS / f"{name}.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("loss ")
    assert [line.split()[0] for line in lines[1:]] == ([] if "before" in name else ["perplexity"])


# ---- with other libraries ----


@pytest.fixture(scope="module")
def results(request):
    """Return what each script printed, by name, and the errors."""
    printed, errors = run_beside(request.config.cache, "tests.examples.test_drop_in", *WITH_LIBRARIES)
    lines = [json.loads(line) for line in printed.splitlines() if line.startswith('{"script"')]
    return {line["script"]: line for line in lines}, errors


@pytest.mark.thorough
@pytest.mark.parametrize("name", WITH_LIBRARIES)
def test_script_with_library_trains_all_parts(results, name):
    found, errors = results
    assert name in found, errors[-3000:]
    check(found[name])


if __name__ == "__main__":
    registered = make_torchvision_importable()  # unregistered when garbage-collected
    for script in sys.argv[1:]:
        try:
            print(json.dumps({"script": script, **run(script)}), flush=True)
        except Exception:  # the other scripts still run
            traceback.print_exc()
