"""How figures are written."""

from __future__ import annotations

import io
from pathlib import Path

from matplotlib.figure import Figure

from examples.pretrain.checkpoint import write_whole


def save_figure(figure: Figure, path: Path, *, dpi: int) -> None:
    """Write a figure as PNG, whole or not at all; a symbolic link at `path` is replaced, not followed."""
    content = io.BytesIO()
    figure.savefig(content, dpi=dpi, format="png")
    write_whole(path, content.getbuffer())
