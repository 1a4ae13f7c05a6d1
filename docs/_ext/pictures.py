"""Sphinx extension: pictures stand in figures with captions, and their text can be read at any width of the page.

A picture that is a paragraph of its own becomes a figure; its text for those who do not see it is the caption. No
picture is shown smaller than 72 pixels an inch: text of 9 points is then 9 pixels high. A wider one scrolls.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from PIL import Image
from sphinx.transforms import SphinxTransform
from sphinx_gallery.directives import imgsgnode

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from examples.pretrain.reports.figure import STYLE  # noqa: E402

PIXELS_AN_INCH = 72


def least_width(path: Path) -> int:
    """Return the width in CSS pixels below which a PNG must not be shown; 0 if the file says no resolution."""
    with Image.open(path) as picture:
        dots = picture.info.get("dpi", (0, 0))[0]
        return round(PIXELS_AN_INCH * picture.width / dots) if dots else 0


class Pictures(SphinxTransform):
    """Put each picture into a figure or, in the gallery, into a frame that scrolls."""

    default_priority = 500  # before Sphinx copies pictures, as it changes their paths

    def apply(self, **kwargs: Any) -> None:
        """Change Markdown's pictures and the gallery's."""
        for paragraph in list(self.document.findall(nodes.paragraph)):
            if len(paragraph) == 1 and isinstance(paragraph[0], nodes.image) and paragraph[0].get("alt"):
                image = paragraph[0]
                image["width"] = f"{self._least_width(image['uri'])}px"
                caption = nodes.caption(image["alt"], image["alt"])
                figure = nodes.figure("", image, caption, classes=["picture"], align="default")
                self.document.set_id(figure)
                paragraph.replace_self(figure)
        for image in list(self.document.findall(imgsgnode)):
            frame = f'<div class="picture" style="--least: {self._least_width(image["uri"])}px">'
            parts = [nodes.raw("", frame, format="html"), image.deepcopy(), nodes.raw("", "</div>", format="html")]
            image.replace_self(parts)

    def _least_width(self, uri: str) -> int:
        return least_width(Path(self.env.relfn2path(uri, self.env.docname)[1]))


def use_style(gallery_conf: dict[str, Any], name: str) -> None:
    """Draw the gallery in the project's style; sphinx-gallery calls this before each script."""
    import matplotlib.style

    matplotlib.style.use(STYLE)


def setup(app: Any) -> dict[str, Any]:
    """Register the transform."""
    app.add_transform(Pictures)
    return {"parallel_read_safe": True}
