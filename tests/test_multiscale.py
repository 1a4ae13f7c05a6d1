"""MultiScaleQuantizer: the laws, with one codebook a scale or a shared one, and equality with codebooks by hand."""

import pytest
import torch
from torch import nn

from tests.laws import (
    DtypeLaws,
    GraphLaws,
    MaskLaws,
    Material,
    StateLaws,
    ValueLaws,
    assert_differs,
    assert_same_bits,
    state_of,
)
from vqssl import ChannelsFirst, EMACodebook, KMeansInit, LearnedProjection, MultiScaleQuantizer, OrthogonalProjection


def identity(in_channels, dim):
    return nn.Identity()


class PyramidMaterial(Material):
    shapes = ((3, 4, 5), (3, 7))

    def make(self, **options):
        torch.manual_seed(11)  # of the projections
        options = {"decay": 0.7, "projection": identity, "channels_last": True, **self.options, **options}
        return MultiScaleQuantizer(
            self.widths or [self.dim] * len(self.shapes), codebook_size=self.codebook_size, dim=self.dim, **options
        )

    def codebooks(self, module):
        return [module.codebook(scale) for scale in range(module.num_scales)]

    def pack(self, maps):
        return list(maps)

    def unpack(self, tree):
        return list(tree)


class TestOneCodebookAScale(PyramidMaterial, ValueLaws, StateLaws, MaskLaws, DtypeLaws):
    pass


class TestShared(PyramidMaterial, ValueLaws, StateLaws, MaskLaws, DtypeLaws):
    options = {"shared": True}  # noqa: RUF012


class SharedCosineKMeansMaterial(PyramidMaterial):
    options = {"shared": True, "metric": "cosine", "initialization": KMeansInit(3)}  # noqa: RUF012

    def projected(self, module, tokens):
        return [z / z.norm(dim=-1, keepdim=True) for z in tokens]


class TestSharedCosineKMeans(SharedCosineKMeansMaterial, StateLaws, MaskLaws):
    pass


@pytest.mark.thorough
class TestOtherLawsOfSharedCosineKMeans(SharedCosineKMeansMaterial, ValueLaws, DtypeLaws, GraphLaws):
    pass


@pytest.mark.thorough
class TestGraphsOfOneCodebookAScale(PyramidMaterial, GraphLaws):
    pass


@pytest.mark.thorough
class TestGraphsOfShared(PyramidMaterial, GraphLaws):
    options = {"shared": True}  # noqa: RUF012


class ProjectedMaterial(PyramidMaterial):
    """Channels first, behind the default projections, whose product may round differently for other row counts."""

    options = {"projection": OrthogonalProjection, "channels_last": False}  # noqa: RUF012
    widths = (8, 6)
    bitwise = False

    def from_tokens(self, maps):
        return [z.movedim(-1, 1) for z in maps]

    def to_tokens(self, tree):
        return [z.movedim(1, -1) for z in tree]

    def projected(self, module, tokens):
        return [project(z) for project, z in zip(module.projections, tokens, strict=True)]

    def of_codes(self, module, scale, codes):
        # The rows of W are orthonormal, and after one step the layer norm still leaves the codes where they are.
        return codes @ module.projections[scale].weight

    def ready_for(self, module, dtype):
        return module.to(dtype)


class TestProjected(ProjectedMaterial, ValueLaws, StateLaws, MaskLaws, DtypeLaws):
    pass


@pytest.mark.thorough
class TestGraphsOfProjected(ProjectedMaterial, GraphLaws):
    """Graphs of the default projections."""


class LearnedMaterial(ProjectedMaterial):
    options = {"projection": LearnedProjection, "channels_last": False, "shared": True}  # noqa: RUF012

    def of_codes(self, module, scale, codes):
        linear = module.projections[scale][0]
        return torch.linalg.lstsq(linear.weight, (codes - linear.bias).T).solution.T


class TestLearned(LearnedMaterial, ValueLaws, StateLaws, MaskLaws, DtypeLaws):
    pass


@pytest.mark.thorough
class TestGraphsOfLearned(LearnedMaterial, GraphLaws):
    """Graphs of learned projections and a shared codebook."""


# ---- equality with codebooks called by hand ----


def pyramid(step, batch=4):
    generator = torch.Generator().manual_seed(step)
    shapes = [(batch, 5, 6), (batch, 6, 4, 5), (batch, 7, 2, 3, 2)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def tokens_of(quantizer, features):
    """Return the projected tokens, one image at a time."""
    found = []
    for project, feature in zip(quantizer.projections, features, strict=True):
        rows = [feature[b][:, None].flatten(2).squeeze(1).T for b in range(len(feature))]
        found.append(project(torch.stack(rows)))
    return found


def by_hand(quantizer, codebooks, features, masks, shared):
    """Return the results by codebooks alone, and update these."""
    tokens = tokens_of(quantizer, features)
    masks = [
        torch.ones(z.shape[:-1], dtype=torch.bool) if mask is None else mask.flatten(1)
        for z, mask in zip(tokens, masks, strict=True)
    ]
    if shared:
        codebook = codebooks[0]
        joined = torch.cat([z.flatten(0, 1) for z in tokens])
        codebook.initialize_(joined, torch.cat([mask.flatten() for mask in masks]))
        out = [codebook.quantize(z, mask) for z, mask in zip(tokens, masks, strict=True)]
        codebook.update_(joined, torch.cat([result.indices.flatten() for result in out]))
        return out
    return [codebook(z, mask) for codebook, z, mask in zip(codebooks, tokens, masks, strict=True)]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_equals_its_codebooks_called_by_hand(shared, masked):
    options = {"decay": 0.6, "commitment_weight": 0.5}
    sizes = 9 if shared else [8, 9, 10]
    quantizer = MultiScaleQuantizer([5, 6, 7], codebook_size=sizes, dim=4, shared=shared, seed=3, **options)
    codebooks = [
        EMACodebook(codebook_size=size, dim=4, seed=3 + s, **options) for s, size in enumerate([9] if shared else sizes)
    ]
    for step in range(6):
        features = pyramid(step)
        masks = [None, torch.rand(4, 4, 5) < 0.5, torch.rand(4, 2, 3, 2) < 0.5] if masked else [None] * 3
        expected = by_hand(quantizer, codebooks, features, masks, shared)
        out = quantizer(features, masks if masked else None)
        for feature, q, k, loss, want in zip(
            features, out.quantized, out.indices, out.commitment_losses, expected, strict=True
        ):
            assert q.shape == (4, 4, *feature.shape[2:])
            assert k.shape == (4, *feature.shape[2:])
            assert_same_bits(k.flatten(1), want.indices)
            torch.testing.assert_close(q.flatten(2).mT, want.quantized, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(loss, want.commitment_loss, rtol=1e-5, atol=0)
        assert out.commitment_loss.item() == pytest.approx(sum(loss.item() for loss in out.commitment_losses))
        for found, want in zip(quantizer.codebooks, codebooks, strict=True):
            torch.testing.assert_close(state_of(found), state_of(want), rtol=1e-5, atol=1e-6)


def test_channels_last_equals_channels_first():
    first = MultiScaleQuantizer([5, 6, 7], codebook_size=8, dim=4)
    last = MultiScaleQuantizer([5, 6, 7], codebook_size=8, dim=4, channels_last=True)
    last.load_state_dict(first.state_dict())
    for step in range(3):
        features = pyramid(step)
        found = last([feature.movedim(1, -1) for feature in features])
        expected = first(features)
        assert_same_bits(found.indices, expected.indices)
        torch.testing.assert_close([q.movedim(-1, 1) for q in found.quantized], list(expected.quantized))


def test_construction_depends_on_the_seed_alone():
    """Ranks with different global seeds hold the same projections and codes."""
    torch.manual_seed(1)
    first = MultiScaleQuantizer([4, 4], codebook_size=8, dim=4)
    torch.manual_seed(2)
    assert_same_bits(state_of(MultiScaleQuantizer([4, 4], codebook_size=8, dim=4)), state_of(first))
    assert_differs(state_of(MultiScaleQuantizer([4, 4], codebook_size=8, dim=4, seed=5)), state_of(first))
    assert not torch.equal(first.projections[0].weight, first.projections[1].weight)


def test_projections_by_name():
    options = {"codebook_size": 8, "dim": 4}
    default, named = (MultiScaleQuantizer([4, 5], **options, **more) for more in ({}, {"projection": "orthogonal"}))
    assert_same_bits(state_of(named), state_of(default))
    learned = MultiScaleQuantizer([4, 5], projection="learned", **options)
    assert [type(projection) for projection in learned.projections] == [LearnedProjection] * 2
    assert MultiScaleQuantizer([4], projection="identity", **options).state_dict().keys() == {
        f"codebooks.0.{name}" for name in EMACodebook(**options).state_dict()
    }


def test_identity_is_a_codebook_for_maps():
    options = {"codebook_size": 8, "dim": 4, "decay": 0.7, "seed": 3}
    quantizer = MultiScaleQuantizer([4], projection="identity", **options)
    maps = ChannelsFirst(EMACodebook(**options))
    for _ in range(3):
        x = torch.randn(2, 4, 5, 6)
        found, expected = quantizer([x]), maps(x)
        assert_same_bits([found.quantized[0], found.indices[0], found.commitment_loss], list(expected))
    assert_same_bits(state_of(quantizer.codebook(0)), state_of(maps.quantizer))


def test_scales_draw_different_codes():
    quantizer = MultiScaleQuantizer([4, 4], codebook_size=8, dim=4)
    x = torch.randn(2, 4, 6, 6)
    quantizer.projections[1].load_state_dict(quantizer.projections[0].state_dict())
    quantizer([x, x])
    assert not torch.equal(quantizer.codebook(0).embed, quantizer.codebook(1).embed)


def test_codebook_returns_that_of_the_scale_or_the_shared_one():
    each = MultiScaleQuantizer([4, 4], codebook_size=[8, 9], dim=4)
    assert [each.codebook(s).codebook_size for s in range(2)] == [8, 9]
    for scale in (-1, 2):
        with pytest.raises(ValueError, match=f"scale must be from 0 to 1, got {scale}"):
            each.codebook(scale)
    shared = MultiScaleQuantizer([4, 4], codebook_size=8, dim=4, shared=True)
    assert shared.codebook(0) is shared.codebook(1)
    assert len(shared.codebooks) == 1


@pytest.mark.parametrize(("shared", "value"), [(False, float("nan")), (True, float("inf"))])
def test_masked_values_do_not_reach_the_projection(shared, value):
    quantizer = MultiScaleQuantizer([5, 6], codebook_size=8, dim=4, shared=shared, projection=LearnedProjection)
    features = [torch.randn(3, 5, 6), torch.randn(3, 6, 4, 4)]
    masks = [torch.rand(3, 6) < 0.5, torch.rand(3, 4, 4) < 0.5]
    for feature, mask in zip(features, masks, strict=True):
        feature.movedim(1, -1)[~mask] = value
    out = quantizer(features, masks)
    (out.commitment_loss + sum(q.square().sum() for q in out.quantized)).backward()
    for parameter in quantizer.parameters():
        assert parameter.grad.isfinite().all()
        assert parameter.grad.abs().sum() > 0


# ---- refusals ----

GOOD = [torch.randn(2, 5, 6), torch.randn(2, 6, 3, 3)]
REFUSALS = {
    "one tensor": ((GOOD[0],), TypeError, "features must be a sequence.*got one tensor"),
    "dict": (({"a": GOOD[0], "b": GOOD[1]},), TypeError, r"got dict: write list\(features.values\(\)\)"),
    "generator": (((x for x in GOOD),), TypeError, r"got generator: write list\(features\)"),
    "too few": ((GOOD[:1],), ValueError, "features must hold one entry for each of the 2 scales, got 1"),
    "too many": (([*GOOD, GOOD[0]],), ValueError, "2 scales, got 3"),
    "order": (
        (GOOD[::-1],),
        ValueError,
        r"features\[0\] must be \(B, C, \*spatial\) with C = 5.*with channels \[5, 6\] in this order",
    ),
    "second": (
        ([GOOD[0], torch.randn(2, 3, 3, 6)],),
        ValueError,
        r"features\[1\].*give one map a scale, with channels \[5, 6\] in this order",
    ),
    "tokens": (
        ([torch.randn(2, 9, 5), torch.randn(2, 4, 6)],),
        ValueError,
        r"features\[0\].*write .*channels_last=True",
    ),
    "(z, maps)": (([torch.randn(2, 6), GOOD],), TypeError, r"features\[1\].*got a list of 2: .*give the maps alone"),
    "one twice": (
        ([GOOD[1], GOOD[1]],),
        ValueError,
        r"features\[0\].*give one map a scale, with channels \[5, 6\] in this order",
    ),
    "foreign": (
        ([torch.randn(2, 8, 3), GOOD[1]],),
        ValueError,
        r"features\[0\].*give one map a scale, with channels \[5, 6\] in this order",
    ),
    "maps and more": (([GOOD[0], [GOOD[1]]],), TypeError, r"features\[1\].*got a list of 1: .*give the maps alone"),
    "rank": (([torch.randn(5), GOOD[1]],), ValueError, r"features\[0\]"),
    "integers": (([GOOD[0], GOOD[1].long()],), TypeError, r"features\[1\] must have a floating dtype"),
    "device": (([GOOD[0], GOOD[1].to("meta")],), ValueError, r"features\[1\] must be on the device of the codes"),
    "one mask": ((GOOD, torch.ones(2, 6, dtype=torch.bool)), TypeError, "masks must be a sequence"),
    "few masks": ((GOOD, [None]), ValueError, "masks must hold one entry for each of the 2 scales, got 1"),
    "mask shape": (
        (GOOD, [None, torch.ones(2, 3, dtype=torch.bool)]),
        ValueError,
        r"masks\[1\] must have one entry for each token, shape \(2, 3, 3\)",
    ),
    "mask dtype": ((GOOD, [None, torch.ones(2, 3, 3)]), TypeError, r"masks\[1\] must be a boolean tensor"),
}


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_name_the_rule_and_leave_the_state(case, shared):
    arguments, error, message = REFUSALS[case]
    quantizer = MultiScaleQuantizer([5, 6], codebook_size=4, dim=3, shared=shared, decay=0.7)
    for _ in range(2):  # before the first update and after it
        before = state_of(quantizer)
        with pytest.raises(error, match=message):
            quantizer(*arguments)
        assert_same_bits(state_of(quantizer), before)
        quantizer(GOOD)
        assert_differs(state_of(quantizer), before)


def test_initialisation_that_refuses_one_scale_changes_none():
    quantizer = MultiScaleQuantizer([5, 6], codebook_size=10, dim=3, initialization=KMeansInit())
    before = state_of(quantizer)
    with pytest.raises(ValueError, match="k-means needs at least as many tokens as codes, got 9 valid tokens"):
        quantizer([GOOD[0], GOOD[1][:1]])
    assert_same_bits(state_of(quantizer), before)


@pytest.mark.parametrize("change", [{"in_channels": [5, 7]}, {"codebook_size": [4, 8]}, {"dim": 2}])
def test_state_that_fits_one_scale_only_changes_none(change):
    sizes = {"in_channels": [5, 6], "codebook_size": [4, 4], "dim": 3}
    quantizer, other = MultiScaleQuantizer(**sizes), MultiScaleQuantizer(**{**sizes, **change}, seed=9)
    before = state_of(quantizer)
    with pytest.raises(ValueError, match=r"must have the shapes of this MultiScaleQuantizer: .*, got"):
        quantizer.load_state_dict(other.state_dict())
    assert_same_bits(state_of(quantizer), before)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"in_channels": 5}, TypeError, r"in_channels must be a sequence.*write \[5\]"),
        ({"in_channels": []}, ValueError, "at least one scale"),
        ({"in_channels": [5, 0]}, ValueError, "each of in_channels must be at least 1"),
        ({"codebook_size": 0}, ValueError, "codebook_size must be at least 1"),
        ({"codebook_size": [4]}, ValueError, "one for each of the 2 scales"),
        ({"codebook_size": [4, 4], "shared": True}, ValueError, "a shared codebook has one codebook_size"),
        ({"dim": 0}, ValueError, "dim must be at least 1"),
        (
            {"projection": "linear"},
            ValueError,
            "projection must be one of 'orthogonal', 'learned', 'identity', or a function, got 'linear'",
        ),
        (
            {"projection": "identity"},
            ValueError,
            r"projection='identity' needs maps of the width of the codes, dim = 3, got 5 channels",
        ),
        ({"projection": LearnedProjection(5, 3)}, TypeError, r"(?s)for tokens .* or a lambda that returns your module"),
        ({"seed": None}, TypeError, "seed must be an int, got None"),
        ({"seed": 2**63}, ValueError, "seed must fit 64 bits"),
        ({"dtype": torch.int32}, TypeError, "dtype"),
        ({"metric": "dot"}, ValueError, "metric must be one of"),
        ({"no_such_option": 1}, TypeError, "no_such_option"),
        ({"dtype": "float32"}, TypeError, "dtype must be a torch.dtype, got 'float32': write torch.float32"),
        ({"decey": 0.9}, TypeError, "MultiScaleQuantizer has no argument 'decey': write decay="),
        ({"in_chanels": 3}, TypeError, "MultiScaleQuantizer has no argument 'in_chanels': write in_channels="),
        ({"process_group": "x"}, TypeError, "process_group must be a ProcessGroup or None"),
    ],
)
def test_constructor_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        MultiScaleQuantizer(**{"in_channels": [5, 6], "codebook_size": 4, "dim": 3, **arguments})


@pytest.mark.parametrize("shared", [False, True])
def test_usage_is_that_of_each_codebook(shared):
    quantizer = MultiScaleQuantizer([4, 6], codebook_size=8, dim=4, shared=shared)
    quantizer([torch.randn(2, 4, 5, 5), torch.randn(2, 6, 3, 3)])
    found = quantizer.usage(dead_below=0.5)
    assert len(found) == (1 if shared else 2)
    for scale, usage in enumerate(found):
        expected = quantizer.codebook(scale).usage(0.5)
        assert [a.equal(b) for a, b in zip(usage, expected, strict=True)] == [True] * len(expected)


def test_error_names_the_other_layout_only_if_all_maps_fit_it():
    tokens = MultiScaleQuantizer([5, 6], codebook_size=4, dim=3, channels_last=True)
    with pytest.raises(ValueError, match=r"features\[0\] must be \(B, ..., C\).*write .*channels_last=False"):
        tokens([torch.randn(2, 5, 4), torch.randn(2, 6, 3, 3)])
    with pytest.raises(ValueError, match=r"features\[1\] must be \(B, ..., C\).*channels \[5, 6\] in this order"):
        tokens([torch.randn(2, 4, 5), GOOD[1]])
    maps = MultiScaleQuantizer([5, 6], codebook_size=4, dim=3)
    with pytest.raises(ValueError, match=r"channels_last=True"):
        maps([torch.randn(2, 6, 9, 5), torch.randn(2, 5, 9, 6)])
    # A permutation would fit, by chance: the error states the rule alone.
    with pytest.raises(ValueError, match=r"channels \[5, 6\] in this order") as caught:
        maps([torch.randn(2, 6, 5, 5), torch.randn(2, 5, 3, 3)])
    assert "channels_last" not in str(caught.value)
