"""Results can be unpacked, read by name, mapped over and exported."""

import io

import pytest
import torch
from torch.utils import _pytree

from vqssl import CodebookUsage, DiSSECTLoss, EMACodebook, MultiScaleQuantized, MultiScaleQuantizer, Quantized

TYPES = {
    Quantized: ("quantized", "indices", "commitment_loss"),
    MultiScaleQuantized: ("quantized", "indices", "commitment_loss", "commitment_losses"),
    DiSSECTLoss: ("total", "alignment_global", "alignment_refined", "refinement", "commitment"),
    CodebookUsage: ("perplexity", "fraction", "dead"),
}


@pytest.mark.parametrize("cls", TYPES)
def test_fields_unpack_in_the_order_that_users_know(cls):
    assert cls._fields == TYPES[cls]
    values = [torch.tensor(float(n)) for n in range(len(TYPES[cls]))]
    assert [t.item() for t in cls(*values)] == list(range(len(values)))


def test_codebook_unpacks_as_in_vector_quantize_pytorch():
    codebook = EMACodebook(4, 3)
    quantized, indices, loss = codebook(torch.randn(2, 5, 3))
    assert quantized.shape == (2, 5, 3)
    assert indices.shape == (2, 5)
    assert loss.shape == ()


@pytest.mark.parametrize("cls", TYPES)
def test_trees_are_mapped_into_and_keep_their_type(cls):
    value = cls(*(torch.ones(2) for _ in cls._fields))
    doubled = _pytree.tree_map(lambda t: 2 * t, value)
    assert type(doubled) is cls
    assert all((t == 2).all() for t in doubled)
    leaves, spec = _pytree.tree_flatten(value)
    # What torch.export.save writes down, and refuses for types it was not told about.
    assert _pytree.treespec_loads(_pytree.treespec_dumps(spec)) == spec
    assert type(_pytree.tree_unflatten(leaves, spec)) is cls


def reloaded(module, *inputs):
    file = io.BytesIO()
    torch.export.save(torch.export.export(module, inputs), file)
    file.seek(0)
    return torch.export.load(file).module()


def test_a_module_that_returns_quantized_is_exported_saved_and_loaded():
    codebook, x = EMACodebook(8, 4), torch.randn(3, 5, 4)
    codebook(x)
    codebook.eval()
    found, expected = reloaded(codebook, x)(x), codebook(x)
    assert type(found) is Quantized
    assert all(a.equal(b) for a, b in zip(found, expected, strict=True))


def test_a_module_that_returns_nested_tuples_is_exported_saved_and_loaded():
    quantizer = MultiScaleQuantizer([3, 5], codebook_size=4, dim=6)
    maps = [torch.randn(2, 3, 4, 4), torch.randn(2, 5, 2, 2)]
    quantizer(maps)
    quantizer.eval()
    found, expected = reloaded(quantizer, maps)(maps), quantizer(maps)
    assert type(found) is MultiScaleQuantized
    leaves = zip(_pytree.tree_leaves(found), _pytree.tree_leaves(expected), strict=True)
    assert all(a.equal(b) for a, b in leaves)
