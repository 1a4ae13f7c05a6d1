"""Projections: orthogonality, layer norm, and what is trained."""

import copy

import pytest
import torch
from torch import nn

from vqssl import LearnedProjection, OrthogonalProjection

PROJECTIONS = (OrthogonalProjection, LearnedProjection)
WIDTHS = [(3, 8), (6, 6), (8, 3), (1, 4), (4, 2)]


def slow_layer_norm(row):
    mean = sum(row) / len(row)
    variance = sum((v - mean) ** 2 for v in row) / len(row)
    return [(v - mean) / (variance + 1e-5) ** 0.5 for v in row]


@pytest.mark.parametrize(("channels", "dim"), WIDTHS)
def test_map_is_orthogonal_on_its_shorter_side(channels, dim):
    weight = OrthogonalProjection(channels, dim, dtype=torch.float64).weight
    assert weight.shape == (dim, channels)
    gram = weight.T @ weight if channels <= dim else weight @ weight.T
    torch.testing.assert_close(gram, torch.eye(min(channels, dim), dtype=torch.float64), rtol=0, atol=1e-13)


@pytest.mark.parametrize("seed", range(3))
def test_orthogonal_map_depends_on_its_seed_only(seed):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = OrthogonalProjection(4, 6, seed=seed)
    assert torch.get_rng_state().equal(state)
    torch.manual_seed(2)
    assert OrthogonalProjection(4, 6, seed=seed).weight.equal(first.weight)
    assert not OrthogonalProjection(4, 6, seed=seed + 1).weight.equal(first.weight)
    before = first.weight.clone()
    first.weight.zero_()
    first.reset_parameters()
    assert first.weight.equal(before)


def test_orthogonal_maps_are_uniform():
    """Over seeds, each entry has mean 0 and mean square 1 / n; without the sign correction it has not."""
    weights = torch.stack([OrthogonalProjection(3, 3, seed=seed, dtype=torch.float64).weight for seed in range(2000)])
    torch.testing.assert_close(weights.mean(0), torch.zeros(3, 3, dtype=torch.float64), rtol=0, atol=0.06)
    torch.testing.assert_close(weights.square().mean(0), torch.full((3, 3), 1 / 3).double(), rtol=0, atol=0.04)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_orthogonal_projection_takes_any_dtype(dtype):
    projection, x = OrthogonalProjection(6, 4), torch.randn(3, 6).to(dtype)
    assert projection(x).dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(projection(x).double(), projection.double()(x.double()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cls", PROJECTIONS)
@pytest.mark.parametrize(("channels", "dim"), WIDTHS)
def test_output_is_layer_norm_of_linear_map(cls, channels, dim):
    projection = cls(channels, dim, dtype=torch.float64)
    x = torch.randn(2, 5, channels, dtype=torch.float64)
    linear = projection[0] if cls is LearnedProjection else nn.Linear(channels, dim, bias=False, dtype=torch.float64)
    if cls is OrthogonalProjection:
        linear.weight.data.copy_(projection.weight)
    expected = [[slow_layer_norm(row) for row in sample] for sample in linear(x).tolist()]
    found = projection(x)
    assert found.shape == (2, 5, dim)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("cls", PROJECTIONS)
@pytest.mark.parametrize("scale", [0.1, 1.0, 100.0])
def test_output_length_does_not_depend_on_feature_scale(cls, scale):
    """A token's length is about sqrt(dim)."""
    z = cls(16, 9, dtype=torch.float64)(torch.randn(50, 16, dtype=torch.float64) * scale)
    torch.testing.assert_close(z.mean(-1), torch.zeros(50, dtype=torch.float64), rtol=0, atol=1e-12)
    assert (z.norm(dim=-1) <= 3 + 1e-12).all()
    assert z.norm(dim=-1).mean() > 2.9


def test_orthogonal_projection_has_no_parameters_and_passes_gradients():
    projection = OrthogonalProjection(6, 4)
    assert list(projection.parameters()) == []
    x = torch.randn(3, 6, requires_grad=True)
    (projection(x) * torch.randn(3, 4)).sum().backward()
    assert x.grad.abs().sum() > 0


def test_learned_projection_trains_only_its_linear_map():
    projection = LearnedProjection(6, 4)
    (projection(torch.randn(3, 6)) * torch.randn(3, 4)).sum().backward()
    assert {name: tuple(p.shape) for name, p in projection.named_parameters()} == {"0.weight": (4, 6), "0.bias": (4,)}
    assert projection[0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("cls", PROJECTIONS)
def test_state_dict_holds_the_map(cls):
    there, back = cls(6, 4), cls(6, 4)
    for tensor in back.state_dict().values():
        tensor.mul_(0.5)
        tensor[0] += 1.0
    x = torch.randn(3, 6)
    assert not back(x).equal(there(x))
    back.load_state_dict(there.state_dict())
    assert back(x).equal(there(x))
    assert copy.deepcopy(there)(x).equal(there(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("cls", PROJECTIONS)
def test_half_precision_is_close_to_float64(cls, dtype):
    made, cast = cls(6, 4, dtype=dtype), cls(6, 4).to(dtype)
    x = torch.randn(3, 6).to(dtype)
    for projection in (made, cast):
        assert projection(x).dtype == dtype
        # The layer norm divides by the deviation of rounded values: a few units in the last place, values to sqrt(3).
        exact = copy.deepcopy(projection).double()(x.double())
        torch.testing.assert_close(projection(x).double(), exact, rtol=0, atol=16 * torch.finfo(dtype).eps)


def test_half_precision_map_is_orthogonal_to_within_rounding():
    weight = OrthogonalProjection(6, 4, dtype=torch.bfloat16).weight.double()
    torch.testing.assert_close(weight @ weight.T, torch.eye(4, dtype=torch.float64), rtol=0, atol=2**-7)


@pytest.mark.parametrize("cls", PROJECTIONS)
def test_runs_on_the_meta_device(cls):
    assert cls(6, 4, device="meta")(torch.empty(2, 3, 6, device="meta")).shape == (2, 3, 4)


@pytest.mark.parametrize("cls", PROJECTIONS)
@pytest.mark.parametrize(
    ("error", "says", "widths"),
    [
        (ValueError, "in_channels must be at least 1", (0, 4)),
        (ValueError, "dim must be at least 1", (4, -1)),
        (TypeError, "in_channels must be an int", (4.0, 4)),
        (TypeError, "dim must be an int", (4, True)),
    ],
)
def test_wrong_widths_are_refused(cls, error, says, widths):
    with pytest.raises(error, match=says):
        cls(*widths)


@pytest.mark.parametrize("cls", PROJECTIONS)
def test_name_of_a_dtype_is_refused(cls):
    with pytest.raises(TypeError, match=r"dtype must be a torch.dtype, got 'float64': write torch.float64"):
        cls(6, 4, dtype="float64")


def test_repr_has_the_widths():
    assert repr(OrthogonalProjection(6, 4)) == "OrthogonalProjection(6, 4)"
