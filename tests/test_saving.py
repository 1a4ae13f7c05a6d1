"""save and load: every module continues to the bit, options come from the file, and what no file holds is refused."""

import inspect
import json
import os
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn

import vqssl
from tests.laws import assert_differs, assert_same_bits, correlation, state_of
from vqssl import (
    BatchRevival,
    ChannelsFirst,
    CodePrediction,
    EMACodebook,
    KMeansInit,
    MultiScaleQuantizer,
    PlaceCentring,
    ProductQuantizer,
    RandomInit,
    RandomProjectionQuantizer,
    ResidualQuantizer,
    SERFFusion,
    TargetCentring,
)
from vqssl.code_targets import BagTarget
from vqssl.constructor_options import constructor_options

POLICIES: dict[str, Any] = {
    "decay": 0.8, "eps": 1e-3, "commitment_weight": 0.7, "ema": "batch_mean", "initialization": KMeansInit(3, "sample"),
    "revival": BatchRevival(0.3), "estimator": "rotation",
}  # fmt: skip
RUN_TIME = {"self", "device", "dtype", "process_group", "codebook_options"}
"""Parameters that belong to a run, and those that a quantiser passes on."""


def tokens(step, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(step))


def predict(module, step):
    maps = [tokens(step, 4, 6, 3, 3).requires_grad_()]
    loss = module(maps if module.takes_maps else maps[0].mean((2, 3)), [torch.arange(36).reshape(4, 3, 3) % 8]).total
    loss.backward()
    return loss


def fuse(module, step):
    loss = module(tokens(step, 4, 6), [tokens(step + 1, 4, 6, 3, 3), tokens(step + 2, 4, 6, 2, 2)]).square().mean()
    loss.backward()
    return loss


def pyramid(module, step):
    return module([tokens(step, 2, 6, 5, 5), tokens(step + 1, 2, 6, 3, 3)])


CASES = {
    "codebook": (lambda: EMACodebook(codebook_size=12, dim=6, seed=3, **POLICIES), lambda m, s: m(tokens(s, 40, 6))),
    "cosine, float64": (
        lambda: EMACodebook(codebook_size=12, dim=6, metric="cosine", dtype=torch.float64),
        lambda m, s: m(tokens(s, 40, 6).double()),
    ),
    "without revival": (
        lambda: EMACodebook(codebook_size=12, dim=6, revival=None, initialization=RandomInit()),
        lambda m, s: m(tokens(s, 40, 6)),
    ),
    "several scales": (
        lambda: MultiScaleQuantizer([6, 6], codebook_size=[8, 12], dim=4, seed=9, **POLICIES),
        pyramid,
    ),
    "learned projections": (
        lambda: MultiScaleQuantizer([6, 6], codebook_size=8, dim=4, projection="learned", metric="cosine"),
        pyramid,
    ),
    "one codebook of all scales": (
        lambda: MultiScaleQuantizer([6, 6], codebook_size=8, dim=6, projection="identity", shared=True),
        pyramid,
    ),
    "residual": (
        lambda: ResidualQuantizer(
            codebook_size=[8, 6, 4], dim=6, num_levels=3, level_dropout=0.5, min_levels=2, seed=5, **POLICIES
        ),
        lambda m, s: m(tokens(s, 40, 6)),
    ),
    "product": (
        lambda: ProductQuantizer(codebook_size=[8, 6], dim=6, num_groups=2, seed=4, **POLICIES),
        lambda m, s: m(tokens(s, 40, 6)),
    ),
    "one codebook of all groups": (
        lambda: ProductQuantizer(codebook_size=8, dim=6, num_groups=2, shared=True, metric="cosine"),
        lambda m, s: m(tokens(s, 40, 6)),
    ),
    "random projection": (
        lambda: RandomProjectionQuantizer(in_dim=6, codebook_size=32, dim=4, num_codebooks=2, norm_input="sequence"),
        lambda m, s: m(tokens(s, 2, 20, 6)),
    ),
    "channels first": (
        lambda: ChannelsFirst(ResidualQuantizer(codebook_size=8, dim=6, num_levels=2, level_dropout=0.3)),
        lambda m, s: m(tokens(s, 2, 6, 4, 4)),
    ),
    "fusion": (lambda: SERFFusion(6, 2, operator="channel", hidden_dim=8), fuse),
    "fusion without MLP": (lambda: SERFFusion(6, 2, residual=False, hidden_dim=None), fuse),
    "prediction": (lambda: CodePrediction(6, [8], target="bag", head="generated", hidden_dim=16, dim=4), predict),
    "prediction of places": (lambda: CodePrediction([6], [8], target="place", head="linear"), predict),
    "centred prediction": (
        lambda: CodePrediction(6, MultiScaleQuantizer([6], codebook_size=8, dim=4), hidden_dim=16, target=BagTarget()),
        predict,
    ),
    "centring": (
        lambda: TargetCentring([6], how="running", momentum=0.7),
        lambda m, s: m([tokens(s, 9, 6)]),
    ),
    "centring by place": (
        lambda: PlaceCentring(6, 4, momentum=0.7),
        lambda m, s: m(tokens(s, 2, 6, 2, 2), torch.arange(8).reshape(2, 2, 2) % 4),
    ),
}


@pytest.fixture(params=CASES)
def case(request):
    build, step = CASES[request.param]
    torch.manual_seed(0)
    return build(), step


@pytest.fixture
def file(tmp_path):
    return tmp_path / "module.safetensors"


@pytest.mark.parametrize("steps", [0, 3])
def test_loaded_module_continues_to_the_bit(case, steps, file):
    module, step = case
    for number in range(steps):
        step(module, number)
    vqssl.save(module, file)
    generator = torch.random.get_rng_state()
    loaded = vqssl.load(file)
    assert torch.equal(torch.random.get_rng_state(), generator)
    assert type(loaded) is type(module)
    assert repr(loaded) == repr(module)
    assert constructor_options_of_all(loaded) == constructor_options_of_all(module)
    assert not any(tensor.is_meta for tensor in [*loaded.parameters(), *loaded.buffers()])
    assert_same_bits(state_of(loaded), state_of(module))
    before = state_of(module)
    module.zero_grad()
    for number in range(steps, steps + 4):
        assert_same_bits(step(loaded, number), step(module, number))
    assert_same_bits(state_of(loaded), state_of(module))
    for ours, theirs in zip(loaded.parameters(), module.parameters(), strict=True):
        assert_same_bits(ours.grad, theirs.grad)
    if not isinstance(module, RandomProjectionQuantizer | CodePrediction | SERFFusion):
        assert_differs(state_of(loaded), before)


def constructor_options_of_all(module):
    options = constructor_options(module)
    return {name: repr(value) for name, value in options.items()}


def test_every_option_of_the_constructor_is_written(case):
    module, _ = case
    parameters = set(inspect.signature(type(module).__init__).parameters)
    if "codebook_options" in parameters:
        parameters |= set(inspect.signature(EMACodebook.__init__).parameters)
    options = set(constructor_options(module))
    if isinstance(module, ResidualQuantizer):
        options.add("metric")
        assert "metric" in constructor_options(module)
    if isinstance(module, CodePrediction) and module.centring is None:
        options |= {"centring", "centre_momentum"}  # of no use there
    assert options == parameters - RUN_TIME


def test_options_are_those_of_now(file):
    codebook = EMACodebook(codebook_size=8, dim=4)
    codebook.decay = 0.5
    codebook.revival = BatchRevival(0.2)
    vqssl.save(codebook, file)
    loaded = vqssl.load(file)
    assert (loaded.decay, loaded.revival) == (0.5, BatchRevival(0.2))


def test_modes_frozen_parts_and_parameters_without_gradient_are_kept(file):
    quantizer = MultiScaleQuantizer([6, 6], codebook_size=8, dim=4, projection="learned")
    quantizer.codebook(1).freeze()
    quantizer.projections[0].eval()
    quantizer.projections[1][0].bias.requires_grad_(False)
    vqssl.save(quantizer, file)
    loaded = vqssl.load(file)
    assert [codebook.frozen for codebook in loaded.codebooks] == [False, True]
    assert [(n, m.training) for n, m in loaded.named_modules()] == [
        (n, m.training) for n, m in quantizer.named_modules()
    ]
    assert [each.requires_grad for each in loaded.parameters()] == [
        each.requires_grad for each in quantizer.parameters()
    ]


def test_options_of_load_replace_those_of_the_file(file):
    vqssl.save(ResidualQuantizer(codebook_size=8, dim=4, num_levels=2), file)
    loaded = vqssl.load(file, decay=0.5, level_dropout=0.25)
    assert [codebook.decay for codebook in loaded.codebooks] == [0.5, 0.5]
    assert loaded.level_dropout == 0.25
    with pytest.raises(TypeError, match=r"no argument 'decai'.*write decay="):
        vqssl.load(file, decai=0.5)
    with pytest.raises(ValueError, match="shapes of this ResidualQuantizer"):
        vqssl.load(file, dim=5)


def test_same_module_gives_the_same_bytes_and_metadata_are_json(file, tmp_path):
    codebook = EMACodebook(codebook_size=8, dim=4, metric="cosine")
    other = tmp_path / "other.safetensors"
    vqssl.save(codebook, file)
    vqssl.save(codebook, other)
    assert file.read_bytes() == other.read_bytes()
    with safetensors.safe_open(file, framework="pt") as opened:
        described = json.loads(opened.metadata()["vqssl"])
    assert described["module"] == "EMACodebook"
    assert described["options"]["metric"] == "cosine"
    assert described["options"]["revival"] == {"policy": "BatchRevival", "options": {"threshold": 0.1}}
    state = codebook.state_dict()
    found = safetensors.torch.load_file(file)
    assert_same_bits({name: found[name] for name in state}, dict(state))


def test_half_precision_and_device_are_kept(file):
    quantizer = MultiScaleQuantizer([6], codebook_size=8, dim=4).half()
    vqssl.save(quantizer, file)
    loaded = vqssl.load(file, map_location=torch.device("cpu"))
    assert loaded.projections[0].weight.dtype == torch.float16
    assert loaded.codebook(0).embed.dtype == torch.float32


def test_failed_write_leaves_the_old_file(file, monkeypatch):
    vqssl.save(EMACodebook(codebook_size=8, dim=4, decay=0.5), file)
    before = file.read_bytes()

    def fail(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        vqssl.save(EMACodebook(codebook_size=8, dim=4, decay=0.9), file)
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


# ---- refusals ----


class OwnCodebook(EMACodebook):
    pass


class OwnRevival:
    def dead(self, state):
        return None

    def replace(self, state, dead, tokens):
        return state


def changed(quantizer, **attributes):
    for name, value in attributes.items():
        setattr(quantizer.codebook(1), name, value)
    return quantizer


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (
            lambda: EMACodebook(codebook_size=8, dim=4, metric=correlation),
            ValueError,
            "metric.*got correlation.*in your code",
        ),
        (lambda: EMACodebook(codebook_size=8, dim=4, revival=OwnRevival()), ValueError, "revival.*got OwnRevival"),
        (lambda: EMACodebook(codebook_size=8, dim=4, ema=lambda *a: a[0]), ValueError, "ema.*got <lambda>"),
        (
            lambda: MultiScaleQuantizer([6], codebook_size=8, dim=4, projection=nn.Linear),
            ValueError,
            "projection.*got Linear",
        ),
        (
            lambda: changed(ResidualQuantizer(codebook_size=8, dim=4, num_levels=2), decay=0.5),
            ValueError,
            "got decay 0.5 in codebook 1 where it gives 0.99: save the codebooks one by one",
        ),
        (lambda: OwnCodebook(codebook_size=8, dim=4), TypeError, "got OwnCodebook: write torch.save"),
        (
            lambda: nn.Sequential(nn.Linear(2, 4), EMACodebook(codebook_size=8, dim=4)),
            TypeError,
            "got Sequential: save its part, module.1",
        ),
        (lambda: EMACodebook(codebook_size=8, dim=4, device="meta"), ValueError, "embed on the meta device"),
        (
            lambda: CodePrediction(6, [8], target="bag", head=lambda sizes: nn.Linear(6, 8)),
            ValueError,
            "head.*<lambda>",
        ),
    ],
)
def test_what_no_file_can_hold_is_refused(build, error, words, file):
    with pytest.raises(error, match=words):
        vqssl.save(build(), file)
    assert not file.exists()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda q, file: vqssl.save(q.state_dict(), file), "module must be a module of vqssl, got OrderedDict"),
        (lambda q, file: vqssl.save(file, q), "module must be a module of vqssl, got PosixPath"),
        (lambda q, file: vqssl.save(q, q.dim), "file must be a path, got int"),
        (lambda q, file: vqssl.load(q), "file must be a path, got EMACodebook"),
    ],
)
def test_arguments_of_another_kind_are_refused(call, words, file):
    with pytest.raises(TypeError, match=words):
        call(EMACodebook(codebook_size=8, dim=4), file)
    assert not file.exists()


def written(file, metadata):
    safetensors.torch.save_file(EMACodebook(codebook_size=8, dim=4).state_dict(), file, metadata)


GOOD = {"format": 1, "module": "EMACodebook", "options": {"codebook_size": 8, "dim": 4}}


@pytest.mark.parametrize(
    ("description", "words"),
    [
        (None, "without options: build the module in your code"),
        ({**GOOD, "format": 2}, "has format 2.*reads 1: install a newer vqssl"),
        ({**GOOD, "module": "Linear"}, "must describe one of EMACodebook.*got 'Linear'"),
        ({**GOOD, "eval": [3]}, "must list names under 'eval'"),
        (
            {**GOOD, "options": {"codebook_size": 8, "dim": 4, "revival": {"policy": "Popen", "options": {}}}},
            "must name policies among .*got 'Popen'",
        ),
    ],
)
def test_files_that_save_did_not_write_are_refused(description, words, file):
    written(file, None if description is None else {"vqssl": json.dumps(description)})
    with pytest.raises(ValueError, match=words):
        vqssl.load(file)


def test_missing_unreadable_and_damaged_files_are_refused(file, tmp_path):
    with pytest.raises(ValueError, match="does not exist: check the path"):
        vqssl.load(file)
    with pytest.raises(
        ValueError, match=r"must end in \.safetensors, got 'codes.pt': .*or read another with torch.load"
    ):
        vqssl.load("codes.pt")
    with pytest.raises(ValueError, match=r"must end in \.safetensors, got 'codes.pt': give it that ending"):
        vqssl.save(EMACodebook(codebook_size=8, dim=4), "codes.pt")
    codebook = EMACodebook(codebook_size=8, dim=4)
    vqssl.save(codebook, file)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match="cannot be read"):
        vqssl.load(cut)
    codebook.embed[0, 0] = torch.nan
    vqssl.save(codebook, file)
    with pytest.raises(ValueError, match="embed must be finite"):
        vqssl.load(file)


def test_notes_are_kept_for_readers_and_change_nothing(tmp_path):
    codebook = EMACodebook(codebook_size=8, dim=4)
    notes = {"trained on": "noise", "steps": 3, "settings": {"lr": 1e-3, "views": (1, 2)}}
    vqssl.save(codebook, tmp_path / "plain.safetensors")
    vqssl.save(codebook, tmp_path / "noted.safetensors", notes=notes)
    with safetensors.safe_open(tmp_path / "noted.safetensors", framework="pt") as opened:
        described = json.loads(opened.metadata()["vqssl"])
    assert described.pop("notes") == {**notes, "settings": {"lr": 1e-3, "views": [1, 2]}}
    with safetensors.safe_open(tmp_path / "plain.safetensors", framework="pt") as opened:
        assert json.loads(opened.metadata()["vqssl"]) == described
    assert torch.equal(vqssl.load(tmp_path / "noted.safetensors").embed, codebook.embed)


@pytest.mark.parametrize("notes", ["text", ["a"], {1: "a"}, {"codes": torch.zeros(2)}, {"made by": object()}])
def test_notes_that_a_file_cannot_hold_are_refused(notes, tmp_path):
    with pytest.raises(TypeError, match=r"notes must be .*: write notes=\{\"trained on\""):
        vqssl.save(EMACodebook(codebook_size=8, dim=4), tmp_path / "codes.safetensors", notes=notes)
    assert not any(tmp_path.iterdir())
