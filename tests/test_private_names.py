"""No underscore name is used outside the file that defines it, anywhere in vqssl/."""

import ast
from pathlib import Path

import pytest

import vqssl

PACKAGE = Path(vqssl.__file__).parent

ALLOWED = {
    # torch has no public name for these.
    "_base": "the tensor that a view views: detached_copy finds views of parameters by it",
    "_forward_pre_hooks": "torch has no public list of hooks, and its older spectral norm is one",
    "_foreach_lerp_": "one kernel for all parameters of a teacher, as torch.optim does it",
    "_linear_pointwise": "oneDNN's product, faster than torch.mm on AMD processors; without it torch.mm is used",
    "_orig_mod": "the module inside torch.compile's wrapper",
    "_reorder_linear_weight": "as _linear_pointwise",
    "_version": "how often a tensor was written to: the teacher reads its count from a GPU only then",
    "_pytree": "torch.export.save refuses a named tuple that is not registered there",
    "_register_namedtuple": "as _pytree",
    # Public, in spite of the underscore, as the standard library's documentation says.
    "_asdict": "named tuples",
    "_fields": "named tuples",
    "_replace": "named tuples",
}
"""Name to the reason why `vqssl` may use it."""


def is_private(name):
    return name.startswith("_") and not name.startswith("__") and name.strip("_") != ""


def literal_name(call):
    """The second argument of `getattr(obj, "_x")`, the first of `obj.register_buffer("_x", ...)`; else None."""
    if isinstance(call.func, ast.Name) and call.func.id in ("getattr", "hasattr", "setattr", "delattr"):
        position = 1
    elif isinstance(call.func, ast.Attribute) and call.func.attr in ("register_buffer", "register_parameter"):
        position = 0
    else:
        return None
    argument = call.args[position] if len(call.args) > position else None
    return argument.value if isinstance(argument, ast.Constant) and isinstance(argument.value, str) else None


def is_own(node):
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def members(tree):
    """Private names that the classes of a file define: in their bodies, in slots, and as attributes of self or cls."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for each in node.body:
                if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                    names.add(each.name)
                for target in getattr(each, "targets", [getattr(each, "target", None)]):
                    names.add(getattr(target, "id", ""))
                    if getattr(target, "id", None) == "__slots__":
                        names |= {slot.value for slot in ast.walk(each.value) if isinstance(slot, ast.Constant)}
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_own(node.value):
            names.add(node.attr)
        elif isinstance(node, ast.Call) and (name := literal_name(node)) is not None:
            base = node.func.value if isinstance(node.func, ast.Attribute) else node.args[0]
            if is_own(base) and getattr(node.func, "id", None) not in ("getattr", "hasattr", "delattr"):
                names.add(name)
    return {name for name in names if is_private(name)}


def violations(source):
    """Line and name of every private name that is imported, or that is an attribute and not a member."""
    tree = ast.parse(source)
    own = members(tree)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            parts = {*(node.module or "").split("."), *(alias.name for alias in node.names)}
        elif isinstance(node, ast.Import):
            parts = {part for alias in node.names for part in alias.name.split(".")}
        elif isinstance(node, ast.Attribute):
            parts = {node.attr} - own
        elif isinstance(node, ast.Call):
            parts = {literal_name(node) or ""} - own
        else:
            continue
        found += [(node.lineno, part) for part in sorted(parts) if is_private(part)]
    return found


def not_allowed(source):
    return [(line, name) for line, name in violations(source) if name not in ALLOWED]


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_private_name_stays_in_its_file(path):
    found = not_allowed(path.read_text(encoding="utf-8"))
    assert not found, "\n".join(f"{path}:{line} uses {name}, which another file defines" for line, name in found)


def test_every_allowed_name_is_needed():
    needed = {name for path in FILES for _, name in violations(path.read_text(encoding="utf-8"))}
    named_tuples = {name for name, reason in ALLOWED.items() if reason == "named tuples"}
    assert set(ALLOWED) - named_tuples <= needed


@pytest.mark.parametrize(
    "source",
    [
        "from vqssl.codebook import _name_of",
        "from vqssl.codebook import _name_of as name_of",
        "from vqssl._hidden import thing",
        "import vqssl._hidden",
        "from . import _hidden",
        "def late():\n    from .codebook import _name_of",
        "codebook._tokens(x)",
        "self._tokens(x)",
        "class B(A):\n    def f(self):\n        return super()._tokens(self)",
        "owner._warned = True",
        "del owner._warned",
        "owner._count += 1",
        "getattr(owner, '_warned', False)",
        "hasattr(self, '_warned')",
        "setattr(owner, '_warned', True)",
        "owner.register_buffer('_table', None)",
        "torch._private_function(x)",
        "from vqssl.codebook import _f\ndef _f(): ...",
        "def _f(): ...\ncodebook._f()",
    ],
)
def test_the_check_sees_a_violation(source):
    assert len(not_allowed(source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "def _f(): ...\nclass _C: ...\n_x = _f()\n_x.y = _C()",
        "class A:\n    def _f(self): ...\n    def g(self, other):\n        return self._f() + other._f()",
        "class A:\n    def __init__(self):\n        self._x = 1\ndef g(a):\n    a._x += 1",
        "class A:\n    _x: int\nA()._x",
        "class A:\n    __slots__ = ('_x',)\ndef g(a):\n    return a._x",
        "class A:\n    def __init__(self):\n        self.register_buffer('_x', None)\n        self._x.sum()",
        "class A:\n    def _load_from_state_dict(self, *args):\n        super()._load_from_state_dict(*args)",
        "self.__dict__\nobj.__class__\n_, _ = pair\nfrom __future__ import annotations",
        "result._replace(indices=None)",
        "torch._foreach_lerp_(a, b, 0.5)",
        "getattr(owner, name)",
    ],
)
def test_the_check_sees_no_violation_where_there_is_none(source):
    assert not_allowed(source) == []
