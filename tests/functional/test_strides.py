"""Every function of tensors gives the same values and gradients whatever the strides of its input."""

import pytest
import torch
from torch import Tensor

import vqssl.functional as F

B, N, K, D = 6, 5, 4, 3


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mask(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(9)) < 0.7


INDICES = torch.tensor([3, 0, -1, 2, 2, 1])
COUNTS, SUMS = torch.tensor([3.0, 0, 2, 1], dtype=torch.float64), randn(K, D, seed=5)
STATE = (randn(K, D, seed=6), COUNTS + 1, randn(K, D, seed=7))


def ema(rule):
    return lambda embed, size, avg, n, total: rule(F.CodebookState(embed, size, avg), n, total, 0.9, 1e-3)


X, Y, TOKENS, CODES = randn(B, D), randn(B, D, seed=1), randn(B, N, D, seed=2), randn(K, D, seed=3)
CALLS = {
    "euclidean": (F.euclidean, [X]),
    "unit": (F.unit, [X]),
    "nearest_codeword": (F.nearest_codeword, [X, CODES]),
    "nearest_codeword, cosine": (lambda x, c: F.nearest_codeword(x, c, "cosine"), [X, CODES]),
    "straight_through": (F.straight_through, [X, Y]),
    "straight_through by index": (
        lambda x, c, k, m: F.straight_through(x, c, indices=k, mask=m),
        [X, CODES, INDICES, INDICES >= 0],
    ),
    "rotation_trick": (F.rotation_trick, [X, Y]),
    "commitment_loss": (F.commitment_loss, [X, Y, mask(B)]),
    "commitment_loss by index": (
        lambda x, c, k, m: F.commitment_loss(x, c, m, indices=k),
        [X, CODES, INDICES, INDICES >= 0],
    ),
    "count_weighted_ema": (ema(F.count_weighted_ema), [*STATE, COUNTS, SUMS]),
    "batch_mean_ema": (ema(F.batch_mean_ema), [*STATE, COUNTS, SUMS]),
    "masked_mean": (F.masked_mean, [TOKENS, mask(B, N)]),
    "channel_attention": (F.channel_attention, [X, Y]),
    "batch_attention": (F.batch_attention, [X, Y]),
    "spatial_attention": (F.spatial_attention, [X, TOKENS, mask(B, N)]),
    "spatial_attention_weights": (F.spatial_attention_weights, [X, TOKENS, mask(B, N)]),
    "pooled_codes": (F.pooled_codes, [X, Y]),
    "concatenation": (F.concatenation, [X, Y]),
    "cosine_regression_loss": (F.cosine_regression_loss, [X, Y]),
    "predict_refinement": (lambda z_s, z_c: F.predict_refinement([z_s], [z_c])[1], [X, Y]),
    "align_refinement": (lambda z_s, z_c: F.align_refinement([z_s], [z_c])[0][0], [X, Y]),
    "detached_refinement": (lambda z_s, z_c: F.detached_refinement([z_s], [z_c])[0][0], [X, Y]),
    "ema_buffer": (lambda a, b: F.ema_buffer("mean", a, b, 0.3), [X, Y]),
    "copy_buffer": (lambda a, b: F.copy_buffer("mean", a, b, 0.3), [X, Y]),
    "own_buffer": (lambda a, b: F.own_buffer("mean", a, b, 0.3), [X, Y]),
    "code_counts": (lambda k: F.code_counts(k, K), [INDICES]),
    "codebook_usage": (F.codebook_usage, [COUNTS]),
    "target_spread": (F.target_spread, [X]),
}
WITHOUT_TENSORS = {"CodebookState", "SERFOperator", "cosine_momentum"}


def every_second(tensor):
    return torch.stack([tensor, torch.zeros_like(tensor)], -1)[..., 0]


def reversed_axes(tensor):
    axes = range(tensor.ndim - 1, -1, -1)
    return tensor.permute(*axes).contiguous().permute(*axes)


def results_and_gradients(call, tensors):
    inputs = [t.detach().requires_grad_() if t.is_floating_point() else t for t in tensors]
    found = call(*inputs)
    found = [found] if isinstance(found, Tensor) else list(found)
    graph = [t for t in found if t.requires_grad]
    leaves = [t for t in inputs if t.requires_grad]
    upstream = [randn(*t.shape, seed=8).to(t.dtype) for t in graph]
    gradients = torch.autograd.grad(graph, leaves, upstream, allow_unused=True) if graph else []
    return found, [g for g in gradients if g is not None]


@pytest.mark.parametrize("layout", [every_second, reversed_axes], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", CALLS)
def test_strides_do_not_matter(name, layout):
    call, tensors = CALLS[name]
    moved = [layout(t) for t in tensors]
    assert all(torch.equal(a, b) for a, b in zip(moved, tensors, strict=True))
    assert name in ("code_counts", "codebook_usage") or layout is every_second or not moved[0].is_contiguous()
    expected, found = results_and_gradients(call, tensors), results_and_gradients(call, moved)
    for part, other in zip(expected, found, strict=True):
        assert len(part) == len(other)
        for a, b in zip(part, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, equal_nan=True)


def test_every_public_function_of_tensors_is_in_the_table():
    functions = {name for name in F.__all__ if callable(getattr(F, name))}
    assert {name.split(",")[0].split(" by ")[0] for name in CALLS} == functions - WITHOUT_TENSORS
