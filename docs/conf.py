"""Sphinx's configuration. `make docs` builds into docs/_build/html, offline, warnings being errors."""

from importlib.metadata import version as installed_version

project = "vqssl"
author = "vqssl contributors"
project_copyright = "2026, vqssl contributors"
release = version = installed_version("vqssl")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx_copybutton",
    "sphinx_design",
]
# What is in reliability/ are results and a part that training.md includes.
exclude_patterns = ["_build", "reliability/*"]

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
autodoc_typehints = "description"
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = f"vqssl {release}"
