"""Nothing on any page is cut, on a desktop or a phone: what is wider than the page scrolls under a visible bar."""

from pathlib import Path

import pytest

from tests.site.built import PAGES

WIDTHS = (Path(__file__).parent / "widths.js").read_text(encoding="utf-8")
"""Returns sentences about the parts of a page that are cut."""


@pytest.mark.parametrize("folder", sorted({page.rpartition("/")[0] for page in PAGES}))
def test_nothing_is_cut_on_any_page(page, address, folder):
    """A part that is wider than the page has a visible scroll bar; the page itself never scrolls sideways."""
    problems = {}
    for name in (each for each in PAGES if each.rpartition("/")[0] == folder):
        page.goto(f"{address}/{name}", wait_until="load")
        if page.locator(".math").count():
            page.wait_for_function("window.MathJax?.startup?.promise !== undefined")
            page.evaluate("MathJax.startup.promise")
        if page.locator("article").count():  # an old address only sends the browser on
            problems[name] = page.evaluate(WIDTHS)
    assert {name: found for name, found in problems.items() if found} == {}


PLACE = "e => e.getBoundingClientRect().left - e.closest('.table-wrapper').getBoundingClientRect().left"
"""Returns how far a cell is from the left edge of its table's frame."""


def test_first_column_stays_while_a_table_scrolls(page, address):
    page.goto(f"{address}/evidence-sweep.html", wait_until="load")
    page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    wide = page.locator("details .table-wrapper").first
    cells = wide.locator("tbody tr").first.locator("td")
    wide.evaluate("e => e.scrollLeft = 300")
    assert wide.evaluate("e => e.scrollLeft") == 300
    assert 0 <= cells.first.evaluate(PLACE) < 8
    assert cells.nth(1).evaluate(PLACE) < 0
    # Nothing shows through it.
    assert cells.first.evaluate("e => getComputedStyle(e).backgroundColor").startswith("rgb(")
