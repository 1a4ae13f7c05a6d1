"""The public names and their signatures are a reviewed file: `python -m tests.test_public_api` writes it anew."""

import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FILE = Path(__file__).parent / "public_api.txt"
MODULES = ("vqssl", "vqssl.functional", "vqssl.initialization", "vqssl.revival", "vqssl.health", "vqssl.interop")


def described() -> str:
    return "\n".join(line for name in MODULES for line in lines_of(importlib.import_module(name))) + "\n"


def lines_of(module: Any) -> Iterator[str]:
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
    """Of the class and its bases, as far as they are ours."""
    if hasattr(kind, "_fields"):
        return  # a named tuple's are in its signature
    ours = [base for base in kind.__mro__ if base.__module__.split(".")[0] == "vqssl"]
    found = {name: value for base in reversed(ours) for name, value in vars(base).items()}
    for name in sorted(found):
        value = getattr(kind, name)
        if name.startswith("_") and name != "__call__":
            continue
        if isinstance(found[name], property):
            yield f"{name}: property"
        elif callable(value):
            yield name + signature(value)


def signature(thing: Any) -> str:
    """Names, kinds and defaults; how a type is spelled is left to the type checker."""
    parameters = [each.replace(annotation=each.empty) for each in inspect.signature(thing).parameters.values()]
    return str(inspect.Signature(parameters))


def test_the_public_api_is_the_reviewed_one():
    assert described() == FILE.read_text(encoding="utf-8"), (
        "the public API has changed: if it was meant to, run `python -m tests.test_public_api`, look at the "
        "difference, and say in CHANGELOG.md what a user notices"
    )


if __name__ == "__main__":
    FILE.write_text(described(), encoding="utf-8")
