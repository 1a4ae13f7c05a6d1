"""ChannelsFirst: equal to the quantiser on tokens, for every quantiser and spatial rank."""

import copy
import math

import pytest
import torch

from tests.laws import GraphLaws, MaskLaws, Material, assert_differs, assert_same_bits, state_of
from vqssl import ChannelsFirst, EMACodebook, ProductQuantizer, RandomProjectionQuantizer, ResidualQuantizer

QUANTIZERS = {
    "codebook": lambda: EMACodebook(codebook_size=8, dim=4, decay=0.7),
    "residual": lambda: ResidualQuantizer(codebook_size=8, dim=4, num_levels=3, decay=0.7),
    "product": lambda: ProductQuantizer(codebook_size=8, dim=4, num_groups=2, decay=0.7),
}


class MapMaterial(Material):
    """Tokens (B, N, D) as maps (B, D, N)."""

    def make(self, **options):
        return ChannelsFirst(EMACodebook(codebook_size=self.codebook_size, dim=self.dim, **{"decay": 0.7, **options}))

    def codebooks(self, module):
        return [module.quantizer]

    def from_tokens(self, maps):
        # Flattened tokens (N, D) are one map.
        return maps[0].mT if maps[0].ndim > 2 else maps[0]

    def to_tokens(self, tree):
        return [tree.mT if tree.ndim > 2 else tree]


class TestLaws(MapMaterial, MaskLaws):
    """Of masks."""


@pytest.mark.thorough
class TestGraphs(MapMaterial, GraphLaws):
    """Compiled and exported."""


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize("spatial", [(), (7,), (5, 3), (2, 3, 4)])
def test_equals_the_quantiser_on_tokens(name, spatial):
    maps, tokens = ChannelsFirst(QUANTIZERS[name]()), QUANTIZERS[name]()
    for step in range(4):
        x = torch.randn(6, 4, *spatial)
        mask = torch.rand(6, *spatial) < 0.7 if step % 2 else None
        before = copy.deepcopy(maps)
        x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
        found, expected = maps(x1, mask), tokens(x2.movedim(1, -1), mask)
        assert type(found) is type(expected)
        assert found.quantized.shape == x.shape
        assert_same_bits(found.quantized.movedim(1, -1), expected.quantized)
        assert_same_bits(found.indices, expected.indices)
        assert_same_bits(before.quantize(x, mask), found) if step else None
        assert_same_bits(before.lookup(found.indices), found.quantized) if step else None
        for out in (found, expected):
            (out.quantized.square().sum() + out.commitment_loss).backward()
        torch.testing.assert_close(x1.grad, x2.grad)
    assert_same_bits(state_of(maps.quantizer), state_of(tokens))


@pytest.mark.parametrize("name", QUANTIZERS)
def test_freeze_and_usage_are_the_quantisers(name):
    maps = ChannelsFirst(QUANTIZERS[name]())
    maps(torch.randn(6, 4, 9))
    assert_same_bits(maps.usage(0.5), maps.quantizer.usage(0.5))
    assert type(maps.usage()) is type(maps.quantizer.usage())
    before = state_of(maps)
    assert maps.freeze() is maps
    maps(torch.randn(6, 4, 9))
    assert_same_bits(state_of(maps), before)
    assert maps.freeze(False) is maps
    maps(torch.randn(6, 4, 9))
    assert_differs(state_of(maps), before)


def test_refusals_name_the_layout():
    maps = ChannelsFirst(EMACodebook(codebook_size=8, dim=4))
    before = state_of(maps)
    for call, error, words in (
        (lambda: maps(torch.ones(2, 5, 4)), ValueError, r"\(B, D, \*spatial\) with D = 4.*give tokens to .quantizer"),
        (lambda: maps(torch.ones(2, 5, 3)), ValueError, "project it to that width first"),
        (lambda: maps(torch.ones(4)), ValueError, "x must be"),
        (lambda: maps(torch.ones(2, 4).long()), TypeError, "floating dtype"),
        (lambda: maps(torch.ones(2, 4, 3), torch.ones(2, 4, dtype=torch.bool)), ValueError, r"shape \(2, 3\)"),
    ):
        with pytest.raises(error, match=words):
            call()
        assert_same_bits(state_of(maps), before)


@pytest.mark.parametrize(
    "quantizer", [EMACodebook, torch.nn.Identity(), RandomProjectionQuantizer(in_dim=4, codebook_size=8, dim=2), None]
)
def test_only_quantisers_of_tokens_are_taken(quantizer):
    name = type(quantizer).__name__ if isinstance(quantizer, torch.nn.Module) else ".*"
    with pytest.raises(TypeError, match=f"quantizer must be a module that quantises tokens, got {name}: write"):
        ChannelsFirst(quantizer)


def test_masked_values_do_not_reach_the_gradient():
    maps = ChannelsFirst(EMACodebook(codebook_size=8, dim=4))
    x = torch.randn(2, 4, 6)
    x[0, :, 2] = math.nan
    x.requires_grad_()
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[0, 2] = False
    out = maps(x, mask)
    (out.quantized.sum() + out.commitment_loss).backward()
    assert x.grad.isfinite().all()
