"""The house stands: each floor imports only from floors below, and `import vqssl` brings in nothing else."""

import ast
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import vqssl

PACKAGE = Path(vqssl.__file__).parent

# What each part of vqssl may import of the others. A part is a module or folder directly under vqssl/; it may
# always import its own submodules. A new part needs a line here.
KERNELS = {"kernels"}
MATHS = {"types", "checks", "kernels", "functional", "distributed"}
BELOW_CODEBOOK = MATHS | {"initialization", "revival", "projection", "update"}
MAY_IMPORT = {
    # F0
    "types": set(),
    "checks": set(),
    # F1: tensors in, tensors out
    "kernels": set(),
    # F2: pure maths, the distributed calls, and the small policies made of them
    "functional": {"types", "checks"} | KERNELS,
    "distributed": {"types", "checks"} | KERNELS,
    "projection": MATHS,
    "initialization": MATHS,
    "revival": MATHS,
    "copying": set(),
    "update": MATHS | {"revival"},
    # F3
    "codebook": BELOW_CODEBOOK,
    # F4: each can be dropped alone into someone else's model
    "multiscale": BELOW_CODEBOOK | {"codebook"},
    "fusion": BELOW_CODEBOOK,
    "teacher": BELOW_CODEBOOK | {"copying"},
    "objective": BELOW_CODEBOOK,
    "health": BELOW_CODEBOOK | {"codebook"},
}
# F5
MAY_IMPORT["interop"] = set(MAY_IMPORT)


def part_of(module: str) -> str:
    """'vqssl.kernels.nearest' -> 'kernels'; the package itself -> ''."""
    return module.partition(".")[2].partition(".")[0]


def imports_of_vqssl(source: str, module: str, *, is_package: bool) -> list[tuple[int, str]]:
    """Line and part of every import of vqssl in `source`, also those inside functions."""
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
def test_each_floor_imports_only_from_below(module, path):
    found = violations(path.read_text(encoding="utf-8"), module, is_package=path.name == "__init__.py")
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "is_package", "source"),
    [
        ("vqssl.kernels.nearest", False, "from vqssl.types import Quantized"),
        ("vqssl.kernels.nearest", False, "def late():\n    from ..functional import ema"),
        ("vqssl.functional", True, "from ..codebook import EMACodebook"),
        ("vqssl.functional.ema_rules", False, "import vqssl.revival"),
        ("vqssl.revival", False, "from .codebook import EMACodebook"),
        ("vqssl.codebook", False, "from . import multiscale"),
        ("vqssl.fusion", False, "from vqssl.codebook import EMACodebook"),
        ("vqssl.teacher", False, "from vqssl import EMACodebook"),
        ("vqssl.objective", False, "import vqssl"),
        ("vqssl.health", False, "from .interop import checkpoints"),
        ("vqssl.attic", False, ""),
    ],
)
def test_the_check_sees_a_violation(module, is_package, source):
    assert len(violations(source, module, is_package=is_package)) == 1


@pytest.mark.parametrize(
    ("module", "is_package", "source"),
    [
        ("vqssl.kernels", True, "from .nearest import nearest_codeword"),
        ("vqssl.kernels.nearest", False, "from . import nearest_triton\nimport torch"),
        ("vqssl.functional.ema_rules", False, "from ..kernels.nearest import search\nfrom .usage import usage"),
        ("vqssl.multiscale", False, "from .codebook import EMACodebook\nfrom vqssl import functional, types"),
        ("vqssl.interop.states", False, "from ..multiscale import MultiScaleQuantizer\nimport vqssl.health"),
    ],
)
def test_the_check_sees_no_violation_where_there_is_none(module, is_package, source):
    assert violations(source, module, is_package=is_package) == []


def test_importing_vqssl_imports_only_its_three_dependencies():
    # In a fresh process: what torch, einops and numpy import (sometimes late) is theirs.
    code = """
import json, sys
import einops.layers.torch, numpy, torch, torch._dynamo, torch.library
before = set(sys.modules)
import vqssl
print(json.dumps([name.partition(".")[0] for name in set(sys.modules) - before]))
"""
    root = str(PACKAGE.parent)
    printed = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout
    theirs = {"torch", "einops", "numpy"}
    ours = set(json.loads(printed)) - set(sys.stdlib_module_names) - theirs
    assert ours == {"vqssl"}


def test_importing_vqssl_does_not_load_torchs_compiler():
    """It takes many times as long as everything else in the package; who compiles loads it anyway."""
    code = "import sys, vqssl, torch; print('torch._dynamo' in sys.modules, 'torch._inductor' in sys.modules)"
    command = [sys.executable, "-c", code]
    printed = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True, check=True).stdout
    assert printed.split() == ["False", "False"]


def test_every_public_name_resolves_and_is_documented():
    assert len(vqssl.__all__) == len(set(vqssl.__all__))
    for name in vqssl.__all__:
        thing = getattr(vqssl, name)
        if isinstance(thing, str):
            continue  # __version__
        # Its own words: not a base class's, not the signature that NamedTuple and dataclass put there.
        doc = (vars(thing).get("__doc__") if inspect.isclass(thing) else thing.__doc__) or ""
        assert doc.strip(), f"vqssl.{name} has no docstring"
        assert not doc.startswith(f"{name}("), f"vqssl.{name} has only a generated docstring"
