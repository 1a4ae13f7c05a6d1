"""Every third-party import is declared where it is used, and every declared package is used."""

import ast
import functools
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
REQUIREMENTS = ROOT / ".ci" / "requirements"
OURS = {"vqssl", "examples", "tests", "benchmarks"}

# What each folder may import beside the package's dependencies: "health" is the extra, the others are requirement
# files. The longest folder that holds a file counts.
MAY_IMPORT = {
    "vqssl": {"health"},
    "examples": {"examples"},
    "examples/gallery": {"docs"},
    "benchmarks": {"bench"},
    "tests": {"test"},
    "tests/site": {"test", "docs"},
    "docs": {"docs"},
}
# These run before there is an environment.
STANDARD_LIBRARY_ONLY = (".ci/environment.py", "examples/__main__.py", "tests/__main__.py")

BESIDE = "needs torchvision, so tests/foreign_libraries.py fetches it into a folder outside the environment"
TRACKER = "brings dozens of packages, so tests/foreign_libraries.py fetches it into a folder outside the environment"
OPTIONAL = {
    "flash_kmeans": "a GPU library that benchmarks.search compares itself with where it is installed",
    "accelerate": BESIDE,
    "encodec": BESIDE,
    "mlflow": TRACKER,
    "lightly": BESIDE,
    "lightning": BESIDE,
    "pyarrow": "writes parquet for vqssl.tokens where it is installed; tests/foreign_libraries.py fetches it",
    "timm": BESIDE,
    "torchvision": BESIDE,
    "transformers": BESIDE,
    "tensorboard": "a writer for who has it; the example says how to install it",
    "trackio": TRACKER,
    "wandb": TRACKER,
    "triton": "CUDA builds of torch bring theirs; .ci/kernels.txt names the one for tests",
}
"""Modules that no requirement declares, and why: each is imported late, or by a script for who has it."""

DISTRIBUTION = {"PIL": "pillow", "faiss": "faiss-cpu", "sklearn": "scikit-learn"}
"""Module to distribution, where the names differ by more than a hyphen."""

USED_WITHOUT_IMPORT = {
    "build": (".ci/run", "-m build"),
    "codespell": (".ci/run", "-m codespell_lib"),
    "furo": ("docs/conf.py", 'html_theme = "furo"'),
    "mypy": (".ci/run", "-m mypy"),
    "myst-parser": ("docs/conf.py", "myst_parser"),
    "onnx": ("tests/reliability/test_compile_and_export.py", "torch.onnx.export"),
    "onnxscript": ("tests/reliability/test_compile_and_export.py", "torch.onnx.export"),
    "pytest-cov": ("tests/__main__.py", "--cov"),
    "pytest-xdist": ("tests/__main__.py", "--dist"),
    "ruff": (".ci/run", "-m ruff"),
    "sphinx": (".ci/run", "-m sphinx"),
    "sphinx-copybutton": ("docs/conf.py", "sphinx_copybutton"),
    "sphinx-design": ("docs/conf.py", "sphinx_design"),
    "sphinx-gallery": ("docs/conf.py", "sphinx_gallery"),
    "sphinx-mathjax-offline": ("docs/conf.py", "sphinx-mathjax-offline"),
    "twine": (".ci/run", "-m twine"),
}
"""Distribution to a file and the text in it that needs the distribution."""


# ---- what is declared ----


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def split(requirement):
    """'onnx>=1.17' -> ('onnx', '>=1.17')."""
    name, bounds = re.fullmatch(r"([A-Za-z0-9._-]+)\s*(\S*)", requirement).groups()
    return name.lower().replace("_", "-"), bounds


def lines_of(path):
    lines = (line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line]


def own(group):
    """Name to bounds of what a requirement file, or the extra `health`, names itself."""
    if group == "health":
        return dict(map(split, project()["optional-dependencies"]["health"]))
    return dict(split(line) for line in lines_of(REQUIREMENTS / f"{group}.txt") if not line.startswith("-r "))


def everything(group):
    """Names of what a requirement file, or the extra, installs; with the files that it includes."""
    names = set(own(group))
    if group != "health":
        for line in lines_of(REQUIREMENTS / f"{group}.txt"):
            if line.startswith("-r "):
                names |= everything(Path(line.removeprefix("-r ")).stem)
    return names


def dependencies():
    return dict(map(split, project()["dependencies"]))


GROUPS = ("health", *sorted(path.stem for path in REQUIREMENTS.glob("*.txt")))


# ---- what is imported ----


@functools.cache
def imported(source):
    """Third-party modules that `source` imports anywhere, by statement or by a call with a literal name."""
    modules = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            modules.add(node.module)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
            if function in ("import_module", "importorskip"):
                modules.add(node.args[0].value)
    if "torch.utils.tensorboard" in modules:
        modules.add("tensorboard")
    return {module.partition(".")[0] for module in modules} - OURS - sys.stdlib_module_names


def distribution(module):
    return DISTRIBUTION.get(module, module.lower().replace("_", "-"))


def undeclared(source, groups):
    """Modules that `source` imports and none of `groups` installs."""
    allowed = set(dependencies()).union(*map(everything, groups))
    return {module for module in imported(source) - set(OPTIONAL) if distribution(module) not in allowed}


def area_of(path):
    """The longest folder of MAY_IMPORT that holds `path`."""
    return max((folder for folder in MAY_IMPORT if ROOT / folder in path.parents), key=len)


def files(folder):
    return sorted(path for path in (ROOT / folder).rglob("*.py") if area_of(path) == folder)


# ---- the laws ----


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_every_import_is_declared(folder):
    found = {
        str(path.relative_to(ROOT)): missing
        for path in files(folder)
        if (missing := undeclared(path.read_text(encoding="utf-8"), MAY_IMPORT[folder]))
    }
    assert found == {}, f"declare these in {MAY_IMPORT[folder]}, or name them in OPTIONAL with the reason"


@pytest.mark.parametrize("path", STANDARD_LIBRARY_ONLY)
def test_commands_start_with_the_standard_library_alone(path):
    assert imported((ROOT / path).read_text(encoding="utf-8")) == set()


def test_every_declared_package_is_used():
    used = {folder: set() for folder in MAY_IMPORT}
    for folder, modules in used.items():
        for path in files(folder):
            modules |= {distribution(module) for module in imported(path.read_text(encoding="utf-8"))}
    assert set(dependencies()) <= used["vqssl"]
    assert set(own("health")) <= used["vqssl"]
    everywhere = {group: set() for group in GROUPS}
    for folder, groups in MAY_IMPORT.items():
        for group in groups:
            everywhere[group] |= used[folder]
    # `python -m vqssl.health` shows the checkpoints of the example, and the gallery calls it.
    everywhere["examples"] |= set(own("health"))
    for group in GROUPS:
        assert set(own(group)) - everywhere[group] - set(USED_WITHOUT_IMPORT) == set(), group


@pytest.mark.parametrize("name", USED_WITHOUT_IMPORT)
def test_a_package_that_no_file_imports_is_used_where_it_is_said(name):
    path, text = USED_WITHOUT_IMPORT[name]
    assert any(name in own(group) for group in GROUPS)
    assert text in (ROOT / path).read_text(encoding="utf-8")


def test_no_optional_module_is_declared_or_forgotten():
    assert {distribution(module) for module in OPTIONAL}.isdisjoint(set().union(*map(everything, GROUPS)))
    found = {module for folder in MAY_IMPORT for path in files(folder) for module in imported(path.read_text("utf-8"))}
    assert set(OPTIONAL) <= found


@pytest.mark.parametrize("group", ["examples", "test", "docs", "bench", "dev"])
def test_health_works_where_it_is_tested_and_shown(group):
    assert set(own("health")) <= everything(group)


def test_a_package_has_one_range_and_one_exact_version():
    ranges = [*dependencies().items(), *(pair for group in GROUPS for pair in own(group).items())]
    assert len(dict(ranges)) == len(set(ranges)), "one package, two ranges"
    pinned = dict(split(line) for line in lines_of(ROOT / ".ci" / "constraints.txt"))
    assert all(bounds.startswith("==") for bounds in pinned.values())
    assert {name for name, _ in ranges} - set(pinned) == set(), "not in .ci/constraints.txt"


def test_a_users_only_extra_is_health():
    assert set(project()["optional-dependencies"]) == {"health"}


# ---- tests of the test ----


@pytest.mark.parametrize(
    ("source", "groups"),
    [
        ("import scipy.stats", {"health"}),
        ("def late():\n    from sklearn.manifold import TSNE", {"health"}),
        ("import faiss", {"examples"}),
        ("try:\n    import pandas\nexcept ImportError:\n    pass", {"docs", "bench", "dev"}),
        ("importlib.import_module('pandas.core')", {"test"}),
        ("pytest.importorskip('onnx')", {"examples"}),
    ],
)
def test_an_undeclared_import_is_seen(source, groups):
    assert len(undeclared(source, groups)) == 1


@pytest.mark.parametrize(
    ("source", "groups"),
    [
        ("import torch.nn, numpy as np, einops", {"health"}),
        ("import ast, os.path\nfrom . import pandas\nfrom examples.pretrain import data", {"health"}),
        ("import rich.table", {"health"}),
        ("import PIL.Image, sklearn, pytorch_optimizer", {"examples"}),
        ("import scipy", {"bench"}),
        ("import_module(name)", {"health"}),
        ("import triton", {"health"}),
    ],
)
def test_a_declared_import_is_no_violation(source, groups):
    assert undeclared(source, groups) == set()
