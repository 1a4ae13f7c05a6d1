"""Pretraining methods, one a file. To add one: write its file as `interface.py` says, and add its line below."""

from importlib import import_module
from typing import Any

from examples.pretrain.methods.interface import Method, Step

__all__ = ["METHODS", "Method", "Step", "default_options"]

# Name of the method and of its file, and the class in it.
CLASSES = {
    "byol": "BYOL",
    "dissect": "DiSSECT",
    "dissect_codes": "DiSSECTCodes",
    "simsiam": "SimSiam",
}
METHODS: dict[str, type[Method]] = {
    name: getattr(import_module(f"{__name__}.{name}"), class_name) for name, class_name in CLASSES.items()
}


def default_options() -> dict[str, Any]:
    """Return the options of every method, by its name."""
    return {name: method.Options() for name, method in METHODS.items()}
