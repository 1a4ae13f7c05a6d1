"""Every link of the built documentation resolves, and a browser can read, click and search its pages.

`.ci/run docs` builds it and runs these tests. Alone: `VQSSL_SITE=docs/_build/html python -m pytest tests/site`.
"""

import functools
import os
from html.parser import HTMLParser
from urllib.parse import unquote, urldefrag

import pytest

from tests.site.built import PAGES, SITE

SHOWN = (
    "index.html",
    "get-started.html",
    "guides/byol.html",
    "gallery/index.html",
    "gallery/plot_3_code_maps.html",
    "method.html",
    "evidence.html",
    "api/generated/vqssl.EMACodebook.html",
    "benchmarks.html",
    "reliability.html",
    "faq.html",
)


class Links(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.links, self.ids = [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.ids |= {found[name] for name in ("id", "name") if found.get(name)}
        self.links += [found[name] for name in ("href", "src") if found.get(name)]


@functools.cache
def read(path):
    return Links(path.read_text(encoding="utf-8"))


def test_site_has_the_shown_pages():
    assert len(PAGES) > 60
    assert set(SHOWN) <= set(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_links_of_built_page_resolve(page):
    here, broken = SITE / page, []
    for link in read(here).links:
        target, fragment = urldefrag(link)
        target = target.partition("?")[0]
        if target.startswith(("http:", "https:", "mailto:", "data:", "javascript:")):
            continue
        path = (here.parent / unquote(target)).resolve() if target else here
        missing = not path.is_file() or not path.is_relative_to(SITE)  # a folder is not a page
        # Sphinx's source pages know one name for each object. An object documented as vqssl.X and vqssl.revival.X gets
        # links to the right page, but to a wrong place in it.
        exact = path.suffix == ".html" and not page.startswith("_modules/")
        lost = fragment and exact and not missing and unquote(fragment) not in read(path).ids
        if missing or lost:
            broken.append(link)
    assert not broken


# ---- in a browser ----


@pytest.mark.parametrize("name", SHOWN)
def test_page_fits_the_window_and_shows_its_pictures(page, address, name, request):
    page.goto(f"{address}/{name}", wait_until="load")
    page.wait_for_timeout(300)
    assert page.evaluate("document.documentElement.scrollWidth - window.innerWidth") <= 0, "wider than the window"
    page.evaluate("document.querySelectorAll('img').forEach(image => image.loading = 'eager')")
    page.wait_for_function("Array.from(document.images).every(image => image.complete)")
    empty = "Array.from(document.images).filter(image => !image.naturalWidth).map(image => image.src)"
    assert page.evaluate(empty) == []
    assert page.errors == []
    folder = os.environ.get("VQSSL_SCREENSHOTS")
    if folder:
        size = "phone" if page.viewport_size["width"] < 500 else "desktop"
        page.screenshot(path=f"{folder}/{name.replace('/', '-').removesuffix('.html')}-{size}.png", full_page=True)


def test_equations_are_drawn_offline(page, address):
    page.goto(f"{address}/method.html", wait_until="load")
    page.wait_for_selector("mjx-container")
    assert page.locator("mjx-container").count() > 8


def test_clicking_from_the_first_page_reaches_the_source(page, address):
    page.goto(address, wait_until="load")
    page.locator("article a", has_text="Get started").first.click()
    page.wait_for_url("**/get-started.html")
    page.locator("article a", has_text="guides").first.click()
    page.wait_for_url("**/guides/index.html")
    page.locator("article a", has_text="A VQ-VAE").first.click()
    page.wait_for_url("**/guides/vq_vae.html")
    assert "EMACodebook" in page.locator("article .highlight").first.inner_text()
    page.goto(f"{address}/api/index.html")
    page.locator("article a", has_text="MomentumTeacher").first.click()
    page.wait_for_url("**/vqssl.MomentumTeacher.html*")
    # The link is visible on hover only, and a phone has no hover.
    page.locator("a", has_text="[source]").first.dispatch_event("click")
    page.wait_for_url("**/_modules/vqssl/teacher.html*")
