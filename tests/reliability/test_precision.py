"""Autocast, gradient scaling, half and double precision keep the state precise and finite."""

import copy

import pytest
import torch

import vqssl
from tests.laws import assert_same_bits
from tests.reliability.band import BAND, SPREAD, perplexities, train
from tests.reliability.material import Net, images


@pytest.fixture(scope="module")
def float32_run():
    net = Net()
    return train(net, 500), net


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_ends_near_float32(float32_run, dtype):
    expected, reference = float32_run
    net = Net()
    scaler = torch.amp.GradScaler("cpu") if dtype == torch.float16 else None
    found = train(net, 500, dtype=dtype, scaler=scaler)
    assert torch.isfinite(found).all()
    start, end = expected[:20].mean(), expected[-100:].mean()
    assert end < 0.5 * start  # the reference has learnt
    assert abs(found[-100:].mean() - end) < BAND * end
    torch.testing.assert_close(perplexities(net), perplexities(reference), rtol=SPREAD, atol=0)
    for codebook in net.quantizer.codebooks:
        for tensor in (codebook.embed, codebook.cluster_size, codebook.embed_avg):
            assert tensor.dtype == torch.float32
            assert torch.isfinite(tensor).all()
    # Autocast has an effect.
    assert not torch.equal(found, expected)


def test_overflow_skips_the_step_and_keeps_weights_and_codes():
    """GradScaler skips a step with infinite inputs, and training continues."""

    def batch_of(step, count):
        views = images(step, count)
        if step == 10:
            views[0, :3] = float("inf")
        if step == 11:
            views[1] *= 1e30
        return views

    net, scaler = Net("group"), torch.amp.GradScaler("cpu", init_scale=1024.0)
    train(net, 10, dtype=torch.float16, scaler=scaler, batch_of=batch_of)
    weights = {name: value.clone() for name, value in net.named_parameters() if value.requires_grad}
    sizes = [codebook.cluster_size.sum().item() for codebook in net.quantizer.codebooks]
    losses = train(net, 1, dtype=torch.float16, scaler=scaler, batch_of=lambda step, count: batch_of(10, count))
    assert not torch.isfinite(losses).any()
    assert scaler.get_scale() == 512.0
    assert_same_bits({n: p for n, p in net.named_parameters() if p.requires_grad}, weights)
    for codebook, before in zip(net.quantizer.codebooks, sizes, strict=True):
        assert torch.isfinite(codebook.embed).all()
        assert codebook.cluster_size.sum() > 0.5 * before  # the finite tokens of that batch counted
    losses = train(net, 5, dtype=torch.float16, scaler=scaler, batch_of=lambda step, count: batch_of(11 + step, count))
    assert torch.isfinite(losses[-1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_cast_model_searches_exactly_and_keeps_a_precise_state(dtype):
    net = Net("group").to(dtype)
    for step in range(3):
        loss = net(images(step, 4).to(dtype))
        loss.backward()
        net.teacher.update_(net.student)
    assert torch.isfinite(loss)
    state = torch.float64 if dtype == torch.float64 else torch.float32
    z_c, maps = net.teacher(images(3, 4)[0].to(dtype))
    out = net.eval().quantizer(maps)
    assert z_c.dtype == dtype
    for scale, codebook in enumerate(net.quantizer.codebooks):
        assert codebook.embed.dtype == codebook.cluster_size.dtype == codebook.embed_avg.dtype == state
        assert out.quantized[scale].dtype in (
            dtype,
            torch.promote_types(dtype, net.quantizer.projections[scale].weight.dtype),
        )
        # The reference compares the cast values in float64.
        tokens = net.quantizer.projections[scale](maps[scale].movedim(1, -1)).detach().flatten(0, -2)
        expected = vqssl.kernels.nearest_reference(tokens, codebook.embed)
        assert torch.equal(out.indices[scale].flatten(), expected)
    assert out.commitment_loss.dtype == state


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_steps_are_not_lost(dtype):
    """Steps of a thousandth: a code in half precision would stop moving long before its target."""
    codebook = vqssl.EMACodebook(codebook_size=1, dim=4, decay=0.999, revival=None).to(dtype)
    codebook.set_codes_(torch.zeros(1, 4))
    x = torch.ones(8, 4, dtype=dtype)
    for _ in range(3000):
        codebook(x)
    assert codebook.embed.min() > 0.98
    lost = torch.zeros(4, dtype=dtype)
    for _ in range(3000):
        lost += 0.001 * 8 / 7 * (x[0] - lost)
    assert lost.max() < 0.9  # a code in half precision


def test_autocast_does_not_change_the_search():
    codebook = vqssl.EMACodebook(codebook_size=64, dim=16).eval()
    codebook.set_codes_(codebook.embed)
    other = copy.deepcopy(codebook)
    x = torch.randn(500, 16) + 20  # far from the origin, where bf16 cannot tell the scores apart
    with torch.autocast("cpu", torch.bfloat16):
        found = codebook(x)
    assert torch.equal(found.indices, other(x).indices)
    assert found.quantized.dtype == torch.float32
