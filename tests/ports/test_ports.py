"""Models ported from vector-quantize-pytorch and encodec train as before. foreign.py runs the codec beside encodec."""

import re
from pathlib import Path

import pytest
import torch

from tests.ports import audio_codec, autoencoder
from tests.ports.before import autoencoder as autoencoder_before
from tests.ports.beside import assert_falls, assert_same_results, changed_lines, exact_indices, take_networks
from vqssl import ChannelsFirst
from vqssl.interop import codebook_from_vector_quantize_pytorch

PAGE = Path(__file__).parents[2] / "docs" / "migration.md"


def images():
    return torch.rand(16, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)


def tones():
    return torch.sin(torch.arange(400) * torch.rand(4, 1, 1))


@pytest.mark.parametrize("name", ["autoencoder", "audio_codec"])
def test_page_counts_the_changed_lines(name):
    changed, lines = changed_lines(name)
    (row,) = re.findall(rf"^\| .*tests/ports/{name}\.py.*\|$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert f"| {changed} of {lines} |" in row


def test_autoencoder_with_their_codes_gives_their_results_while_it_trains():
    before, after = autoencoder_before.Autoencoder(), autoencoder.Autoencoder()
    take_networks(after, before)
    theirs = before.quantizer.state_dict()
    after.quantizer = ChannelsFirst(
        codebook_from_vector_quantize_pytorch(theirs, decay=0.8, commitment_weight=1.0, estimator="rotation")
    )
    batch = images()
    before_losses = autoencoder_before.train(before, batch, 5)
    after_losses = autoencoder.train(after, batch, 5)
    assert after_losses == pytest.approx(before_losses, rel=1e-4)
    assert before_losses[-1] < before_losses[0]
    assert_same_results(after(batch), before(batch), rtol=1e-3, atol=1e-4)  # in training mode, where their loss is


def test_commitment_loss_is_reported_in_eval_mode_here_and_zero_there():
    before, after, batch = autoencoder_before.Autoencoder(), autoencoder.Autoencoder(), images()
    after(batch)
    assert before.eval()(batch)[2].item() == 0
    found = after.eval()(batch)[2]
    tokens = after.encoder(batch).movedim(1, -1)
    expected = (tokens - after.quantizer.quantizer.quantize(tokens).quantized).square().mean()
    torch.testing.assert_close(found, expected)


def test_autoencoder_trains_and_its_codes_are_the_nearest():
    model, batch = autoencoder.Autoencoder(), images()
    assert_falls(autoencoder.train(model, batch, 40))
    rebuilt, indices, commitment = model.eval()(batch)
    assert (rebuilt.shape, indices.shape, commitment.shape) == (batch.shape, (16, 8, 8), ())
    tokens = model.encoder(batch).movedim(1, -1)
    assert exact_indices([model.quantizer.quantizer], tokens)[..., 0].equal(indices)


def test_codec_trains_and_its_codes_are_the_nearest():
    model, batch = audio_codec.Codec(), tones()
    assert_falls(audio_codec.train(model, batch, 40))
    rebuilt, codes, _ = model.eval()(batch)
    assert (rebuilt.shape, codes.shape) == (batch.shape, (4, 4, 40))
    tokens = model.encoder(batch).mT
    assert exact_indices(model.quantizer.quantizer.codebooks, tokens).movedim(-1, 0).equal(codes)
    errors = [(model.decode(codes[:levels]) - batch).square().mean() for levels in (1, 2, 3, 4)]
    assert errors[3] < errors[0]
    assert model.decode(codes).equal(rebuilt)
