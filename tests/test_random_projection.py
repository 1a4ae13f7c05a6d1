"""RandomProjectionQuantizer: its equation in float64, vector-quantize-pytorch's, and that nothing in it moves."""

import copy
import io
import math
import pickle
import warnings
from typing import Any

import pytest
import torch
import vector_quantize_pytorch
from torch import nn

from tests.laws import assert_same_bits, state_of, through_file
from vqssl import RandomProjectionQuantizer
from vqssl.functional import code_counts, codebook_usage
from vqssl.health import examine, find_codebooks
from vqssl.random_projection import sequence_norm, token_norm


def make(**options):
    return RandomProjectionQuantizer(**{"in_dim": 10, "codebook_size": 32, "dim": 4, **options})


def features(step=0, shape=(3, 20), dtype=torch.float32):
    return torch.randn(*shape, 10, generator=torch.Generator().manual_seed(step), dtype=dtype) * 5 + 2


# ---- what it computes ----


def test_codes_equal_the_equation_in_float64():
    quantizer, x = make(num_codebooks=3, seed=5), features().double()
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, correction=0)
    normed = (x - mean) / (variance + 1e-5).sqrt()
    out = quantizer(x)
    for number in range(3):
        z = normed @ quantizer.projection[number].double().T
        distances = (z / z.norm(dim=-1, keepdim=True))[..., None, :] - quantizer.codes[number].double()
        assert torch.equal(out[..., number], distances.norm(dim=-1).argmin(-1))


def test_codes_equal_vector_quantize_pytorch():
    """With one codebook: with several, theirs puts an untrained linear layer before each."""
    theirs = vector_quantize_pytorch.RandomProjectionQuantizer(dim=10, codebook_size=32, codebook_dim=4)
    ours = make()
    theirs.rand_projs.copy_(ours.projection.mT)
    theirs.vq._codebook.embed.data.copy_(ours.codes)
    for step in range(4):
        x = features(step)
        assert torch.equal(ours(x)[..., 0], theirs(x))


def test_projection_is_xaviers_and_codes_have_length_one():
    quantizer = make(in_dim=300, dim=100, num_codebooks=2)
    torch.testing.assert_close(quantizer.projection.std(), torch.tensor(math.sqrt(2 / 400)), rtol=0.02, atol=0)
    assert quantizer.projection.mean().abs() < 1e-3
    lengths = quantizer.codes.norm(dim=-1)
    torch.testing.assert_close(lengths, torch.ones_like(lengths))


def test_gaussian_input_uses_nearly_all_codes_and_without_the_norm_an_offset_uses_few():
    x = torch.randn(4000, 10, generator=torch.Generator().manual_seed(0)) + 20

    def perplexity(norm_input):
        return codebook_usage(code_counts(make(norm_input=norm_input)(x)[:, 0], 32)).perplexity.item()

    assert perplexity("token") > 20
    assert perplexity("sequence") > 20
    assert perplexity("none") < 5


def test_state_depends_on_the_seed_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = make(num_codebooks=2)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert_same_bits(state_of(make(num_codebooks=2)), state_of(first))
    other = make(num_codebooks=2, seed=1)
    for name in ("projection", "codes"):
        ours = getattr(first, name)
        assert not torch.equal(ours[0], ours[1])
        assert torch.equal(ours[1], getattr(other, name)[0])  # codebook c draws from seed + c


def test_lookup_returns_the_codes():
    quantizer = make(num_codebooks=2)
    indices = torch.tensor([[3, 31], [-1, 0]])
    found = quantizer.lookup(indices)
    assert found.shape == (2, 2, 4)
    assert_same_bits(found[0, 1], quantizer.codes[1, 31])
    assert_same_bits(found[1], torch.stack([torch.zeros(4), quantizer.codes[1, 0]]))


# ---- the normalisation of the input ----


def test_sequence_norm_is_that_of_each_sequence_without_its_padding():
    x, lengths = features(), [20, 7, 1]
    mask = torch.arange(20) < torch.tensor(lengths)[:, None]
    padded = torch.where(mask[..., None], x, math.nan)
    found = sequence_norm(padded, mask)
    for row, length in enumerate(lengths):
        alone = x[row, :length].double()
        expected = (alone - alone.mean(0)) / (alone.var(0, correction=0) + 1e-5).sqrt()
        torch.testing.assert_close(found[row, :length].double(), expected, rtol=1e-4, atol=1e-4)
    maps = features(1, (2, 4, 5))
    torch.testing.assert_close(sequence_norm(maps), sequence_norm(maps.flatten(1, 2)).reshape(maps.shape))
    torch.testing.assert_close(sequence_norm(x[0]), sequence_norm(x[:1])[0])


@pytest.mark.parametrize("norm_input", ["token", "sequence"])
def test_offset_and_scale_of_the_input_do_not_matter(norm_input):
    quantizer, x = make(norm_input=norm_input), features(dtype=torch.float64)
    assert torch.equal(quantizer(100 * x + 7), quantizer(100 * x))


def test_norm_given_as_a_function():
    quantizer, x = make(norm_input=lambda x, mask: token_norm(x)), features()
    assert torch.equal(quantizer(x), make()(x))
    with pytest.raises(ValueError, match="norm_input must return a tensor of the tokens' shape"):
        make(norm_input=lambda x, mask: x[..., :2])(x)


# ---- masks, precision, modes ----


@pytest.mark.parametrize("norm_input", ["token", "sequence", "none"])
def test_masked_and_broken_tokens_get_no_code_and_change_no_other(norm_input):
    quantizer, x = make(norm_input=norm_input, num_codebooks=2), features()
    mask = torch.rand(3, 20) < 0.7
    expected = quantizer(x, mask)
    assert (expected[~mask] == -1).all()
    assert (expected[mask] >= 0).all()
    x[~mask] = math.inf
    assert torch.equal(quantizer(x, mask), expected)
    x[0, 3, 2] = math.nan
    found = quantizer(x, mask)
    assert (found[0, 3] == -1).all()
    if norm_input != "sequence":  # there it no longer counts in the statistics of its sequence
        other = mask.clone()
        other[0, 3] = False
        assert torch.equal(found[other], expected[other])
    assert torch.equal(found[1:], expected[1:])


def test_empty_batch_has_no_codes():
    assert make(num_codebooks=2)(features()[:0]).shape == (0, 20, 2)


@pytest.mark.filterwarnings("error")
def test_nothing_moves_or_warns_in_any_mode():
    quantizer = make()
    before, x = state_of(quantizer), features().requires_grad_()
    expected = quantizer(x)
    assert not expected.is_floating_point()
    for mode in (quantizer.train, quantizer.eval):
        mode()
        assert torch.equal(quantizer(x), expected)
    assert not list(quantizer.parameters())
    assert_same_bits(state_of(quantizer), before)
    assert torch.equal(copy.deepcopy(quantizer)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(quantizer))(x), expected)


def test_half_precision_and_autocast_change_no_target():
    quantizer, x = make(), features().half()
    expected = quantizer(x.float())
    for cast in ("half", "bfloat16"):
        cast_to = getattr(copy.deepcopy(quantizer), cast)()
        assert cast_to.codes.dtype == cast_to.projection.dtype == torch.float32
        assert torch.equal(cast_to(x), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(quantizer(x.float()), expected)
    assert quantizer.double().codes.dtype == torch.float64


def test_loaded_state_gives_the_same_targets():
    quantizer, other, x = make(seed=3), make(), features()
    assert not torch.equal(other(x), quantizer(x))
    other.load_state_dict(through_file(quantizer.state_dict()))
    assert torch.equal(other(x), quantizer(x))
    before = state_of(other)
    for state, words in (
        ({**before, "codes": torch.full((1, 32, 4), math.nan)}, "codes must be finite"),
        (make(dim=5).state_dict(), "must have the shapes of this RandomProjectionQuantizer"),
    ):
        with pytest.raises(ValueError, match=words):
            other.load_state_dict(state)
        assert_same_bits(state_of(other), before)


def test_reset_after_meta_equals_construction():
    quantizer = make(device="meta")
    assert quantizer.codes.is_meta
    quantizer.to_empty(device="cpu").reset_parameters()
    assert_same_bits(state_of(quantizer), state_of(make()))


def test_compiles_to_one_graph_and_exports():
    quantizer, x, mask = make(num_codebooks=2), features(), torch.rand(3, 20) < 0.6
    torch._dynamo.reset()
    compiled = torch.compile(quantizer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, mask), quantizer(x, mask))
    batch = {0: torch.export.Dim.DYNAMIC}
    program = torch.export.export(quantizer, (x, mask), dynamic_shapes=(batch, batch))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    more, more_mask = features(1, (5, 20)), torch.rand(5, 20) < 0.6
    assert torch.equal(torch.export.load(file).module()(more, more_mask), quantizer(more, more_mask))


# ---- health ----


def test_health_knows_that_the_codes_are_random_on_purpose():
    model = nn.ModuleDict({"targets": make(num_codebooks=2), "one": make(seed=9)})
    for source in (model, model.state_dict(), {"model": through_file(model.state_dict()), "epoch": 1}):
        reports = examine(source)
        assert list(reports) == ["targets.0", "targets.1", "one"]
        for report in reports.values():
            assert report.level == "ok"
            assert report.findings[0].says == "32 fixed random codes, as intended: their usage is not counted"
            assert report.fixed
            assert report.tokens_per_step is None
    assert find_codebooks(model)["targets.1"].embed.equal(model["targets"].codes[1])
    assert examine(make())["codebook"].codes.equal(make().codes[0])
    assert examine(model, since=model)["one"].level == "ok"
    (changed,) = examine({"one": make().state_dict()}, since={"one": make(seed=1).state_dict()}).values()
    assert changed.level == "act"
    assert "others than before" in changed.findings[0].says
    broken = make()
    broken.codes[0, 3] = math.nan
    assert examine(broken)["codebook"].findings[0].says == "3% of the codes (1 of 32) are not finite"


def test_health_shows_no_usage_of_fixed_codes(tmp_path):
    rich, matplotlib = pytest.importorskip("rich"), pytest.importorskip("matplotlib")
    assert rich, matplotlib
    from vqssl.health import draw, show

    file = io.StringIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        show(examine(make()), file=file, width=80)
        draw(examine(make()), tmp_path / "health.svg")
    assert "perplexity" in file.getvalue()
    assert "(100%)" not in file.getvalue()
    assert "assumed" not in file.getvalue()


# ---- refusals ----

build: Any = RandomProjectionQuantizer  # one call is wrong on purpose


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: make(in_dim=0), ValueError, "in_dim must be at least 1"),
        (lambda: make(num_codebooks=0), ValueError, "num_codebooks must be at least 1"),
        (lambda: make(norm_input="layer"), ValueError, "norm_input must be one of 'token', 'sequence', 'none'"),
        (lambda: make(codebook_dim=4), TypeError, "write dim=, the width of the codes"),
        (lambda: make(seed=1.5), TypeError, "seed must be an int"),
        (lambda: make(dtype=torch.int64), TypeError, "dtype must be a floating dtype"),
        (lambda: build(10, 32, 4), TypeError, "write RandomProjectionQuantizer.in_dim="),
        (lambda: make()(torch.ones(3, 4)), ValueError, "x must be .* dim = 10"),
        (lambda: make()(torch.ones(3, 10).long()), TypeError, "floating dtype"),
        (lambda: make()(torch.ones(3, 10), torch.ones(2, dtype=torch.bool)), ValueError, "mask must have one entry"),
        (lambda: make().lookup(torch.tensor([1, 2])), ValueError, "with 1 in the last axis"),
        (lambda: make().lookup(torch.tensor([[32]])), ValueError, "from -1 .masked. to 31"),
    ],
)
def test_refusals_say_what_to_write(call, error, message):
    with pytest.raises(error, match=message):
        call()
