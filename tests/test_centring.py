"""Centring of targets against means in float64."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vqssl.centring import TargetCentring

seeds = st.integers(0, 2**31 - 1)


def draw(seed, *shapes):
    generator = torch.Generator().manual_seed(seed)
    return [5 + torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


@given(seed=seeds)
def test_batch_centring_subtracts_the_mean_of_those_that_are_there(seed):
    targets = draw(seed, (6, 3), (2, 4, 5))
    absent = torch.rand(6, generator=torch.Generator().manual_seed(seed)) < 0.3
    absent[0] = False
    targets[0][absent] = 0
    first, second = TargetCentring([3, 5])(targets)
    torch.testing.assert_close(first[~absent], targets[0][~absent] - targets[0][~absent].mean(0))
    assert (first[absent] == 0).all()
    torch.testing.assert_close(second, targets[1] - targets[1].mean((0, 1)))
    assert torch.equal(TargetCentring([3, 5]).eval()(targets)[1], second)


def test_running_centring_is_a_moving_average_that_the_first_batch_sets():
    centring = TargetCentring([3], how="running", momentum=0.8).double()
    expected = None
    for step in range(4):
        (targets,) = draw(step, (6, 3))
        mean = targets.mean(0)
        expected = mean if expected is None else 0.8 * expected + 0.2 * mean
        torch.testing.assert_close(centring([targets])[0], targets - expected)
    before = copy.deepcopy(centring.state_dict())
    (targets,) = draw(9, (6, 3))
    torch.testing.assert_close(centring.eval()([targets])[0], targets - expected)
    assert all(torch.equal(value, centring.state_dict()[name]) for name, value in before.items())
    resumed = TargetCentring([3], how="running", momentum=0.8).double()
    resumed.load_state_dict(before)
    assert torch.equal(resumed([targets])[0], centring.train()([targets])[0])


def test_targets_get_no_gradient_and_none_at_all_is_no_error():
    targets = torch.randn(4, 3, requires_grad=True)
    assert not TargetCentring([3])([targets])[0].requires_grad
    assert TargetCentring([3])([torch.zeros(2, 3)])[0].equal(torch.zeros(2, 3))
    assert TargetCentring([3])([torch.zeros(0, 3)])[0].shape == (0, 3)


def test_mean_of_half_targets_does_not_overflow():
    targets = torch.full((100, 2), 60000.0, dtype=torch.float16)
    assert TargetCentring([2])([targets])[0].equal(torch.zeros_like(targets))


def test_compiles_to_one_graph_in_training():
    plain, other = (TargetCentring([3], how="running") for _ in range(2))
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    for step in range(3):
        targets = [draw(step, (4, 3))[0].float()]
        torch.testing.assert_close(compiled(targets), plain(targets))


@pytest.mark.parametrize(
    ("error", "says", "call"),
    [
        (ValueError, "'batch' or 'running'", lambda: TargetCentring([3], how="mean")),  # type: ignore[arg-type]
        (ValueError, "momentum must be from 0 to 1", lambda: TargetCentring([3], momentum=2)),
        (ValueError, "each of widths must be at least 1", lambda: TargetCentring([0])),
        (ValueError, r"targets\[0\] must be \(\*batch, 3\)", lambda: TargetCentring([3])([torch.ones(2, 4)])),
        (ValueError, "one entry for each of the 2 scales", lambda: TargetCentring([3, 3])([torch.ones(2, 3)])),
        (TypeError, "floating", lambda: TargetCentring([3])([torch.ones(2, 3).long()])),
    ],
)
def test_refusals_name_the_rule(error, says, call):
    with pytest.raises(error, match=says):
        call()
