"""The error bound, against scores in float64: it holds for every pair that decides, and is not needlessly wide."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels.material import KINDS, material
from vqssl.kernels.nearest.margin import margin
from vqssl.kernels.nearest.prepare import lengths_as_scored, prepare, tokens_as_scored
from vqssl.kernels.nearest.product import Factor
from vqssl.kernels.nearest.rule import exact_codes, exact_scores
from vqssl.kernels.workspace import workspace


def lost_by_the_nearest(x, codes, metric):
    """Return by how much the float32 score of the exact winner lies below the best, and the margins."""
    with workspace() as memory:
        prepared = prepare(codes, metric, torch.float32, memory)
        tokens = tokens_as_scored(x, prepared, memory)
        scores = Factor(prepared.weight, prepared.constant, len(x)).scores(tokens)[:, : len(codes)]
        allowed = margin(lengths_as_scored(tokens), scores.amax(1), prepared.bound)
    exact = exact_scores(x.double()[:, None], exact_codes(codes, metric)[None], metric)
    return scores.amax(1) - scores.gather(1, exact.argmax(1, keepdim=True))[:, 0], allowed


def adversary(kind, generator, n, k, d):
    """Return tokens and codes whose lengths, or whose differences, strain a bound."""
    x, codes = torch.randn(n, d, generator=generator), torch.randn(k, d, generator=generator)
    far = 10.0 ** torch.randint(1, 8, (), generator=generator)
    if kind == "far codes":
        codes[torch.rand(k, generator=generator) < 0.2] *= far
    elif kind == "far tokens":
        x[torch.rand(n, generator=generator) < 0.5] *= far
    elif kind == "far along one axis":
        codes[0, 0], x[:, 0] = far, x[:, 0] * far
    elif kind == "tokens at far codes":
        codes *= 10.0 ** (6 * torch.rand(k, 1, generator=generator))
        x = codes[torch.randint(k, (n,), generator=generator)] * (1 + 1e-6 * x)
    elif kind == "mixed scales":
        x *= 10.0 ** (12 * torch.rand(n, 1, generator=generator) - 6)
        codes *= 10.0 ** (12 * torch.rand(k, 1, generator=generator) - 6)
    elif kind == "hair's breadth":
        codes = codes[:1] * (1 + 2.0**-23 * torch.randint(0, 9, (k, d), generator=generator))
    elif kind == "tiny":
        x, codes = x * 1e-20, codes * 1e-20
    elif kind == "denormal":
        x, codes = x * 1e-41, codes * 1e-41
    elif kind == "two clusters":
        x, codes = (t + far * (torch.arange(len(t)) % 2)[:, None] for t in (x, codes))
    elif kind == "far mean":
        x, codes = x + far, codes + far
    return x, codes


KINDS_OF_ADVERSARY = (
    "far codes", "far tokens", "far along one axis", "tokens at far codes", "mixed scales", "hair's breadth", "tiny",
    "denormal", "two clusters", "far mean",
)  # fmt: skip


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@given(st.sampled_from(KINDS_OF_ADVERSARY), st.integers(1, 130), st.integers(0, 2**20))
def test_nearest_code_is_within_the_margin_of_the_best(metric, kind, d, seed):
    x, codes = adversary(kind, torch.Generator().manual_seed(seed), 60, 40, d)
    lost, allowed = lost_by_the_nearest(x, codes, metric)
    decided = torch.isfinite(allowed) & torch.isfinite(lost)
    assert (lost <= allowed)[decided].all(), float((lost / allowed)[decided].max())


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("kind", KINDS)
def test_nearest_code_is_within_the_margin_on_every_kind_of_material(metric, kind):
    lost, allowed = lost_by_the_nearest(*material(kind, 200, 65, 60, torch.float32), metric)
    assert torch.isfinite(allowed).all()
    assert (lost <= allowed).all()


@pytest.mark.parametrize("kind", ["far codes", "far along one axis"])
def test_far_codes_leave_the_margins_of_near_tokens_as_they_are(kind):
    generator = torch.Generator().manual_seed(0)
    x, codes = torch.randn(200, 64, generator=generator), torch.randn(256, 64, generator=generator)
    _, before = lost_by_the_nearest(x, codes, "euclidean")
    if kind == "far codes":
        codes[::20] *= 1e6
    else:
        codes[7, 0] = 1e6
    _, after = lost_by_the_nearest(x, codes, "euclidean")
    assert (after <= 3 * before).all()
