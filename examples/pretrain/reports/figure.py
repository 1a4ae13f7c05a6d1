"""How figures are made and written. Matplotlib is imported with the first figure: tables do not need it."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from examples.pretrain.checkpoint import write_whole

if TYPE_CHECKING:
    from matplotlib.axis import Axis
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

STYLE = Path(__file__).parents[2] / "style.mplstyle"


def new_figure(**options: Any) -> Figure:
    """Return an empty figure in our style, which needs no display; names with a `$` in them are no formulas there.

    Args:
        options: of matplotlib's ``Figure``.

    Raises:
        ImportError: matplotlib cannot be imported, for whatever reason.
    """
    try:
        import matplotlib.style
        from matplotlib.figure import Figure
    except Exception as error:  # its extension modules raise other errors where they do not fit, or find no memory
        raise ImportError(f"matplotlib cannot be imported ({str(error) or type(error).__name__})") from error
    matplotlib.style.use(STYLE)
    matplotlib.rcParams["text.parse_math"] = False
    return Figure(**options)


def color_scale(name: str) -> ScalarMappable:
    """Return the colours of a map by name, from 0 to 1, for a colour bar."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    return ScalarMappable(Normalize(0, 1), name)


def plain_log(axis: Axis) -> None:
    """Label a logarithmic axis at each power of ten and between, in plain numbers: powers would be formulas."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if _decades(axis) < 3 else (1.0,)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def _decades(axis: Axis) -> float:
    low, high = axis.get_data_interval()
    return math.log10(high / low)


def save_figure(figure: Figure, path: Path, *, dpi: int) -> None:
    """Write a figure as PNG, whole or not at all; a symbolic link at `path` is replaced, not followed."""
    content = io.BytesIO()
    figure.savefig(content, dpi=dpi, format="png")
    write_whole(path, content.getbuffer())
