"""Public names and signatures equal a reviewed file, public_api.txt.

`python -m tests.test_public_api` writes the file.
"""

import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vqssl.foreign_methods import ForeignMethod

FILE = Path(__file__).parent / "public_api.txt"
MODULES = (
    "vqssl",
    "vqssl.functional",
    "vqssl.initialization",
    "vqssl.revival",
    "vqssl.health",
    "vqssl.interop",
    "vqssl.experimental",
)


def described() -> str:
    """Return the text of the file: one line a name."""
    return "\n".join(line for name in MODULES for line in lines_of(importlib.import_module(name))) + "\n"


def lines_of(module: Any) -> Iterator[str]:
    """Yield a line for each public name of a module, and for each public member of its classes."""
    for name in sorted(module.__all__):
        thing, full = getattr(module, name), f"{module.__name__}.{name}"
        if inspect.ismodule(thing) or name.startswith("__"):
            continue
        if not callable(thing):
            yield f"{full}: {type(thing).__name__}" + (f" {sorted(thing)}" if isinstance(thing, dict) else "")
            continue
        yield full + signature(thing)
        if inspect.isclass(thing):
            yield from (f"{full}.{line}" for line in members(thing))


def members(kind: type) -> Iterator[str]:
    """Yield a line for each public member of a class and of its bases in vqssl."""
    if hasattr(kind, "_fields"):
        return  # a named tuple's members are in its signature
    ours = [base for base in kind.__mro__ if base.__module__.split(".")[0] == "vqssl"]
    found = {name: value for base in reversed(ours) for name, value in vars(base).items()}
    for name in sorted(found):
        value = getattr(kind, name)
        if (name.startswith("_") and name != "__call__") or isinstance(value, ForeignMethod):
            continue
        if isinstance(found[name], property):
            yield f"{name}: property"
        elif callable(value):
            yield name + signature(value)


def signature(thing: Any) -> str:
    """Return names, kinds and defaults of parameters, without their types, which the type checker holds."""
    parameters = [each.replace(annotation=each.empty) for each in inspect.signature(thing).parameters.values()]
    return str(inspect.Signature(parameters))


def test_public_api_equals_the_reviewed_file():
    assert described() == FILE.read_text(encoding="utf-8"), (
        "the public API has changed: if this is intended, run `python -m tests.test_public_api`, review the "
        "difference, and add what a user notices to CHANGELOG.md"
    )


if __name__ == "__main__":
    FILE.write_text(described(), encoding="utf-8")
