"""SERFFusion against the fused map on a common grid and against loops, in all combinations of its options."""

import copy
import itertools
import pickle
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import interpolate

from tests.laws import assert_same_bits, state_of
from tests.profiles import few
from vqssl import SERFFusion
from vqssl.functional import OPERATORS, SERFOperator, pooled_codes, spatial_attention, spatial_attention_weights
from vqssl.functional.serf_operators import OperatorName
from vqssl.types import MultiScaleQuantized, Quantized

DIM = 4
# Spatial sizes of three maps, finest first; each divides the first.
GRIDS = {"1-D": [(12,), (4,), (1,)], "2-D": [(4, 6), (2, 3), (2, 2)], "3-D": [(4, 2, 6), (2, 1, 3), (1, 1, 1)]}
seeds = st.integers(0, 2**31 - 1)


def make(scales=3, **options):
    """Return a SERFFusion in float64 whose alphas differ between scales."""
    fusion = SERFFusion(DIM, scales, **{"hidden_dim": None, **options}).double()
    with torch.no_grad():
        fusion.alpha.copy_(torch.linspace(0.2, 0.9, scales))
    return fusion


def maps(sizes, batch=3):
    return [torch.randn(batch, DIM, *size, dtype=torch.float64) for size in sizes]


def random_masks(sizes, batch=3):
    """Return masks that keep at least one position of each map of each sample."""
    masks = [torch.rand(batch, *size) < 0.5 for size in sizes]
    for mask in masks:
        mask.view(batch, -1)[:, 0] = True
    return masks


def query(batch=3):
    return torch.randn(batch, DIM, dtype=torch.float64)


def channels_last(tensors):
    return [q.movedim(1, -1) for q in tensors]


def slow_refine(fusion, z_c, quantized, masks):
    """Compute f sample by sample and position by position; masks may be None."""
    rows = []
    for b in range(len(z_c)):
        keys_of_all, anchor = [], 0
        for scale, q in enumerate(quantized):
            tokens = q[b].flatten(1).T
            if masks is not None:
                tokens = tokens[masks[scale][b].flatten()]
            fused = [fusion.alpha[scale] * fusion.psi[scale](token) for token in tokens]
            keys_of_all += fused
            anchor = anchor + sum(fused) / len(fused)
        keys = torch.stack(keys_of_all)[None] if fusion.operator.keys == "tokens" else anchor[None]
        rows.append(fusion.operator.function(z_c[b : b + 1], keys, None))
    f = torch.cat(rows)
    return z_c + f if fusion.residual else f


# ---- the anchor ----


@pytest.mark.parametrize("sizes", GRIDS.values(), ids=GRIDS)
def test_anchor_is_the_pooled_fused_map(sizes):
    """The paper up-samples to one grid, projects, weighs, sums and pools; the module never builds the grid."""
    fusion, quantized = make(), maps(sizes)
    fused = 0
    for alpha, psi, q in zip(fusion.alpha, fusion.psi, quantized, strict=True):
        up = interpolate(q, size=sizes[0], mode="nearest")
        fused = fused + alpha * psi(up.movedim(1, -1)).movedim(-1, 1)
    assert fused.shape == (3, DIM, *sizes[0])
    torch.testing.assert_close(fusion.anchor(quantized), fused.flatten(2).mean(2), rtol=1e-12, atol=1e-13)


@given(seed=seeds, scales=st.integers(1, 3), batch=st.integers(1, 3), data=st.data())
def test_masked_anchor_equals_truncated_anchor(seed, scales, batch, data):
    torch.manual_seed(seed)
    sizes = data.draw(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=scales, max_size=scales))
    fusion, quantized, masks = (
        make(scales, operator="pooled", residual=False),
        maps(sizes, batch),
        random_masks(sizes, batch),
    )
    expected = slow_refine(fusion, query(batch), quantized, masks)
    torch.testing.assert_close(fusion.anchor(quantized, masks), expected, rtol=1e-11, atol=1e-12)


# ---- every operator, with and without its options ----


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("sizes", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("name", [name for name in OPERATORS if name != "batch"])
def test_refine_equals_loop(name, sizes, masked):
    fusion = make(operator=name, hidden_dim=6 if name == "concat" else None)
    z_c, quantized = query(), maps(sizes)
    masks = random_masks(sizes) if masked else None
    expected = slow_refine(fusion, z_c, quantized, masks)
    torch.testing.assert_close(fusion.refine(z_c, quantized, masks), expected, rtol=1e-11, atol=1e-12)


def test_batch_operator_attends_over_all_anchors():
    fusion, z_c, quantized = make(operator="batch", residual=False), query(), maps(GRIDS["2-D"])
    expected = OPERATORS["batch"].function(z_c, fusion.anchor(quantized), None)
    torch.testing.assert_close(fusion(z_c, quantized), expected)


@pytest.mark.parametrize(
    ("name", "residual", "hidden"), list(itertools.product(OPERATORS, [None, False, True], [None, 10]))
)
def test_options_combine_or_raise(name, residual, hidden):
    wide = OPERATORS[name].width != 1
    if wide and (residual or hidden is None):
        with pytest.raises(ValueError, match="leave residual out" if residual else "give hidden_dim"):
            make(operator=name, residual=residual, hidden_dim=hidden)
        return
    fusion = make(operator=name, residual=residual, hidden_dim=hidden)
    z_c, quantized = query(), maps(GRIDS["2-D"])
    f = fusion.refine(z_c, quantized)
    bare = make(operator=name, residual=False, hidden_dim=10)
    bare.psi.load_state_dict(fusion.psi.state_dict())
    operated = bare.refine(z_c, quantized)
    added = not wide if residual is None else residual
    assert fusion.residual == added
    torch.testing.assert_close(f, z_c + operated if added else operated)

    z_s = fusion(z_c, quantized)
    assert z_s.shape == (3, DIM)
    if hidden is None:
        assert z_s.equal(f)
    else:
        # Linear, BatchNorm, ReLU, Linear by hand.
        first, _, _, second = fusion.mlp
        h = f @ first.weight.T + first.bias
        h = (h - h.mean(0)) / (h.var(0, correction=0) + 1e-5).sqrt()
        torch.testing.assert_close(z_s, h.clamp_min(0) @ second.weight.T + second.bias)
    z_s.square().sum().backward()
    for name_of, parameter in fusion.named_parameters():
        assert parameter.grad is not None, name_of
        assert parameter.grad.isfinite().all()


def test_default_options_and_repr():
    fusion = SERFFusion(8, 2)
    assert (fusion.operator_name, fusion.residual, fusion.hidden_dim) == ("spatial", True, 2048)
    assert fusion.alpha.tolist() == [0.5, 0.5]
    assert repr(fusion).splitlines()[0] == "SERFFusion("
    assert "8, num_scales=2, operator='spatial', residual=True" in repr(fusion)


# ---- layout ----


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("name", ["spatial", "channel"])
@pytest.mark.parametrize("sizes", GRIDS.values(), ids=GRIDS)
def test_channels_last_equals_channels_first_for_any_strides(sizes, name, masked):
    first, z_c, quantized = make(operator=name), query(), maps(sizes)
    tokens = make(operator=name, channels_last=True)
    tokens.load_state_dict(first.state_dict())
    masks = random_masks(sizes) if masked else None
    expected = first(z_c, quantized, masks)
    assert tokens(z_c, channels_last(quantized), masks).equal(expected)
    assert tokens.anchor(channels_last(quantized), masks).equal(first.anchor(quantized, masks))
    # The same values in another memory layout.
    strided = [q.movedim(1, -1).contiguous().movedim(-1, 1) for q in quantized]
    torch.testing.assert_close(first(z_c, strided, masks), expected)


@pytest.mark.parametrize("layout", ["first", "last"])
def test_map_without_spatial_axes_is_one_token(layout):
    fusion, z_c, vectors = make(2, channels_last=layout == "last"), query(), maps([(), ()])
    expected = make(2)
    expected.load_state_dict(fusion.state_dict())
    torch.testing.assert_close(fusion(z_c, vectors), expected(z_c, [v[..., None] for v in vectors]))
    assert [m.shape for m in fusion.attention_maps(z_c, vectors)] == [(3,), (3,)]


def test_maps_may_differ_in_rank():
    sizes = [(5,), (2, 3), (2, 1, 2)]
    fusion, z_c, quantized = make(), query(), maps(sizes)
    torch.testing.assert_close(fusion(z_c, quantized), slow_refine(fusion, z_c, quantized, None))
    assert [m.shape for m in fusion.attention_maps(z_c, quantized)] == [(3, *size) for size in sizes]


# ---- masks ----


def test_masks_may_be_none_for_some_scales():
    sizes = GRIDS["2-D"]
    fusion, z_c, quantized, masks = make(), query(), maps(sizes), random_masks(sizes)
    whole = [torch.ones_like(m) for m in masks]
    some = [None, masks[1], None]
    expected = fusion(z_c, quantized, [whole[0], masks[1], whole[2]])
    torch.testing.assert_close(fusion(z_c, quantized, some), expected)
    torch.testing.assert_close(fusion(z_c, quantized, whole), fusion(z_c, quantized))
    torch.testing.assert_close(fusion(z_c, quantized, [None] * 3), fusion(z_c, quantized))


@pytest.mark.parametrize("name", ["spatial", "channel"])
def test_masked_tokens_change_neither_value_nor_gradient(name):
    sizes = GRIDS["2-D"]
    z_c, quantized, masks = query(), maps(sizes), random_masks(sizes)
    clean, spoilt = make(operator=name), make(operator=name)
    spoilt.load_state_dict(clean.state_dict())
    hidden = [torch.where(m[:, None], q, torch.nan).requires_grad_() for q, m in zip(quantized, masks, strict=True)]
    expected, found = clean(z_c, quantized, masks), spoilt(z_c, hidden, masks)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-14)
    expected.square().sum().backward()
    found.square().sum().backward()
    for (place, a), b in zip(spoilt.named_parameters(), clean.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-13, msg=lambda m, place=place: f"{place}: {m}")
    for q, mask in zip(hidden, masks, strict=True):
        assert (q.grad.movedim(1, -1)[~mask] == 0).all()


@pytest.mark.parametrize("name", OPERATORS)
def test_fully_masked_sample_has_finite_value_and_gradients(name):
    sizes = GRIDS["2-D"]
    fusion, z_c, quantized, masks = make(operator=name, hidden_dim=6), query(), maps(sizes), random_masks(sizes)
    for q, mask in zip(quantized, masks, strict=True):
        mask[1] = False
        q[1] = torch.nan
        q.requires_grad_()
    if name == "spatial":
        assert fusion.refine(z_c, quantized, masks)[1].equal(z_c[1])  # no valid token, nothing added
    z_s = fusion(z_c, quantized, masks)
    assert z_s.isfinite().all()
    z_s.square().sum().backward()
    assert all(t.grad.isfinite().all() for t in [*fusion.parameters(), *quantized])


# ---- attention maps ----


@pytest.mark.parametrize("layout", ["first", "last"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("sizes", GRIDS.values(), ids=GRIDS)
def test_output_is_tokens_weighted_by_attention_maps(sizes, masked, layout):
    fusion, z_c, quantized = make(residual=False, channels_last=layout == "last"), query(), maps(sizes)
    masks = random_masks(sizes) if masked else None
    given_maps = channels_last(quantized) if layout == "last" else quantized
    found = fusion.attention_maps(z_c, given_maps, masks)
    assert [m.shape for m in found] == [(3, *size) for size in sizes]
    torch.testing.assert_close(sum(m.flatten(1).sum(1) for m in found), torch.ones(3, dtype=torch.float64))
    if masked:
        assert all((m[~mask] == 0).all() for m, mask in zip(found, masks, strict=True))
    output = 0
    for alpha, psi, q, weights in zip(fusion.alpha, fusion.psi, quantized, found, strict=True):
        tokens = alpha * psi(q.movedim(1, -1))
        output = output + (weights[..., None] * tokens).flatten(1, -2).sum(1)
    torch.testing.assert_close(fusion(z_c, given_maps, masks), output, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda fusion: pickle.loads(pickle.dumps(fusion))])
def test_copied_module_has_the_same_attention_maps(duplicate):
    fusion, z_c, quantized = make(), query(), maps(GRIDS["2-D"])
    expected = fusion.attention_maps(z_c, quantized)
    found = duplicate(fusion).attention_maps(z_c, quantized)
    assert all(a.equal(b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", [name for name in OPERATORS if name != "spatial"])
def test_attention_maps_need_the_spatial_operator(name):
    with pytest.raises(ValueError, match=f"need operator 'spatial', got '{name}'.*write SERFFusion"):
        make(operator=name, hidden_dim=6).attention_maps(query(), maps(GRIDS["2-D"]))


# ---- a custom operator ----


def strongest_position(z_c, tokens, mask):
    weights = spatial_attention_weights(z_c, tokens, mask)
    return tokens[torch.arange(len(tokens)), weights.argmax(1)]


def sum_and_difference(z_c, z_q, mask):
    return torch.cat([z_c + z_q, z_c - z_q], dim=-1)


def test_custom_operator_on_tokens():
    sizes = GRIDS["2-D"]
    fusion = make(operator=SERFOperator(strongest_position, "tokens"), residual=False)
    z_c, quantized, masks = query(), maps(sizes), random_masks(sizes)
    assert fusion.operator_name == "strongest_position"
    torch.testing.assert_close(fusion(z_c, quantized, masks), slow_refine(fusion, z_c, quantized, masks))
    with pytest.raises(ValueError, match="strongest_position"):
        fusion.attention_maps(z_c, quantized)


def test_custom_operator_of_double_width():
    operator = SERFOperator(sum_and_difference, "anchor", width=2)
    fusion, z_c, quantized = make(operator=operator, hidden_dim=6), query(), maps(GRIDS["2-D"])
    assert fusion.refine(z_c, quantized).shape == (3, 2 * DIM)
    assert fusion(z_c, quantized).shape == (3, DIM)
    with pytest.raises(ValueError, match="sum_and_difference"):
        make(operator=operator, residual=True, hidden_dim=6)


def test_every_operator_has_its_name_as_a_type():
    assert set(get_args(OperatorName)) == set(OPERATORS)


def test_operator_objects_equal_operators_by_name():
    z_c, quantized = query(), maps(GRIDS["2-D"])
    for name, function, keys in [("spatial", spatial_attention, "tokens"), ("pooled", pooled_codes, "anchor")]:
        named, written = make(operator=name), make(operator=SERFOperator(function, keys))
        written.load_state_dict(named.state_dict())
        assert written(z_c, quantized).equal(named(z_c, quantized))


# ---- gradients, dtypes, devices, state ----


@pytest.mark.parametrize("name", OPERATORS)
def test_gradients_equal_finite_differences(name):
    fusion = make(2, operator=name, hidden_dim=5).eval()
    z_c, quantized = query(2).requires_grad_(), [q.requires_grad_() for q in maps([(3,), (2,)], 2)]
    assert torch.autograd.gradcheck(lambda c, *q: fusion(c, q), (z_c, *quantized))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", OPERATORS)
def test_half_precision_is_finite(name, dtype):
    fusion = make(operator=name, hidden_dim=8).to(dtype)
    sizes = GRIDS["2-D"]
    z_c, quantized, masks = query().to(dtype), [q.to(dtype) for q in maps(sizes)], random_masks(sizes)
    z_s = fusion(z_c, quantized, masks)
    assert z_s.dtype == dtype
    assert z_s.isfinite().all()
    z_s.sum().backward()
    assert all(p.grad.isfinite().all() for p in fusion.parameters())


@pytest.mark.parametrize("name", OPERATORS)
def test_autocast_is_finite(name):
    fusion = SERFFusion(DIM, 3, operator=name, hidden_dim=8)
    z_c, quantized = query().float(), [q.float() for q in maps(GRIDS["2-D"])]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z_s = fusion(z_c, quantized)
    z_s.float().sum().backward()
    assert z_s.isfinite().all()
    assert all(p.grad.isfinite().all() for p in fusion.parameters())


@pytest.mark.parametrize("name", OPERATORS)
def test_runs_on_the_meta_device(name):
    fusion = SERFFusion(DIM, 3, operator=name, hidden_dim=8, device="meta")
    assert all(p.device.type == "meta" for p in [*fusion.parameters(), *fusion.buffers()])
    quantized = [q.to("meta") for q in maps(GRIDS["2-D"])]
    masks = [m.to("meta") for m in random_masks(GRIDS["2-D"])]
    z_s = fusion.double()(query().to("meta"), quantized, masks)
    assert z_s.device.type == "meta"
    assert z_s.shape == (3, DIM)


def test_dtype_option_sets_all_parameters():
    fusion = SERFFusion(DIM, 3, hidden_dim=8, dtype=torch.float64)
    assert {p.dtype for p in fusion.parameters()} == {torch.float64}


def test_loaded_state_gives_the_same_output():
    fusion, other, z_c, quantized = make(hidden_dim=6), make(hidden_dim=6), query(), maps(GRIDS["2-D"])
    fusion(z_c, quantized)
    other.load_state_dict(fusion.state_dict())
    assert other.eval()(z_c, quantized).equal(fusion.eval()(z_c, quantized))


@pytest.mark.parametrize("name", [name for name in OPERATORS if name != "batch"])
def test_samples_are_independent_in_eval_mode(name):
    fusion, z_c, quantized = make(operator=name, hidden_dim=6).eval(), query(), maps(GRIDS["2-D"])
    alone = torch.cat([fusion(z_c[b : b + 1], [q[b : b + 1] for q in quantized]) for b in range(3)])
    torch.testing.assert_close(fusion(z_c, quantized), alone)


# ---- errors ----


@pytest.mark.parametrize(
    ("error", "says", "arguments"),
    [
        (ValueError, "dim must be at least 1", {"dim": 0}),
        (TypeError, "dim must be an int", {"dim": 4.0}),
        (ValueError, "num_scales must be at least 1", {"num_scales": 0}),
        (ValueError, "hidden_dim must be at least 1", {"hidden_dim": 0}),
        (TypeError, "dtype must be a torch.dtype, got 'float16': write torch.float16", {"dtype": "float16"}),
        (TypeError, "SERFFusion has no argument 'hiden_dim': write hidden_dim=", {"hiden_dim": 8}),
        (ValueError, "operator must be one of 'channel', 'batch', 'spatial'", {"operator": "cross"}),
        (TypeError, r"operator must be a name or.*write .*SERFOperator\(function", {"operator": spatial_attention}),
        (TypeError, "operator must be a name or", {"operator": None}),
    ],
)
def test_wrong_options_are_refused(error, says, arguments):
    with pytest.raises(error, match=says):
        SERFFusion(**{"dim": 4, "num_scales": 2, **arguments})


def z(*shape):
    return torch.zeros(shape)


GOOD = [z(3, 4, 2, 2), z(3, 4, 1, 1)]


@pytest.mark.parametrize(
    ("error", "says", "arguments"),
    [
        (TypeError, "quantized must be a sequence", (z(3, 4), z(2, 4, 2, 2))),
        (ValueError, "quantized must hold one entry for each of the 2 scales, got 1", (z(3, 4), GOOD[:1])),
        (ValueError, r"quantized\[1\] must be \(B, dim, \*spatial\)", (z(3, 4), [GOOD[0], z(3, 5, 1, 1)])),
        (TypeError, "write its .quantized", (z(3, 4), MultiScaleQuantized(tuple(GOOD), (), z(), ()))),
        (ValueError, r"quantized\[0\] must be \(B, dim, \*spatial\)", (z(3, 4), [z(3), z(3)])),
        (ValueError, r"quantized\[0\] must hold the 2 samples of z_c, got 3: .*of the same images", (z(2, 4), GOOD)),
        (ValueError, r"quantized\[1\] must hold the 3 samples of z_c, got 6", (z(3, 4), [GOOD[0], z(6, 4, 1, 1)])),
        (TypeError, r"quantized\[1\].*pass .quantized .*not .indices", (z(3, 4), [GOOD[0], GOOD[1].long()])),
        (TypeError, r"quantized\[1\] must have a floating", (z(3, 4), [GOOD[0], GOOD[1].byte()])),
        (TypeError, r"quantized\[1\].*write quantized\[1\].quantized", (z(3, 4), [GOOD[0], Quantized(z(), z(), z())])),
        (TypeError, r"z_c .*got a tuple of 2: .*z, maps = teacher\(view\)", ((z(3, 4), GOOD), GOOD)),
        (ValueError, r"quantized\[0\].*the channels_last of the quantizer", (z(3, 4), [z(3, 2, 2, 4), GOOD[1]])),
        (ValueError, r"z_c must be \(B, dim\) with dim = 4", (z(3, 5), GOOD)),
        (ValueError, r"one embedding a sample.*write z_c.flatten\(1\)", (z(3, 4, 1, 1), GOOD)),
        (
            TypeError,
            r"z_c must have the dtype .* torch.float32, got torch.float16: write z_c.to",
            (z(3, 4).half(), GOOD),
        ),
        (TypeError, r"quantized\[1\] must have the dtype", (z(3, 4), [GOOD[0], GOOD[1].double()])),
        (TypeError, "z_c must have a floating", (z(3, 4).long(), GOOD)),
        (TypeError, "masks must be a sequence", (z(3, 4), GOOD, z(3, 2, 2) > 0)),
        (ValueError, "masks must hold one entry", (z(3, 4), GOOD, [None])),
        (TypeError, r"masks\[0\] must be a boolean", (z(3, 4), GOOD, [z(3, 2, 2), None])),
        (ValueError, r"masks\[1\] must have one entry", (z(3, 4), GOOD, [None, z(3, 2, 2) > 0])),
    ],
)
def test_wrong_input_is_refused(error, says, arguments):
    fusion = SERFFusion(4, 2, hidden_dim=None)
    for call in (fusion, fusion.refine, fusion.attention_maps):
        with pytest.raises(error, match=says):
            call(*arguments)


def test_state_of_another_width_is_refused_and_nothing_changes():
    fusion, other = SERFFusion(4, 2, hidden_dim=8), SERFFusion(4, 2, hidden_dim=6)
    before = state_of(fusion)
    with pytest.raises(ValueError, match=r"shapes of this SERFFusion: mlp.0.weight \(8, 4\), got \(6, 4\).*and 4 more"):
        fusion.load_state_dict(other.state_dict())
    assert_same_bits(state_of(fusion), before)


def test_anchor_refuses_maps_of_different_batches():
    with pytest.raises(ValueError, match=r"quantized\[1\] must hold the 3 samples of quantized\[0\], got 2"):
        SERFFusion(4, 2).anchor([z(3, 4, 2), z(2, 4, 2)])


@pytest.mark.parametrize("name", few(OPERATORS))
def test_compiles_to_one_graph_and_exports(name):
    fusion = make(operator=name, hidden_dim=6).eval()
    inputs = (query(), maps(GRIDS["2-D"]), random_masks(GRIDS["2-D"]))
    expected = fusion(*inputs)
    torch.testing.assert_close(torch.compile(fusion, fullgraph=True, backend="eager")(*inputs), expected)
    torch.testing.assert_close(torch.export.export(fusion, inputs).module()(*inputs), expected)


@pytest.mark.parametrize(("layout", "shape"), [(False, (3, 2, 2, 4)), (True, (3, 4, 2, 2))])
def test_other_layout_is_refused_without_a_guess(layout, shape):
    """An axis of width dim may be a spatial one, so the error must not advise to read it as the channels."""
    with pytest.raises(ValueError, match=f"since channels_last is {layout}, got shape") as caught:
        SERFFusion(4, 1, channels_last=layout)(z(3, 4), [z(*shape)])
    assert f"channels_last={not layout}" not in str(caught.value)
    assert "movedim" not in str(caught.value)
