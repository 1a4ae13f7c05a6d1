"""The notebooks to which the README links are those of the gallery."""

import json
from pathlib import Path

from tests.site.built import SITE

NOTEBOOKS = Path(__file__).parents[2] / "examples" / "notebooks"


def cells(path):
    """Return what a notebook holds, without the version of Python in its header."""
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def test_notebooks_are_those_of_the_gallery():
    built = {path.name: path for path in SITE.glob("_downloads/*/plot_*.ipynb")}
    assert sorted(built) == sorted(path.name for path in NOTEBOOKS.glob("*.ipynb"))
    again = "build the docs, then copy docs/gallery/*.ipynb to examples/notebooks"
    assert all(cells(NOTEBOOKS / name) == cells(path) for name, path in built.items()), again
