"""No operator's result depends on the strides of its arguments."""

import importlib

import pytest
import torch
from torch.utils._pytree import tree_leaves

from tests.kernels.material import LAYOUTS, of_layout
from vqssl import functional, kernels

ROWS, CODES, WIDTH = 100, 70, 6
OPERATORS = {
    "nearest_codeword, euclidean": lambda x, codes, _: kernels.nearest_codeword(x, codes, "euclidean"),
    "nearest_codeword, cosine": lambda x, codes, _: kernels.nearest_codeword(x, codes, "cosine"),
    "functional.nearest_codeword": lambda x, codes, _: functional.nearest_codeword(x.unflatten(0, (4, -1)), codes),
    "code_sums": lambda x, _, indices: kernels.code_sums(x, indices, CODES),
    "squared_error": lambda x, codes, indices: kernels.squared_error(x, indices, codes),
    "squared_error_backward": lambda x, codes, indices: kernels.squared_error_backward(x[0, 0], x, indices, codes),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OPERATORS)
def test_strides_do_not_matter(name, layout, monkeypatch):
    # Several tiles, also of so few tokens.
    monkeypatch.setattr(importlib.import_module("vqssl.kernels.squared_error"), "TILE", 40 * WIDTH)
    operator, x, codes = OPERATORS[name], of_layout(layout, ROWS, WIDTH), of_layout(layout, CODES, WIDTH, seed=1)
    indices = (torch.arange(2 * ROWS) % CODES)[::2]
    found = operator(x, codes, indices)
    expected = operator(x.contiguous(), codes.contiguous(), indices.contiguous())
    for a, b in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        assert torch.equal(a, b)
