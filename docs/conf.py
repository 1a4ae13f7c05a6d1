"""Configuration of Sphinx. `make docs` builds into docs/_build/html, offline; warnings are errors."""

import sys
from importlib.metadata import version as installed_version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "_ext")]  # the gallery and the tables use the repository's own code

project = "vqssl"
author = "vqssl contributors"
project_copyright = "2026, vqssl contributors"
release = version = installed_version("vqssl")

extensions = [
    "tables",
    "pictures",
    "search_words",
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx_gallery.gen_gallery",
    "sphinx-mathjax-offline",
]
exclude_patterns = [
    "_build",
    "_templates",
    "_generated",  # parts that pages include
    "gallery/*.py",
    "gallery/*.ipynb",
]

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
autosummary_generate = True
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
templates_path = ["_templates"]
html_static_path = ["_static"]
html_css_files = ["vqssl.css"]
html_favicon = "_static/favicon.svg"

html_theme = "furo"
html_title = f"vqssl {release}"
html_theme_options = {"footer_icons": [], "navigation_with_keys": True}

sphinx_gallery_conf = {
    "examples_dirs": str(ROOT / "examples" / "gallery"),
    "gallery_dirs": "gallery",
    "filename_pattern": r"plot_",
    "within_subsection_order": "FileNameSortKey",
    "download_all_examples": False,
    "show_signature": False,
    "remove_config_comments": True,
    "abort_on_example_error": True,
    "min_reported_time": 1e9,  # times depend on the machine
    "show_memory": False,
    "write_computation_times": False,
    "thumbnail_size": (400, 260),
    "image_scrapers": ("matplotlib",),
    "reset_modules": ("matplotlib", "pictures.use_style"),
}
