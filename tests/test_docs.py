"""The code on the pages runs as it stands there, from top to bottom."""

import re
from pathlib import Path

import pytest
import torch
import torch._dynamo

import vqssl

DOCS = Path(__file__).parent.parent / "docs"


PAGES = {"training.md": 5, "get-started.md": 4, "health.md": 1, "migration.md": 1}
"""Page to the least number of blocks that it is known to have: a page that lost its code would pass."""


@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs(page):
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) >= PAGES[page]
    torch._dynamo.reset()
    names = {}
    for block in blocks:
        exec(compile(block, page, "exec"), names)
    for codebook in (value for value in names.values() if isinstance(value, vqssl.EMACodebook)):
        assert codebook.initialized
        assert torch.isfinite(codebook.embed).all()
