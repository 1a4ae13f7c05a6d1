"""Plain tables of codes. foreign.py tests transformers' models themselves."""

from typing import Any

import pytest
import torch
from torch import nn

from tests.laws import assert_same_bits
from vqssl import BatchRevival, EMACodebook
from vqssl.functional import unit
from vqssl.interop import codebook_from_embedding, codebook_from_encodec

CHAMELEON = "model.vqmodel.quantize.embedding."
DAC = "quantizer.quantizers.{}.codebook."


class VQGAN(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(4, 4)
        self.quantize = nn.Module()
        self.quantize.embedding = nn.Embedding(8, 4)
        self.position_embedding = nn.Embedding(3, 4)
        self.embed_tokens = nn.Embedding(3, 4)


def test_only_table_is_found_and_every_bit_is_kept():
    theirs = VQGAN()
    codebook = codebook_from_embedding(theirs.state_dict(), decay=0.9, revival=BatchRevival(0.2))
    assert_same_bits(codebook.embed, theirs.quantize.embedding.weight.detach())
    assert codebook.embed.data_ptr() != theirs.quantize.embedding.weight.data_ptr()
    assert (codebook.decay, codebook.revival, bool(codebook.initialized)) == (0.9, BatchRevival(0.2), True)
    x = torch.randn(50, 4)
    expected = torch.cdist(x.double(), codebook.embed.double()).argmin(1)
    assert codebook(x).indices.equal(expected)


def test_cosine_codes_search_as_dac_and_beit_do():
    state = {DAC.format(n) + "weight": torch.randn(8, 4) for n in range(3)}
    x = torch.randn(50, 4)
    for level in range(3):
        codebook = codebook_from_embedding(state, DAC.format(level), metric="cosine").eval()
        raw = state[DAC.format(level) + "weight"]
        assert codebook(x).indices.equal((unit(x) @ unit(raw).T).argmax(1))
        torch.testing.assert_close(codebook.embed, unit(raw))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtype_is_that_of_the_state_and_at_least_float32(dtype):
    state = {CHAMELEON + "weight": torch.randn(8, 4, dtype=dtype)}
    codebook = codebook_from_embedding(state)
    assert codebook.embed.dtype == torch.promote_types(dtype, torch.float32)
    assert codebook.embed.equal(state[CHAMELEON + "weight"].to(codebook.embed.dtype))


def test_prefix_reads_a_table_of_any_name():
    codes = torch.randn(8, 4)
    assert codebook_from_embedding({"layer.weight": codes, "embedding.weight": codes[:4]}, "layer.").embed.equal(codes)


read: Any = codebook_from_embedding  # these calls are wrong on purpose


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: read(VQGAN()), TypeError, r"write state\.state_dict\(\)"),
        (
            lambda: read({"a": torch.ones(2)}),
            ValueError,
            r"got 'a': if the codes are elsewhere, write codebook\.set_codes_",
        ),
        (
            lambda: read({DAC.format(n) + "weight": torch.randn(8, 4) for n in range(2)}),
            ValueError,
            "got none; there are 'quantizer.quantizers.0.codebook.', 'quantizer.quantizers.1.codebook.': give one",
        ),
        (lambda: read({"embedding.weight": torch.randn(8, 4)}, "codebook."), ValueError, "got 'codebook.'; there are"),
        (
            lambda: read({"embedding.weight": torch.randn(8, 4, 1)}),
            ValueError,
            r"\(K, D\), got shape \(8, 4, 1\).*set_codes_",
        ),
        (lambda: read({"embedding.weight": torch.ones(8, 4).int()}), TypeError, "floating"),
        (lambda: read({"embedding.weight": torch.full((8, 4), torch.inf)}), ValueError, "codes must be finite"),
        (lambda: read({"embedding.weight": torch.zeros(8, 4)}, metric="cosine"), ValueError, "a direction in each row"),
        (
            lambda: read(EMACodebook(codebook_size=8, dim=4).state_dict()),
            ValueError,
            "got counts too, at ''.*codebook_from_encodec for 'inited'",
        ),
        (
            lambda: codebook_from_encodec({"embedding.weight": torch.ones(8, 4)}),
            ValueError,
            "codebook_from_embedding or",
        ),
    ],
)
def test_refusals_say_what_to_write(call, error, words):
    with pytest.raises(error, match=words):
        call()
