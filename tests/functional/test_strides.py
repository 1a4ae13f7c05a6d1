"""No public function's values or gradients depend on the strides of its tensors."""

import inspect

import pytest
import torch
from torch.utils._pytree import tree_leaves

from vqssl import functional
from vqssl.functional import CodebookState

B, N, D, K = 3, 5, 4, 6
GRID = functional.Grid((8, 8), (4, 2))


def tokens(seed=0, *shape):
    return torch.randn(*(shape or (B, N, D)), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mask():
    return torch.rand(B, N, generator=torch.Generator().manual_seed(9)) < 0.6


def indices():
    return torch.randint(K, (B, N), generator=torch.Generator().manual_seed(8))


def statistics():
    """Return codes, counts and sums, then counts and sums of a batch."""
    return [tokens(0, K, D), tokens(1, K).exp(), tokens(2, K, D), tokens(3, K).exp(), tokens(4, K, D)]


def vectors(*seeds):
    return [tokens(seed, B, D) for seed in seeds]


def ema(rule):
    return lambda embed, size, average, n, s: rule(CodebookState(embed, size, average), n, s, 0.9, 1e-5)


def by_index(function):
    return lambda x, codes, k, m: function(x, codes, indices=k, mask=m)


def of_two_views(refinement):
    return lambda a, b, c, d: refinement([a, b], [c, d])


def of_a_buffer(policy):
    return lambda teacher, student: policy("", teacher, student, 0.1)


# By name, and after a comma the form: a function of tensors, and the tensors.
CASES = {
    "euclidean": (functional.euclidean, [tokens()]),
    "unit": (functional.unit, [tokens()]),
    "nearest_codeword": (functional.nearest_codeword, [tokens(), tokens(1, K, D)]),
    "straight_through": (functional.straight_through, [tokens(), tokens(1)]),
    "straight_through, by index": (
        by_index(functional.straight_through),
        [tokens(), tokens(1, K, D), indices(), mask()],
    ),
    "rotation_trick": (functional.rotation_trick, [tokens(), tokens(1)]),
    "commitment_loss": (functional.commitment_loss, [tokens(), tokens(1), mask()]),
    "commitment_loss, by index": (by_index(functional.commitment_loss), [tokens(), tokens(1, K, D), indices(), mask()]),
    "count_weighted_ema": (ema(functional.count_weighted_ema), statistics()),
    "batch_mean_ema": (ema(functional.batch_mean_ema), statistics()),
    "masked_mean": (functional.masked_mean, [tokens(), mask()]),
    "channel_attention": (functional.channel_attention, vectors(0, 1)),
    "batch_attention": (functional.batch_attention, vectors(0, 1)),
    "spatial_attention": (functional.spatial_attention, [*vectors(0), tokens(1), mask()]),
    "spatial_attention_weights": (functional.spatial_attention_weights, [*vectors(0), tokens(1), mask()]),
    "pooled_codes": (functional.pooled_codes, vectors(0, 1)),
    "concatenation": (functional.concatenation, vectors(0, 1)),
    "cosine_regression_loss": (functional.cosine_regression_loss, [tokens(), tokens(1)]),
    "predict_refinement": (of_two_views(functional.predict_refinement), vectors(0, 1, 2, 3)),
    "align_refinement": (of_two_views(functional.align_refinement), vectors(0, 1, 2, 3)),
    "detached_refinement": (of_two_views(functional.detached_refinement), vectors(0, 1, 2, 3)),
    "ema_buffer": (of_a_buffer(functional.ema_buffer), vectors(0, 1)),
    "ema_buffers": (of_a_buffer(functional.ema_buffers("")), vectors(0, 1)),
    "copy_buffer": (of_a_buffer(functional.copy_buffer), vectors(0, 1)),
    "own_buffer": (of_a_buffer(functional.own_buffer), vectors(0, 1)),
    "bag_of_codes": (lambda k, m: functional.bag_of_codes(k, K, m), [indices(), mask()]),
    "bag_of_codes, of shares": (lambda a, m: functional.bag_of_codes(a, K, m, "max"), [tokens(0, B, N, K), mask()]),
    "soft_codes": (lambda x, codes: functional.soft_codes(x, codes, 0.3), [tokens(), tokens(1, K, D)]),
    "code_cross_entropy": (functional.code_cross_entropy, [tokens(0, B, N, K), indices()]),
    "code_cross_entropy, of shares": (functional.code_cross_entropy, [tokens(0, B, K), tokens(1, B, K).softmax(-1)]),
    "sinkhorn": (lambda x, m: functional.sinkhorn(x, m, epsilon=0.5), [tokens(0, B, N, K), mask()]),
    "diversity_loss": (functional.diversity_loss, [tokens(0, B, N, 2, K), mask()]),
    "diversity_loss, by perplexity": (
        lambda x: functional.diversity_loss(x, form="perplexity"),
        [tokens(0, B, N, 2, K)],
    ),
    "code_anchor": (functional.code_anchor, [tokens(), indices()]),
    "anchor_loss": (functional.anchor_loss, vectors(0, 1)),
    "matched_cells": (
        lambda a, b: functional.matched_cells(a, b, GRID, GRID),
        [tokens(0, B, 3, 3), tokens(1, B, 3, 3)],
    ),
    "canonical_cells": (lambda a: functional.canonical_cells(a, GRID, GRID), [tokens(0, B, 3, 3)]),
    "code_counts": (lambda k: functional.code_counts(k, K), [indices()]),
    "codebook_usage": (functional.codebook_usage, [tokens(0, K).exp()]),
    "target_spread": (functional.target_spread, vectors(0)),
}
LAYOUTS = {
    "axes in another order": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "every second entry": lambda t: torch.stack([t, t], -1)[..., 0],
    "every second row": lambda t: torch.stack([t, t], 1).flatten(0, 1)[::2],
}


def test_every_public_function_of_tensors_has_a_case():
    functions = {name for name in functional.__all__ if inspect.isfunction(getattr(functional, name))}
    assert functions - {"cosine_momentum"} == {name.split(",")[0] for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_strides_do_not_matter(name):
    function, contiguous = CASES[name]
    expected = values_and_gradients(function, contiguous)
    for layout in LAYOUTS.values():
        strided = [layout(t) for t in contiguous]
        assert all(t.equal(c) for t, c in zip(strided, contiguous, strict=True))
        found = values_and_gradients(function, strided)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", CASES)
def test_shapes_and_dtypes_are_known_on_the_meta_device(name):
    """Tensors without values, as libraries use them to plan memory, or to build a model before its weights are read."""
    function, inputs = CASES[name]
    expected = values_and_gradients(function, inputs)
    found = values_and_gradients(function, [t.to("meta") for t in inputs])
    assert [(t.shape, t.dtype) for t in found] == [(t.shape, t.dtype) for t in expected]
    assert all(t.is_meta for t in found)


def values_and_gradients(function, inputs):
    inputs = [t.detach().requires_grad_(t.is_floating_point()) for t in inputs]
    outputs = tree_leaves(function(*inputs))
    differentiable = [t for t in outputs if t.requires_grad]
    if not differentiable:
        return outputs
    weights = [torch.linspace(1, 2, t.numel(), dtype=t.dtype, device=t.device).reshape(t.shape) for t in differentiable]
    sources = [t for t in inputs if t.requires_grad]
    gradients = torch.autograd.grad(differentiable, sources, weights, allow_unused=True)
    return [*outputs, *(g for g in gradients if g is not None)]
