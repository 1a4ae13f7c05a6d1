"""The code on the pages runs as it stands there, from top to bottom."""

import re
from pathlib import Path

import pytest
import torch
import torch._dynamo

DOCS = Path(__file__).parent.parent / "docs"


@pytest.mark.parametrize("page", ["training.md"])
def test_the_code_of_a_page_runs(page):
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) > 4
    torch._dynamo.reset()
    names = {}
    for block in blocks:
        exec(compile(block, page, "exec"), names)
    assert names["codebook"].initialized
    assert torch.isfinite(names["codebook"].embed).all()
