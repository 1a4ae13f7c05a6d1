"""update_codebooks: several codebooks are updated as each alone, and quantisers can be built of public parts."""

import copy

import pytest
import torch
from torch import nn

import vqssl
from tests.laws import assert_same_bits, state_of
from vqssl import EMACodebook
from vqssl.functional import batch_mean_ema, commitment_loss, count_weighted_ema, straight_through, unit


def trained(metric="euclidean", seed=0, **options):
    codebook = EMACodebook(codebook_size=6, dim=3, decay=0.7, metric=metric, seed=seed, **options)
    for _ in range(3):
        codebook(torch.randn(40, 3))
    return codebook


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("compared", [True, False])
def test_several_at_once_are_each_alone(metric, compared):
    codebooks = [trained(metric, seed) for seed in range(3)]
    codebooks[1].freeze()
    alone = copy.deepcopy(codebooks)
    tokens = [torch.randn(2, 9, 3) for _ in codebooks]
    indices = [codebook.quantize(x).indices for codebook, x in zip(codebooks, tokens, strict=True)]
    for codebook, x, k in zip(alone, tokens, indices, strict=True):
        codebook.update_(x, k)
    if compared:
        tokens = [codebook.as_compared(x) for codebook, x in zip(codebooks, tokens, strict=True)]
    vqssl.update_codebooks(codebooks, tokens, indices, compared=compared)
    assert_same_bits([state_of(codebook) for codebook in codebooks], [state_of(codebook) for codebook in alone])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (lambda c, x, k: ([c], [x, x], [k]), ValueError, r"one entry for each codebook, got 1, 2 and 1"),
        (lambda c, x, k: ([c], [x[:, :2]], [k]), ValueError, r"tokens\[0\] must be \(\*batch, dim\) with dim = 3"),
        (lambda c, x, k: ([c], [x], [k[:3]]), ValueError, r"indices\[0\] must have one entry for each token"),
        (lambda c, x, k: ([c], [x], [x[:, 0]]), TypeError, r"indices\[0\] must be an integer tensor"),
    ],
)
def test_refusals_leave_the_state(arguments, error, message):
    codebook, x = trained(), torch.randn(5, 3)
    before = state_of(codebook)
    with pytest.raises(error, match=message):
        vqssl.update_codebooks(*arguments(codebook, x, codebook.quantize(x).indices))
    assert_same_bits(state_of(codebook), before)


class Residual(nn.Module):
    """A residual quantiser of public names alone: each level quantises what the levels before left over."""

    def __init__(self, levels, **options):
        super().__init__()
        self.levels = nn.ModuleList(EMACodebook(seed=level, **options) for level in range(levels))

    def forward(self, x):
        rest, tokens, indices, loss = x.detach(), [], [], 0.0
        for codebook in self.levels:
            if self.training and codebook.needs_codes:
                codebook.initialize_(rest)
            k = codebook.quantize(rest).indices
            tokens.append(rest)
            indices.append(k)
            loss = loss + commitment_loss(x - (x.detach() - rest), codebook.embed, indices=k)
            rest = rest - codebook.lookup(k)
        if self.training:
            vqssl.update_codebooks(list(self.levels), tokens, indices)
        return straight_through(x, x.detach() - rest), torch.stack(indices, -1), loss


def test_a_residual_quantiser_can_be_built_of_public_names():
    quantizer = Residual(3, codebook_size=8, dim=4, decay=0.5)
    data = torch.randn(512, 4)
    for _ in range(20):
        x = data.clone().requires_grad_()
        quantized, indices, loss = quantizer(x)
        (quantized.sum() + 0 * loss).backward()
        assert torch.equal(x.grad, torch.ones_like(x))  # a total gradient of 1 through all levels
    assert indices.shape == (512, 3)
    errors = [
        (data - sum(quantizer.levels[i].lookup(indices[:, i]) for i in range(n))).square().mean() for n in (1, 2, 3)
    ]
    assert errors[0] > errors[1] > errors[2]
    assert [codebook.num_updates.item() for codebook in quantizer.levels] == [20, 20, 20]


# ---- policies: a name or a function ----


def test_a_metric_is_a_name_or_a_function():
    x = torch.randn(50, 3)
    named, given = (EMACodebook(codebook_size=6, dim=3, metric=metric, decay=0.7) for metric in ("cosine", unit))
    for _ in range(4):
        a, b = named(x), given(x)
        assert torch.equal(a.indices, b.indices)
        assert torch.equal(a.quantized, b.quantized)
    assert_same_bits(state_of(named), state_of(given))
    assert torch.equal(
        vqssl.functional.nearest_codeword(x, named.embed, unit),
        vqssl.functional.nearest_codeword(x, named.embed, "cosine"),
    )


def test_a_metric_of_ones_own_maps_tokens_and_codes():
    def centred(x):
        return x - x.mean(-1, keepdim=True)

    codebook, x = EMACodebook(codebook_size=6, dim=3, metric=centred, decay=0.5), torch.randn(50, 3)
    for _ in range(3):
        out = codebook(x)
    torch.testing.assert_close(codebook.embed.mean(-1), torch.zeros(6), atol=1e-6, rtol=0)
    assert out.indices.shape == (50,)
    codebook.eval()
    shifted = codebook(x + torch.tensor([4.0]))
    assert (shifted.indices == codebook(x).indices).float().mean() > 0.95  # equal but for rounding
    assert "metric=centred" in repr(codebook)


@pytest.mark.parametrize(("name", "rule"), [("count_weighted", count_weighted_ema), ("batch_mean", batch_mean_ema)])
def test_an_ema_rule_is_a_name_or_a_function(name, rule):
    x = torch.randn(50, 3)
    named, given = (EMACodebook(codebook_size=6, dim=3, ema=ema, decay=0.7) for ema in (name, rule))
    for _ in range(3):
        named(x), given(x)
    assert_same_bits(state_of(named), state_of(given))


# ---- keywords of other libraries ----


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: EMACodebook(codebook_size=256, dim=512),
            r"takes its sizes by name.*got 256, 512: write EMACodebook\(codebook_size=, dim=\)",
        ),
        (lambda: EMACodebook(codebook_size=256, dim=4), "takes its sizes by name"),
        (
            lambda: vqssl.MultiScaleQuantizer([3], codebook_size=8, dim=4),
            r"takes its sizes by name.*in_channels, codebook_size=, dim=",
        ),
        (lambda: EMACodebook(num_embeddings=8, embedding_dim=4), "'num_embeddings', .*: write codebook_size="),
        (lambda: EMACodebook(n_embed=8, dim=4), "write codebook_size="),
        (lambda: EMACodebook(codebook_size=8, dim=4, ema_decay=0.9), "write decay="),
        (lambda: EMACodebook(codebook_size=8, dim=4, use_cosine_sim=True), 'write metric="cosine"'),
        (lambda: EMACodebook(codebook_size=8, dim=16, codebook_dim=4), "write dim="),
        (
            lambda: vqssl.MultiScaleQuantizer([3], codebook_size=8, dim=4, ema_decay=0.9),
            "MultiScaleQuantizer has no .*decay=",
        ),
        (lambda: EMACodebook(codebook_size=8, dim=4, no_such_option=1), "no_such_option"),
        (lambda: EMACodebook(codebook_size=8), "dim"),
    ],
)
def test_a_foreign_keyword_or_a_positional_size_is_told_ours(build, message):
    with pytest.raises(TypeError, match=message):
        build()
