"""Damaged states are refused by name before anything changes; sound ones of every kind load."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import vqssl
from tests.laws import assert_same_bits, correlation, state_of
from tests.profiles import few
from vqssl.functional import codebook_usage

NAN, INF = float("nan"), float("inf")


def trained(**options):
    codebook = vqssl.EMACodebook(**{"codebook_size": 6, "dim": 3, **options})
    for step in range(3):
        codebook(torch.randn(30, 3) + step)
    return codebook


def first(value):
    """Return a function that puts a value in the first place."""

    def put(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[0] = value
        return tensor

    return put


DAMAGES = {
    "NaN code": (
        "embed",
        first(NAN),
        ValueError,
        "embed must be finite, got 1 of 18 entries that are not, such as nan",
    ),
    "infinite code": ("embed", first(-INF), ValueError, "embed must be finite"),
    "NaN count": ("cluster_size", first(NAN), ValueError, "cluster_size must be finite and not negative, got 1 of 6"),
    "infinite count": ("cluster_size", first(INF), ValueError, "such as inf"),
    "negative count": ("cluster_size", first(-0.5), ValueError, "such as -0.5"),
    "flipped exponent": ("cluster_size", first(2.0**70), ValueError, "cluster_size must be finite and not negative"),
    "NaN sum": ("embed_avg", first(NAN), ValueError, "embed_avg must be finite, got 1 of 18"),
    "all NaN": ("embed_avg", lambda x: x * NAN, ValueError, "got 18 of 18"),
    "beyond float32": ("embed", lambda x: first(1e200)(x.double()), ValueError, "embed must be finite"),
    "integer codes": ("embed", lambda x: x.long(), TypeError, "embed must have a floating dtype, got torch.int64"),
    "complex codes": (
        "embed",
        lambda x: x.cfloat(),
        TypeError,
        "embed must have a floating dtype, got torch.complex64",
    ),
    "NumPy": ("cluster_size", lambda x: x.numpy(), TypeError, "cluster_size must be a tensor, got ndarray"),
    "flag": ("initialized", lambda x: torch.tensor(2), ValueError, "initialized must be True or False.*such as 2"),
    "NaN flag": ("initialized", lambda x: torch.tensor(NAN), ValueError, "initialized must be True or False"),
    "several flags": ("initialized", lambda x: x.expand(2), ValueError, r"initialized \(\), got \(2,\)"),
    "updates": ("num_updates", lambda x: x * 0 - 2, ValueError, "num_updates must be a count, or -1"),
    "half updates": (
        "num_updates",
        lambda x: x.half(),
        TypeError,
        "num_updates must have an integer dtype, got torch.flo",
    ),
    "draws": (
        "rng",
        lambda x: torch.tensor([0, -(2**63)]),
        ValueError,
        "rng must be a seed and a count of draws, got 1",
    ),
    "half rng": ("rng", lambda x: x.bfloat16(), TypeError, "rng must have an integer dtype, got torch.bfloat16"),
}


def assert_refused(module, state, error, message, **how):
    """Assert that loading raises, and changes neither the module nor the caller's state."""
    before, kept = state_of(module), dict(state)
    with pytest.raises(error, match=message):
        module.load_state_dict(state, **how)
    assert_same_bits(state_of(module), before)
    assert list(state) == list(kept)
    assert all(state[name] is kept[name] for name in kept)


@pytest.mark.parametrize("how", [{}, {"strict": False}, {"assign": True}])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_state_is_refused_before_anything_changes(damage, how):
    name, change, error, message = DAMAGES[damage]
    state = trained().state_dict()
    state[name] = change(state[name])
    module = trained()
    if damage == "beyond float32" and "assign" in how:  # the float64 state itself is sound
        module.load_state_dict(state, **how)
        assert module.embed.dtype == torch.float64
        return
    assert_refused(module, state, error, message, **how)


@pytest.mark.parametrize("damage", ["NaN count", "NaN code", "half rng", "several flags"])
def test_key_is_named_in_full_inside_other_modules(damage):
    name, change, error, _ = DAMAGES[damage]
    model = nn.ModuleDict({"vq": nn.Sequential(trained())})
    state = model.state_dict()
    state["vq.0." + name] = change(state["vq.0." + name])
    assert_refused(model, state, error, name if damage == "several flags" else "vq.0." + name)


def test_no_scale_is_loaded_where_one_is_damaged():
    quantizer = vqssl.MultiScaleQuantizer([2, 3], codebook_size=4, dim=3, projection=vqssl.LearnedProjection)
    other = copy.deepcopy(quantizer)
    quantizer([torch.randn(2, 2, 5), torch.randn(2, 3, 5)])
    for name in ("codebooks.1.cluster_size", "projections.1.0.weight"):
        state = quantizer.state_dict()
        state[name] = first(NAN)(state[name])
        assert_refused(other, state, ValueError, f"{name} must be finite")
    other.load_state_dict(quantizer.state_dict())


def test_projections_of_the_user_may_hold_infinities():
    class Masked(nn.Module):
        def __init__(self, channels, dim):
            super().__init__()
            self.register_buffer("mask", torch.full((2, 2), -INF))

        def forward(self, x):
            return x

    quantizer = vqssl.MultiScaleQuantizer([3], codebook_size=4, dim=3, projection=Masked)
    quantizer.load_state_dict(quantizer.state_dict())


@pytest.mark.parametrize(
    ("module", "name", "value", "message"),
    [
        (vqssl.SERFFusion(4, 2, hidden_dim=8), "psi.1.weight", NAN, "psi.1.weight must be finite"),
        (vqssl.SERFFusion(4, 2, hidden_dim=8), "alpha", INF, "alpha must be finite"),
        (vqssl.SERFFusion(4, 2, hidden_dim=8), "mlp.1.running_var", -1.0, "mlp.1.running_var must be .*not negative"),
        (vqssl.SERFFusion(4, 2, hidden_dim=8), "mlp.1.num_batches_tracked", -1, "a count of batches"),
        (vqssl.OrthogonalProjection(4, 2), "weight", NAN, "weight must be finite"),
        (vqssl.LearnedProjection(4, 2), "0.bias", NAN, "0.bias must be finite"),
    ],
)
def test_other_modules_refuse_too(module, name, value, message):
    state = module.state_dict()
    state[name] = first(value)(state[name])
    assert_refused(module, state, ValueError, message)
    module.load_state_dict(module.state_dict())


def test_half_module_refuses_what_overflows_there():
    fusion = vqssl.SERFFusion(4, 1, hidden_dim=8)
    state = fusion.state_dict()
    state["alpha"] = torch.tensor([1e6])
    fusion.load_state_dict(state)
    assert_refused(vqssl.SERFFusion(4, 1, hidden_dim=8).half(), state, ValueError, "alpha must be finite")


@pytest.mark.parametrize(("metric", "row"), [("cosine", 0.0), (correlation, 2.0)])
def test_codes_that_the_metric_cannot_compare_are_refused(metric, row):
    state = trained(metric=metric).state_dict()
    state["embed"][4] = row
    assert_refused(trained(metric=metric), state, ValueError, "embed must have a direction.*got 1 of 6 rows")
    trained().load_state_dict(state)  # euclidean codes may be zeros
    # Codes that the first batch is going to replace may be anything.
    state["initialized"].fill_(False)
    codebook = vqssl.EMACodebook(codebook_size=6, dim=3, metric=metric)
    codebook.load_state_dict(state)
    codebook(torch.randn(30, 3))
    assert codebook.initialized


def test_damaged_state_is_refused_on_the_meta_device_and_a_state_without_values_is_not():
    with torch.device("meta"):
        module = vqssl.EMACodebook(codebook_size=6, dim=3)
    state = trained().state_dict()
    state["cluster_size"][0] = NAN
    with pytest.raises(ValueError, match="cluster_size"):
        module.load_state_dict(state, assign=True)
    assert module.embed.is_meta
    module.load_state_dict(module.state_dict(), assign=True)
    with FakeTensorMode():
        fake = vqssl.EMACodebook(codebook_size=6, dim=3)
        fake.load_state_dict(vqssl.EMACodebook(codebook_size=6, dim=3).state_dict())


def test_sharded_state_is_judged_by_all_of_its_entries(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for placement in (Shard(0), Replicate()):
            fusion = vqssl.SERFFusion(4, 1, hidden_dim=8)
            for part in fusion.modules():
                for name, parameter in list(part.named_parameters(recurse=False)):
                    part.register_parameter(name, nn.Parameter(distribute_tensor(parameter.data, mesh, [placement])))
            state = fusion.state_dict()
            fusion.load_state_dict(state)
            weight = state["psi.0.weight"].full_tensor()
            state["psi.0.weight"] = distribute_tensor(first(NAN)(weight), mesh, [placement])
            with pytest.raises(ValueError, match=r"psi.0.weight must be finite, got 1 of 16 entries that are not: "):
                fusion.load_state_dict(state)
    finally:
        torch.distributed.destroy_process_group()


def test_no_code_counts_as_alive_where_a_live_count_is_nan():
    """One NaN makes the total NaN, so that every code has stopped."""
    for dead_below in (0.0, 0.1):
        codebook = trained()
        codebook.cluster_size[2] = NAN
        usage = codebook.usage(dead_below)
        assert usage.dead == 6
        assert usage.fraction == 0
    assert codebook_usage(torch.tensor([1.0, NAN])).dead == 2


# ---- assigned states ----


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float32, torch.float64])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("scales", few([0, 2]))
def test_assigned_state_trains_as_a_copied_one(dtype, training, scales):
    def build():
        if scales:
            return vqssl.MultiScaleQuantizer(
                [3] * scales, codebook_size=6, dim=3, projection=lambda c, d: nn.Identity()
            )
        return vqssl.EMACodebook(codebook_size=6, dim=3)

    def call(module, step):
        x = torch.randn(4, 3, 7, generator=torch.Generator().manual_seed(step))
        return module([x] * scales).indices if scales else [module(x.mT).indices]

    source = build()
    for step in range(3):
        call(source, step)
    state = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state_of(source).items()}
    copied, assigned = build().train(training), build().train(training)
    if dtype == torch.float64:
        copied.double()
    copied.load_state_dict(state)
    assigned.load_state_dict(state, assign=True)
    for step in range(20):
        for a, b in zip(call(assigned, step), call(copied, step), strict=True):
            assert torch.equal(a, b)
    assert_same_bits(state_of(assigned), state_of(copied))
    for value in assigned.state_dict().values():
        assert not value.is_floating_point() or value.dtype == (
            torch.float64 if dtype == torch.float64 else torch.float32
        )


def test_assigned_tensors_of_several_dtypes_become_one():
    state = trained().state_dict()
    state["embed"] = state["embed"].double()
    state["cluster_size"] = state["cluster_size"].half()
    state["initialized"] = state["initialized"].float()
    state["rng"], state["num_updates"] = state["rng"].int(), state["num_updates"].short()
    codebook = vqssl.EMACodebook(codebook_size=6, dim=3)
    codebook.load_state_dict(state, assign=True)
    assert {tensor.dtype for tensor in codebook.state()} == {torch.float64}
    assert [codebook.initialized.dtype, codebook.rng.dtype, codebook.num_updates.dtype] == [
        torch.bool,
        torch.int64,
        torch.int64,
    ]
    codebook(torch.randn(30, 3))
    assert codebook.num_updates == 4


# ---- states of other libraries ----


@pytest.mark.parametrize(
    ("flag", "reader"), [("initted", "codebook_from_vector_quantize_pytorch"), ("inited", "codebook_from_encodec")]
)
@pytest.mark.parametrize("prefix", ["", "_codebook."])
def test_state_of_another_library_is_refused_by_the_name_of_its_reader(flag, reader, prefix):
    embed = torch.randn(6, 3)
    state = {"embed": embed, "embed_avg": embed, "cluster_size": torch.ones(6), flag: torch.ones(1)}
    state = {prefix + name: value for name, value in state.items()}
    codebook = trained()
    message = rf"write vqssl.interop.{reader}\(state_dict, prefix='{prefix}'\)"
    assert_refused(codebook, state, ValueError, message)
    found = getattr(vqssl.interop, reader)(state, prefix=prefix)  # the cure
    assert torch.equal(found.embed, embed)
    # Inside another module torch's own error lists the names; a warning says what they are.
    model = nn.ModuleDict({"vq": codebook})
    nested = {f"vq.{name}": value for name, value in state.items()}
    with pytest.warns(UserWarning, match=reader), pytest.raises(RuntimeError, match="Unexpected key"):
        model.load_state_dict(nested)


def test_array_of_an_older_version_is_refused_as_such():
    with pytest.raises(TypeError, match="embed must be a tensor, got ndarray"):
        trained().load_state_dict(
            {"embed": np.zeros((6, 3)), "embed_avg": np.zeros((6, 3)), "cluster_size": np.ones(6)}
        )
