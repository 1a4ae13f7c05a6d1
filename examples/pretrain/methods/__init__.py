"""Pretraining methods, one a file. To add one: write its file as `interface.py` says, and add its line below."""

from importlib import import_module
from typing import Any

from examples.pretrain.methods.interface import Method, Step

__all__ = ["METHODS", "Method", "Step", "default_options", "title_of"]

# Name of the method and of its file, and the class in it.
CLASSES = {
    "byol": "BYOL",
    "simsiam": "SimSiam",
    "dissect": "DiSSECT",
    "dissect_codes": "DiSSECTCodes",
    "dissect_places": "DiSSECTPlaces",
    "coboom": "CoBooM",
    "dino": "DINOv2Style",
    "pcrlv2": "PCRLv2",
    "dira": "DiRA",
    "transvw": "TransVW",
    "mlvicx": "MLVICX",
    "adamv2": "AdamV2",
    "otcxr": "OTCXR",
}
METHODS: dict[str, type[Method]] = {
    name: getattr(import_module(f"examples.pretrain.methods.{name}"), class_name)
    for name, class_name in CLASSES.items()
}


def default_options() -> dict[str, Any]:
    """Return the options of every method, by its name."""
    return {name: method.Options() for name, method in METHODS.items()}


def title_of(name: str, options: Any = None) -> str:
    """Return what a table calls a method: the `title` of its options, if they have one, or the name of its class.

    >>> title_of("byol"), title_of("otcxr"), title_of("random")
    ('BYOL', 'OTCXR-like', 'random')
    """
    if name not in METHODS:
        return name
    options = METHODS[name].Options() if options is None else options
    return getattr(options, "title", METHODS[name].__name__)
