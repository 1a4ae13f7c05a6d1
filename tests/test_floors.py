"""Floors: each part imports only from floors below, and `import vqssl` loads little."""

import ast
import functools
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import vqssl

PACKAGE = Path(vqssl.__file__).parent

# What each part of vqssl may import of the others, from the ground up. A part is a module or folder directly under
# vqssl/; it may always import its own submodules. A new part needs a line here.
MATHS = {"types", "checks", "kernels", "functional", "distributed", "loading"}
POLICIES = {"initialization", "revival", "projection"}
FOREIGN = {"foreign_keywords", "foreign_methods"}
BELOW_CODEBOOK = MATHS | POLICIES | FOREIGN | {"update", "agreement", "codebook_options", "codebook_state"}
SAVED = {
    "codebook", "multiscale", "residual", "product", "random_projection", "channels_first", "fusion", "prediction",
    "code_heads", "code_targets", "centring", "place_centring",
}  # fmt: skip
MAY_IMPORT = {
    "types": set(),
    "checks": set(),
    "copying": set(),
    "foreign_keywords": set(),
    "foreign_methods": set(),
    # Tensors in, tensors out
    "kernels": set(),
    # Pure maths, and the distributed calls
    "functional": {"types", "checks", "kernels", "distributed"},
    "distributed": {"types", "checks", "kernels"},
    "agreement": {"checks", "distributed"},
    # What load_state_dict refuses
    "loading": {"checks", "distributed"},
    # Policies as objects, and the update of codebooks
    "initialization": MATHS,
    "revival": MATHS,
    "projection": MATHS | {"foreign_keywords"},
    "state_dtype": set(),
    "update_steps": MATHS | {"revival"},
    "fused_update": MATHS | {"revival", "update_steps"},
    "update": MATHS | {"revival", "update_steps", "fused_update"},
    "codebook_options": MATHS | POLICIES,
    "codebook_state": MATHS,
    "first_codes": MATHS | {"initialization", "codebook_state"},
    "codebook": BELOW_CODEBOOK | {"first_codes", "state_dtype"},
    # Quantisers, targets, losses and health: each usable alone
    "several_codebooks": {"types", "codebook"},
    "multiscale": BELOW_CODEBOOK | {"codebook", "several_codebooks"},
    "residual": BELOW_CODEBOOK | {"codebook", "several_codebooks"},
    "product": BELOW_CODEBOOK | {"codebook", "several_codebooks"},
    "fitting": BELOW_CODEBOOK | {"codebook"},
    "channels_first": {"types", "checks"},
    "random_projection": MATHS | {"foreign_keywords", "state_dtype"},
    "fusion": MATHS | POLICIES | {"foreign_keywords"},
    "wide_averages": {"distributed"},
    "following": {"copying", "distributed"},
    "teacher": MATHS | FOREIGN | {"copying", "following", "wide_averages"},
    "centring": MATHS | {"foreign_keywords"},
    "place_centring": MATHS | {"foreign_keywords"},
    "code_targets": MATHS,
    "code_heads": MATHS,
    "prediction_inputs": {"types", "checks"},
    "prediction": MATHS | FOREIGN | {"centring", "code_targets", "code_heads", "multiscale", "prediction_inputs"},
    "objective": MATHS | {"foreign_keywords"},
    # Codes of a data set in files
    "atomic_file": set(),
    "shards": set(),
    "token_folder": {"atomic_file", "shards"},
    "tokenising": {"checks", "shards", "token_folder"},
    # Every module by name
    "constructor_options": MATHS | POLICIES | SAVED,
    "saving": MATHS | POLICIES | SAVED | {"atomic_file", "constructor_options"},
    "health": MATHS
    | POLICIES
    | {"atomic_file", "codebook", "multiscale", "residual", "product", "random_projection", "saving"},
}
MAY_IMPORT["experimental"] = MAY_IMPORT["fitting"] | {"constructor_options"}
# State dicts of other libraries
MAY_IMPORT["interop"] = set(MAY_IMPORT)


def part_of(module: str) -> str:
    """Return 'kernels' for 'vqssl.kernels.nearest', '' for the package itself."""
    return module.partition(".")[2].partition(".")[0]


def imports_of_vqssl(source: str, module: str, *, is_package: bool) -> list[tuple[int, str]]:
    """Return line and part of every import of vqssl in `source`, also of those inside functions."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                base = module.split(".")
                base = base[: len(base) - node.level + is_package]
                origin = ".".join([*base, *filter(None, [node.module])])
            # `from vqssl import kernels` names a part; `from vqssl import EMACodebook` the package above.
            names = [origin] if origin != "vqssl" else [f"vqssl.{alias.name}" for alias in node.names]
        else:
            continue
        found += [(node.lineno, part_of(name)) for name in names if name.split(".")[0] == "vqssl"]
    return found


def violations(source: str, module: str, *, is_package: bool = False) -> list[str]:
    part = part_of(module)
    if part not in MAY_IMPORT:
        return [f"{module} has no floor: give '{part}' a line in tests/test_floors.py"]
    allowed = MAY_IMPORT[part] | {part}
    return [
        f"{module}:{line} imports vqssl{other and '.'}{other}; {part} may import {sorted(allowed)}"
        for line, other in imports_of_vqssl(source, module, is_package=is_package)
        if other not in allowed
    ]


def modules() -> list[tuple[str, Path]]:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name != "vqssl":  # the package itself names everything
            found.append((name, path))
    return found


@pytest.mark.parametrize(("module", "path"), modules(), ids=[name for name, _ in modules()])
def test_each_part_imports_only_from_floors_below(module, path):
    found = violations(path.read_text(encoding="utf-8"), module, is_package=path.name == "__init__.py")
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "is_package", "source"),
    [
        ("vqssl.kernels.nearest", False, "from vqssl.types import Quantized"),
        ("vqssl.kernels.nearest", False, "def late():\n    from ..functional import ema_rules"),
        ("vqssl.functional", True, "from ..codebook import EMACodebook"),
        ("vqssl.functional.ema_rules", False, "import vqssl.revival"),
        ("vqssl.revival", False, "from .codebook import EMACodebook"),
        ("vqssl.update", False, "from vqssl.codebook import EMACodebook"),
        ("vqssl.codebook", False, "from . import multiscale"),
        ("vqssl.fusion", False, "from vqssl.codebook import EMACodebook"),
        ("vqssl.teacher", False, "from vqssl import EMACodebook"),
        ("vqssl.objective", False, "import vqssl"),
        ("vqssl.health", False, "from .interop import checkpoints"),
        ("vqssl.attic", False, ""),
    ],
)
def test_check_of_floors_finds_a_violation(module, is_package, source):
    assert len(violations(source, module, is_package=is_package)) == 1


@pytest.mark.parametrize(
    ("module", "is_package", "source"),
    [
        ("vqssl.kernels", True, "from .nearest import nearest_codeword"),
        ("vqssl.kernels.nearest", False, "from . import search_triton\nimport torch"),
        ("vqssl.functional.ema_rules", False, "from ..kernels.nearest import search\nfrom .usage import usage"),
        ("vqssl.codebook", False, "from vqssl.update import update_codebooks"),
        ("vqssl.multiscale", False, "from .codebook import EMACodebook\nfrom vqssl import functional, types"),
        ("vqssl.interop.states", False, "from ..multiscale import MultiScaleQuantizer\nimport vqssl.health"),
    ],
)
def test_check_of_floors_accepts_imports_from_below(module, is_package, source):
    assert violations(source, module, is_package=is_package) == []


# ---- what imports load ----


@functools.cache
def modules_loaded() -> dict[str, list[str]]:
    """Return the modules that each line adds in a fresh process."""
    code = """
import json, sys
loaded, seen = {}, set()
for line in ("import torch, einops, numpy", "import vqssl", "vqssl.health", "vqssl.interop", "vqssl.experimental"):
    exec(line)
    loaded[line] = sorted(set(sys.modules) - seen)
    seen |= set(sys.modules)
print(json.dumps(loaded))
"""
    command = [sys.executable, "-c", code]
    printed = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True, check=True).stdout
    return json.loads(printed)


def of_vqssl(line: str) -> set[str]:
    return {".".join(name.split(".")[:2]) for name in modules_loaded()[line] if name.startswith("vqssl.")}


@pytest.mark.parametrize("line", ["import vqssl", "vqssl.health", "vqssl.interop", "vqssl.experimental"])
def test_import_loads_only_torch_einops_and_numpy(line):
    packages = {name.partition(".")[0] for name in modules_loaded()[line]}
    # What the three load late is theirs.
    assert packages - set(sys.stdlib_module_names) - {"torch", "einops", "numpy"} == {"vqssl"}


def test_health_interop_and_experimental_load_on_first_use():
    assert not of_vqssl("import vqssl") & {"vqssl.health", "vqssl.interop", "vqssl.experimental"}
    assert "vqssl.codebook" in of_vqssl("import vqssl")
    assert of_vqssl("vqssl.health") == {"vqssl.health"}
    assert of_vqssl("vqssl.interop") == {"vqssl.interop"}
    assert of_vqssl("vqssl.experimental") == {"vqssl.experimental"}


def test_import_does_not_load_torchs_compiler():
    """It takes many times as long as all else in the package."""
    loaded = {name for names in modules_loaded().values() for name in names}
    assert not loaded & {"torch._dynamo", "torch._inductor"}


# ---- public names ----


def test_every_public_name_resolves_and_has_a_docstring():
    assert len(vqssl.__all__) == len(set(vqssl.__all__))
    for name in vqssl.__all__:
        thing = getattr(vqssl, name)
        if isinstance(thing, str):
            continue  # __version__
        # Not a base class's docstring, nor the signature that NamedTuple and dataclass generate.
        doc = (vars(thing).get("__doc__") if inspect.isclass(thing) else thing.__doc__) or ""
        assert doc.strip(), f"vqssl.{name} has no docstring"
        assert not doc.startswith(f"{name}("), f"vqssl.{name} has only a generated docstring"
