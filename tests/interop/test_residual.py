"""Residual quantisers of other libraries: every level to the bit. foreign.py tests encodec's own module."""

import pytest
import torch
import vector_quantize_pytorch

from tests.interop.test_encodec import META, TRANSFORMERS, foreign
from tests.laws import assert_same_bits, state_of
from vqssl import BatchRevival
from vqssl.interop import (
    codebook_from_encodec,
    codebook_to_encodec,
    residual_quantizer_from_encodec,
    residual_quantizer_from_vector_quantize_pytorch,
)


def state_of_levels(where=META, levels=12, **options):
    layers = [foreign(**options) for _ in range(levels)]
    return layers, {where.format(n) + name: value for n, layer in enumerate(layers) for name, value in layer.items()}


@pytest.mark.parametrize("where", [META, TRANSFORMERS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_level_of_encodec_is_read_to_the_bit_in_the_order_of_numbers(where, dtype):
    layers, state = state_of_levels(where, dtype=dtype)
    as_text = {name: state[name] for name in sorted(state)}  # as safetensors writes them: 10 before 2
    quantizer = residual_quantizer_from_encodec(as_text, seed=7, revival=BatchRevival())
    assert quantizer.num_levels == 12
    for level, (codebook, layer) in enumerate(zip(quantizer.codebooks, layers, strict=True)):
        for name in ("embed", "embed_avg", "cluster_size"):
            assert_same_bits(getattr(codebook, name), layer[name])
        alone = codebook_from_encodec(state, where.format(level), seed=7 + level, revival=BatchRevival())
        assert_same_bits(state_of(codebook), state_of(alone))
        assert repr(codebook) == repr(alone)


def test_levels_are_written_back_to_the_bit():
    _, state = state_of_levels()
    quantizer, back = residual_quantizer_from_encodec(state), {name: torch.zeros_like(x) for name, x in state.items()}
    for level, codebook in enumerate(quantizer.codebooks):
        back = codebook_to_encodec(codebook, META.format(level), like=back)
    assert_same_bits(back, state)


def test_indices_and_sums_equal_a_loop_over_their_levels():
    layers, state = state_of_levels(levels=3)
    quantizer, x = residual_quantizer_from_encodec(state).eval(), torch.randn(5, 9, 4)
    rest, total, indices = x, 0.0, []
    for layer in layers:  # as encodec adds
        chosen = torch.cdist(rest, layer["embed"]).argmin(-1)
        indices.append(chosen)
        rest = rest - layer["embed"][chosen]
        total = total + layer["embed"][chosen]
    out = quantizer(x)
    assert torch.equal(out.indices, torch.stack(indices, -1))
    assert_same_bits(out.quantized, total)
    assert out.commitment_loss.requires_grad is False


@pytest.mark.parametrize("inited", [True, False])
def test_flag_decides_whether_levels_are_initialised(inited):
    _, state = state_of_levels(levels=2, inited=inited)
    quantizer = residual_quantizer_from_encodec(state)
    assert [bool(codebook.initialized) for codebook in quantizer.codebooks] == [inited] * 2
    quantizer(torch.randn(30, 4))
    assert all(codebook.initialized for codebook in quantizer.codebooks)


def test_residual_of_vector_quantize_pytorch_is_read_and_encodes_as_theirs():
    theirs = vector_quantize_pytorch.ResidualVQ(dim=4, num_quantizers=3, codebook_size=(8, 6, 5), rotation_trick=False)
    for _ in range(5):
        theirs(torch.randn(2, 30, 4))
    theirs.eval()
    state = {"vq." + name: value for name, value in theirs.state_dict().items()}
    quantizer = residual_quantizer_from_vector_quantize_pytorch(state, "vq.", decay=0.5).eval()
    x = torch.randn(2, 30, 4)
    found, expected = quantizer(x), theirs(x)
    assert torch.equal(found.indices, expected[1])
    torch.testing.assert_close(found.quantized, expected[0], rtol=1e-6, atol=1e-6)
    assert [codebook.decay for codebook in quantizer.codebooks] == [0.5] * 3
    assert [codebook.commitment_weight for codebook in quantizer.codebooks] == [1.0] * 3


@pytest.mark.parametrize(
    ("state", "options", "error", "words"),
    [
        ({"a": torch.ones(1)}, {}, ValueError, "codebooks under prefix ''.*got 'a'"),
        (state_of_levels(levels=2)[1], {"prefix": "decoder."}, ValueError, "got 'quantizer.vq.layers.0._codebook.'"),
        (
            {**state_of_levels(levels=2)[1], **state_of_levels("other.{}.", 2)[1]},
            {},
            ValueError,
            "of one residual quantiser.*'quantizer.vq.layers.N._codebook.', 'other.N.'",
        ),
        (state_of_levels(levels=2)[1], {"metric": "cosine"}, ValueError, "metric must be 'euclidean'"),
        (None, {}, TypeError, "state must be a state dict"),
    ],
)
def test_refusals_say_what_to_write(state, options, error, words):
    with pytest.raises(error, match=words):
        residual_quantizer_from_encodec(state, **options)
