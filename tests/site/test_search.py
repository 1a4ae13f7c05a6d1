"""The search of the site puts the page first that a newcomer looks for."""

from urllib.parse import quote

import pytest

SEARCHES = {
    "tokenizer": "saving.html",
    "resume": "resume.html",
    "DDP": "training.html",
    "k-means": "api/generated/vqssl.fit_codebook.html",
    "licence": "index.html",
    "license": "index.html",
    "224": "images.html",
    "install": "get-started.html",
    "checkpoint": "resume.html",
    "dead codes": "health.html",
    "codebook collapse": "health.html",
    "wandb": "logging.html",
    "mixed precision": "training.html",
    "image size": "images.html",
    "cite": "index.html",
    "EMACodebook": "api/generated/vqssl.EMACodebook.html",
}
"""What a newcomer types, and the page that must come first."""


@pytest.mark.parametrize("query", SEARCHES)
def test_search_puts_the_right_page_first(page, address, query):
    page.goto(f"{address}/search.html?q={quote(query)}", wait_until="load")
    # Results are sorted before the first is shown.
    link = page.locator("#search-results ul.search li > a").first.get_attribute("href")
    assert link.partition("#")[0].partition("?")[0] == SEARCHES[query]
