"""Names of other libraries, and ours without their underscore: each error names what to write, and that exists."""

import copy
import inspect
import pickle
import re
from typing import Any

import pytest
import torch
from torch import nn

import vqssl
from vqssl.foreign_methods import ForeignMethod

SIZES: dict[str, Any] = {"codebook_size": 8, "dim": 4}


def modules() -> list[Any]:
    quantizer = vqssl.MultiScaleQuantizer([6], **SIZES)
    return [
        vqssl.EMACodebook(**SIZES),
        vqssl.ResidualQuantizer(**SIZES, num_levels=2),
        vqssl.ProductQuantizer(**SIZES, num_groups=2),
        vqssl.MomentumTeacher(nn.Linear(2, 2)),
        vqssl.CodePrediction(5, quantizer),
    ]


FOREIGN = [
    (module, name)
    for module in modules()
    for name, value in vars(type(module)).items()
    if isinstance(value, ForeignMethod)
]


@pytest.mark.parametrize(("module", "name"), FOREIGN, ids=[f"{type(m).__name__}.{n}" for m, n in FOREIGN])
def test_call_says_what_to_write(module, name):
    before = {key: value.clone() for key, value in module.state_dict().items()}
    with pytest.raises(AttributeError, match=f"{type(module).__name__} has no method '{name}': write ") as caught:
        getattr(module, name)(torch.zeros(2, 4), 3, any_option=True)
    method, given = re.search(r"write \.(\w+)\((.*)\)", str(caught.value)).groups()
    parameters = inspect.signature(getattr(module, method)).parameters
    required = [each.name for each in parameters.values() if each.default is each.empty]
    assert given.split(", ") == required
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())


@pytest.mark.parametrize("module", modules(), ids=lambda module: type(module).__name__)
def test_every_method_in_place_is_found_without_its_underscore(module):
    methods = {name for name in dir(type(module)) if name.endswith("_") and not name.startswith("_")}
    ours = {name for name in methods if name not in dir(nn.Module)}
    assert ours
    assert all(isinstance(vars(type(module)).get(name[:-1]), ForeignMethod) for name in ours)


def test_modules_are_copied_and_pickled_as_before():
    codebook = vqssl.EMACodebook(**SIZES)
    for again in (copy.deepcopy(codebook), pickle.loads(pickle.dumps(codebook))):
        assert torch.equal(again.embed, codebook.embed)


@pytest.mark.parametrize(
    ("name", "given", "options", "words"),
    [
        ("DiSSECTObjective", (), {"lambda_vq": 1}, "no argument 'lambda_vq'.*: write commitment_weight="),
        ("DiSSECTObjective", (), {"code_wight": 1}, "no argument 'code_wight': write code_weight="),
        ("DiSSECTObjective", (0.5, 0.5), {}, r"takes its options by name.*got 0\.5, 0\.5: write"),
        ("CodePrediction", (5, [8]), {"hiden_dim": 3}, "no argument 'hiden_dim': write hidden_dim="),
        ("TargetCentring", ([4],), {"momentun": 0.9}, "no argument 'momentun': write momentum="),
        ("PlaceCentring", (4, 9), {"momentun": 0.9}, "no argument 'momentun': write momentum="),
        ("PlaceCentring", (4, 9, 0.9), {}, "by name.*write PlaceCentring"),
        ("OrthogonalProjection", (4, 2), {"sed": 1}, "no argument 'sed': write seed="),
        ("LearnedProjection", (4, 2), {"dtyp": torch.float64}, "no argument 'dtyp': write dtype="),
        ("OrthogonalProjection", (4, 2, 1), {}, "by name.*write OrthogonalProjection"),
    ],
)
def test_old_and_misspelt_options_are_named(name, given, options, words):
    with pytest.raises(TypeError, match=words):
        getattr(vqssl, name)(*given, **options)


def test_heads_follow_a_multi_scale_quantiser_only():
    codebook, prediction = modules()[0], modules()[-1]
    words = r"the MultiScaleQuantizer whose codes are predicted, got EMACodebook: write prediction\.follow_"
    with pytest.raises(TypeError, match=words):
        prediction.follow_(codebook)
