"""A port beside the model that it replaces: equal networks, equal codes, a few steps of training."""

import difflib
import math
from pathlib import Path

import torch

from vqssl import EMACodebook

FOLDER = Path(__file__).parent


def changed_lines(name):
    """Return how many lines of a port are not in the script before it, and how many lines it has: code alone."""
    before, after = (code(path) for path in (FOLDER / "before" / f"{name}.py", FOLDER / f"{name}.py"))
    return sum(line.startswith("+ ") for line in difflib.ndiff(before, after)), len(after)


def code(path):
    """Return the lines without blank ones and without the docstring at the top."""
    return [line for line in path.read_text(encoding="utf-8").splitlines()[1:] if line.strip()]


def take_networks(port, model):
    """Give a port the encoder and the decoder of a model."""
    port.encoder.load_state_dict(model.encoder.state_dict())
    port.decoder.load_state_dict(model.decoder.state_dict())


def assert_same_results(found, expected, **tolerances):
    """Compare what the two models return: the output, the codes and the loss, which may have an axis of one."""
    output, codes, loss = expected
    assert found[0].shape == output.shape
    assert found[1].equal(codes)
    torch.testing.assert_close(found[0], output, **tolerances)
    torch.testing.assert_close(found[2], loss.reshape(()), **tolerances)


def assert_falls(losses):
    assert all(map(math.isfinite, losses))
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5]), losses


def exact_indices(codebooks, tokens):
    """Return `(*batch, levels)`: the nearest code of each level by float64 distances, one level after another."""
    rest, indices = tokens, []
    for codebook in codebooks:
        assert isinstance(codebook, EMACodebook)
        wide = (rest.double()[..., None, :] - codebook.embed.double()).square().sum(-1)
        indices.append(wide.argmin(-1))
        rest = rest - codebook.embed[indices[-1]]
    return torch.stack(indices, -1)
