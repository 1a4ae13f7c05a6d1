"""Centring by place against means in float64, place by place."""

import copy

import pytest
import torch

from tests.laws import assert_same_bits, through_file
from vqssl import PlaceCentring

C, G = 3, 5


def batch(step, size=4):
    generator = torch.Generator().manual_seed(step)
    maps = torch.randn(size, C, 2, 3, generator=generator, dtype=torch.float64) + 10
    return maps, torch.randint(-1, G, (size, 2, 3), generator=generator)


def make(**options):
    return PlaceCentring(C, G, **options).double()


def test_each_place_loses_the_moving_average_of_its_cell():
    module = make(momentum=0.9)
    weight, total = torch.zeros(G, dtype=torch.float64), torch.zeros(G, C, dtype=torch.float64)
    for step in range(4):
        maps, cells = batch(step)
        tokens = maps.movedim(1, -1)
        for cell in range(G):
            here = tokens[cells == cell]
            weight[cell] = 0.9 * weight[cell] + len(here)
            total[cell] = 0.9 * total[cell] + here.sum(0)
        expected = tokens.clone()
        for cell in range(G):
            if weight[cell]:
                expected[cells == cell] -= total[cell] / weight[cell]
        torch.testing.assert_close(module(maps, cells), expected.movedim(-1, 1))


def test_eval_changes_nothing_and_a_loaded_state_continues():
    module = make()
    module(*batch(0))
    resumed = make()
    resumed.load_state_dict(through_file(module.state_dict()))
    assert_same_bits(resumed(*batch(1)), module(*batch(1)))
    before = copy.deepcopy(module.state_dict())
    module.eval()(*batch(2))
    assert_same_bits(dict(module.state_dict()), dict(before))


def test_unseen_cells_and_places_outside_stay_as_they_are():
    maps, cells = batch(0)
    assert torch.equal(make().eval()(maps, cells), maps)
    outside = torch.full_like(cells, -1)
    assert torch.equal(make()(maps, outside), maps)


def test_gradient_is_that_of_the_identity_and_not_finite_features_stay_out():
    module = make()
    maps, cells = batch(0)
    maps.requires_grad_()
    module(maps, cells).sum().backward()
    assert torch.equal(maps.grad, torch.ones_like(maps))
    spoilt = maps.detach().clone()
    spoilt[0, 0] = torch.nan
    module(spoilt, cells)
    assert all(buffer.isfinite().all() for buffer in module.buffers())


def test_compiles_to_one_graph_and_exports():
    plain, other = make(), make()
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    for step in range(3):
        torch.testing.assert_close(compiled(*batch(step)), plain(*batch(step)))
    program = torch.export.export(plain.eval(), batch(4))
    torch.testing.assert_close(program.module()(*batch(4)), plain(*batch(4)))


@pytest.mark.parametrize(
    ("error", "says", "call"),
    [
        (ValueError, "num_cells must be at least 1", lambda: PlaceCentring(3, 0)),
        (ValueError, "momentum must be from 0 to 1", lambda: PlaceCentring(3, 4, momentum=-1)),
        (ValueError, "with C = 3", lambda: PlaceCentring(3, 4)(torch.ones(2, 4, 2), torch.zeros(2, 2).long())),
        (
            ValueError,
            r"\(2, 2\), got \(2, 3\)",
            lambda: PlaceCentring(3, 4)(torch.ones(2, 3, 2), torch.zeros(2, 3).long()),
        ),
        (TypeError, "integer tensor", lambda: PlaceCentring(3, 4)(torch.ones(2, 3, 2), torch.zeros(2, 2))),
        (ValueError, "to 3", lambda: PlaceCentring(3, 4)(torch.ones(2, 3, 2), torch.full((2, 2), 4))),
    ],
)
def test_refusals_name_the_rule(error, says, call):
    with pytest.raises(error, match=says):
        call()
