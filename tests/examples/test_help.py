"""`python3 examples --help` answers without an environment, and says what is true."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from examples.__main__ import HELP
from examples.pretrain.methods import METHODS
from examples.pretrain.presets import PRESETS, Experiment

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_needs_no_environment_and_makes_none(option, tmp_path):
    nowhere = tmp_path / "venv"
    # -S: without packages, as before anything is installed.
    ran = subprocess.run(
        [sys.executable, "-S", "-E", ROOT / "examples", option],
        env={"VQSSL_VENV": str(nowhere), "PATH": ""},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout == HELP
    assert ran.stderr == ""
    assert not nowhere.exists()


def test_help_names_every_preset_in_its_own_words():
    listed = re.findall(r"^  (\w+) +(.*)$", HELP.partition("some options")[0], flags=re.MULTILINE)
    assert listed == [(name, about) for name, (about, _) in PRESETS.items()]
    assert listed[0][0] == "demo"  # what main puts where no preset is named


def test_options_of_the_help_exist():
    fields = {field.name: field for field in dataclasses.fields(Experiment)}
    named = [name.replace("-", "_") for name in re.findall(r"^  --([a-z-]+)", HELP, flags=re.MULTILINE)]
    assert len(named) >= 7
    assert set(named) <= set(fields)
    methods = re.search(r"such as (.*), which are the default", HELP).group(1).split()
    assert tuple(methods) == fields["methods"].default
    assert set(methods) <= set(METHODS)
