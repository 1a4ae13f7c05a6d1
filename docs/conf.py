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
# Results, and parts that pages include.
exclude_patterns = ["_build", "reliability/*", "ablation/*"]

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
autodoc_typehints = "description"
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = f"vqssl {release}"
