"""Results can be unpacked, read by name, mapped over and exported; the lines of typed_use.py run or raise."""

import inspect
import io

import pytest
import torch
from torch.utils import _pytree

from tests.typed_use import ACCEPTED, REFUSED
from vqssl import (
    ChannelsFirst,
    CodebookUsage,
    CodePredictionLoss,
    DiSSECTLoss,
    EMACodebook,
    MultiCodeQuantized,
    MultiScaleQuantized,
    MultiScaleQuantizer,
    ProductQuantizer,
    Quantized,
    RandomProjectionQuantizer,
    ResidualQuantizer,
)

TYPES = {
    Quantized: ("quantized", "indices", "commitment_loss"),
    MultiScaleQuantized: ("quantized", "indices", "commitment_loss", "commitment_losses"),
    MultiCodeQuantized: ("quantized", "indices", "commitment_loss", "commitment_losses"),
    DiSSECTLoss: ("total", "alignment_global", "alignment_refined", "refinement", "commitment", "code_prediction"),
    CodePredictionLoss: ("total", "losses"),
    CodebookUsage: ("perplexity", "fraction", "dead"),
}


@pytest.mark.parametrize("cls", TYPES)
def test_fields_keep_their_order(cls):
    assert cls._fields == TYPES[cls]
    values = [torch.tensor(float(n)) for n in range(len(TYPES[cls]))]
    assert [t.item() for t in cls(*values)] == list(range(len(values)))


def test_codebook_result_unpacks_as_in_vector_quantize_pytorch():
    codebook = EMACodebook(codebook_size=4, dim=3)
    quantized, indices, loss = codebook(torch.randn(2, 5, 3))
    assert quantized.shape == (2, 5, 3)
    assert indices.shape == (2, 5)
    assert loss.shape == ()


TOKENS, MAPS = torch.randn(6, 4), torch.randn(2, 4, 3)
QUANTIZERS = {
    EMACodebook(codebook_size=4, dim=4): (Quantized, TOKENS),
    ResidualQuantizer(codebook_size=4, dim=4, num_levels=2): (MultiCodeQuantized, TOKENS),
    ProductQuantizer(codebook_size=4, dim=4, num_groups=2): (MultiCodeQuantized, TOKENS),
    MultiScaleQuantizer([4, 4], codebook_size=4, dim=4): (MultiScaleQuantized, [MAPS, MAPS]),
    RandomProjectionQuantizer(in_dim=4, codebook_size=4, dim=2): (torch.Tensor, TOKENS),
}


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=lambda quantizer: type(quantizer).__name__)
def test_quantiser_returns_the_type_that_it_states(quantizer):
    stated, x = QUANTIZERS[quantizer]
    for training in (True, False):
        assert type(quantizer.train(training)(x)) is stated
    for name in {"forward", "quantize"} & set(dir(quantizer)):
        assert inspect.signature(getattr(quantizer, name)).return_annotation is stated
    if hasattr(quantizer, "quantize"):
        assert type(quantizer.quantize(x)) is stated
        assert type(ChannelsFirst(quantizer)(MAPS)) is stated


@pytest.mark.parametrize("cls", TYPES)
def test_pytree_functions_keep_the_type(cls):
    value = cls(*(torch.ones(2) for _ in cls._fields))
    doubled = _pytree.tree_map(lambda t: 2 * t, value)
    assert type(doubled) is cls
    assert all((t == 2).all() for t in doubled)
    leaves, spec = _pytree.tree_flatten(value)
    # torch.export.save writes the specification, and refuses types that are not registered.
    assert _pytree.treespec_loads(_pytree.treespec_dumps(spec)) == spec
    assert type(_pytree.tree_unflatten(leaves, spec)) is cls


def reloaded(module, *inputs):
    file = io.BytesIO()
    torch.export.save(torch.export.export(module, inputs), file)
    file.seek(0)
    return torch.export.load(file).module()


def test_exported_codebook_returns_the_same_type_and_values():
    codebook, x = EMACodebook(codebook_size=8, dim=4), torch.randn(3, 5, 4)
    codebook(x)
    codebook.eval()
    found, expected = reloaded(codebook, x)(x), codebook(x)
    assert type(found) is Quantized
    assert all(a.equal(b) for a, b in zip(found, expected, strict=True))


def test_exported_multi_scale_quantizer_returns_the_same_types_and_values():
    quantizer = MultiScaleQuantizer([3, 5], codebook_size=4, dim=6)
    maps = [torch.randn(2, 3, 4, 4), torch.randn(2, 5, 2, 2)]
    quantizer(maps)
    quantizer.eval()
    found, expected = reloaded(quantizer, maps)(maps), quantizer(maps)
    assert type(found) is MultiScaleQuantized
    leaves = zip(_pytree.tree_leaves(found), _pytree.tree_leaves(expected), strict=True)
    assert all(a.equal(b) for a, b in leaves)


@pytest.mark.parametrize("function", ACCEPTED, ids=lambda function: function.__name__)
def test_what_a_type_checker_accepts_runs(function):
    function()


@pytest.mark.parametrize("function", REFUSED, ids=lambda function: function.__name__)
def test_what_a_type_checker_refuses_raises(function):
    with pytest.raises((TypeError, ValueError)):
        function()
