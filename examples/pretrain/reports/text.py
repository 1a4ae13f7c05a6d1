"""Text from data, such as names of classes and runs, where pictures, tables, files and terminals take it."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

from examples.pretrain.checkpoint import write_whole

LONGEST = 60
"""Characters of a name that fit into the name of a file."""


def readable(text: str) -> str:
    r"""Return text of printable characters: others, and halves of characters that are not UTF-8, as escapes.

    >>> print(readable("na\nme"), readable("\udcff"), readable("é"))
    na\nme \udcff é
    """
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def caption(text: str, longest: int = 40) -> str:
    """Return readable text for a picture, cut to what fits: a title that is too wide leaves the panels no room."""
    shown = readable(text)
    return shown if len(shown) <= longest else shown[: longest - 3] + "..."


def table_cell(text: str) -> str:
    r"""Return text as a cell of a markdown table.

    >>> print(table_cell("a|b"))
    a\|b
    """
    return readable(text).replace("|", r"\|")


def file_name(text: str) -> str:
    """Return text as a part of the name of a file: letters, digits, dots, underscores and hyphens.

    >>> file_name("nodule, left/right")
    'nodule-left-right'
    """
    return re.sub(r"[^A-Za-z0-9_.]+", "-", readable(text))[:LONGEST].strip("-.") or "unnamed"


def write_text(path: Path, text: str) -> None:
    """Write a text file as UTF-8, whatever the locale; what UTF-8 cannot hold is written as escapes."""
    write_whole(path, text.encode("utf-8", errors="backslashreplace"))


def any_terminal() -> None:
    """Let the terminal show as an escape what its encoding lacks, instead of ending the process at a `±`."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
