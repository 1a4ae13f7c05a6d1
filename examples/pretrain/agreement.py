"""The hand-shake of ranks: what has to be equal on all of them is compared before anything is trained or written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import kornia
import monai
import numpy as np
import torch

import vqssl
from examples.pretrain import ranks
from examples.pretrain.checkpoint import differences
from examples.pretrain.unwritten import Unwritten

T = TypeVar("T")
SOFTWARE = (vqssl, torch, np, monai, kornia)
"""Packages that decide what a step computes."""


def check_equal(facts: dict[str, Any]) -> None:
    """Raise ValueError on every rank, with the same sentence, unless all ranks have the same facts and software.

    Args:
        facts: nested dicts of what can be compared and pickled, by name.
    """
    if ranks.world_size() == 1:
        return
    everywhere = ranks.gathered({**facts, "version": {each.__name__: each.__version__ for each in SOFTWARE}})
    for other, theirs in enumerate(everywhere[1:], 1):
        found = differences(everywhere[0], theirs)
        if found:
            changed = "; ".join(f"{name} is {a} on rank 0 and {b} on rank {other}" for name, a, b in found[:5])
            more = f"; and {len(found) - 5} more" if len(found) > 5 else ""
            raise ValueError(f"all ranks must run the same: {changed}{more}. Give each the same command and files")


def on_all(function: Callable[[], T]) -> T:
    """Call `function` on every rank and return its result; if it raises on one rank, raise on all of them.

    Without it, the others would wait for the rank that is gone until a time-out.
    """
    if ranks.world_size() == 1:
        return function()
    error: Exception | None = None
    try:
        result = function()
    except Exception as raised:
        error = raised
    # As text: not every exception can be pickled.
    texts = ranks.gathered(None if error is None else _text(error))
    first = next((rank for rank, text in enumerate(texts) if text is not None), None)
    if first is None:
        return result
    if error is not None and len(set(texts)) == 1:
        raise error
    raise ValueError(f"rank {first}: {texts[first]}") from error


def _text(error: Exception) -> str:
    """Return an error in words, with what helps where that is known."""
    return f"{error}: {error.cure}" if isinstance(error, Unwritten) else f"{error}"
