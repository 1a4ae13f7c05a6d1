"""Pictures on the pages have captions, and text that can be read."""

import re
from urllib.parse import unquote

import pytest
from PIL import Image

from tests.site.built import PAGES, SITE

PICTURES = """Array.from(document.querySelectorAll("article img")).map(
    image => [new URL(image.src).pathname, image.getBoundingClientRect().width])"""
SMALLEST = 9
"""Least height of text in a picture, in pixels as shown; in points, what examples/style.mplstyle asks for."""


@pytest.mark.parametrize("name", [page for page in PAGES if "_images" in (SITE / page).read_text(encoding="utf-8")])
def test_text_in_pictures_can_be_read(page, address, name):
    """At 72 pixels an inch, text of 9 points is 9 pixels high. Thumbnails of the gallery are links, not pictures."""
    page.goto(f"{address}/{name}", wait_until="load")
    page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    for path, width in page.evaluate(PICTURES):
        file = SITE / unquote(path).lstrip("/")
        if file.name.endswith("_thumb.png"):
            continue
        if file.suffix == ".svg":
            text = file.read_text(encoding="utf-8")
            units = float(re.search(r'viewBox="0 0 ([\d.]+)', text).group(1))
            least = min(map(float, re.findall(r'font-size="([\d.]+)"', text)))
            assert least * width / units >= SMALLEST, file.name
        else:
            with Image.open(file) as picture:
                inches = picture.width / picture.info["dpi"][0]
            assert width / inches >= 72 - 0.5, file.name


@pytest.mark.parametrize("name", ["benchmarks.html", "evidence.html", "evidence-sweep.html", "reliability.html"])
def test_pictures_of_records_have_captions(name):
    text = (SITE / name).read_text(encoding="utf-8")
    assert text.count("<figcaption") >= len(re.findall(r'<img [^>]*src="[^"]*_images/[^"]*png"', text)) > 0
