"""Pretraining methods, one a file. To add one: write its file as `interface.py` says, and add its line below."""

from typing import Any

from examples.pretrain.methods.byol import BYOL
from examples.pretrain.methods.dissect import DiSSECT
from examples.pretrain.methods.interface import Method, Step
from examples.pretrain.methods.simsiam import SimSiam

__all__ = ["METHODS", "Method", "Step", "default_options"]

METHODS: dict[str, type[Method]] = {
    "byol": BYOL,
    "dissect": DiSSECT,
    "simsiam": SimSiam,
}


def default_options() -> dict[str, Any]:
    """Return the options of every method, by its name."""
    return {name: method.Options() for name, method in METHODS.items()}
