"""Wrong inputs, offsets beyond 2^31, threads, grad modes, copies, and states of another size or version."""

import copy
import io
import pickle
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import vqssl
from tests.laws import assert_same_bits, state_of, through_file
from tests.reliability.fuzz import attempt
from vqssl.functional import nearest_codeword

# ---- wrong inputs ----


@settings(max_examples=3 * settings().max_examples, suppress_health_check=[HealthCheck.too_slow])
@given(st.randoms(use_true_random=False))
def test_any_input_works_or_is_refused(rng):
    attempt(rng)


@pytest.mark.thorough
def test_five_thousand_seeded_inputs_work_or_are_refused():
    seen = [attempt(random.Random(seed)) for seed in range(5000)]
    outcomes = [outcome for _, outcome in seen]
    # The inputs are a mixture: neither all refused nor all accepted.
    assert 1000 < outcomes.count("refused") < 4000
    assert len({name for name, _ in seen}) > 30


# ---- beyond 2^31 ----


def test_batches_beyond_32_bits_have_the_right_shapes():
    """On the meta device, which needs no memory."""
    many = 2**31 + 5
    codebook = vqssl.EMACodebook(codebook_size=8, dim=4, device="meta").eval()
    out = codebook(torch.empty(many, 4, device="meta"))
    assert out.indices.shape == (many,)
    assert out.quantized.shape == (many, 4)
    assert nearest_codeword(torch.empty(many, 2, device="meta"), torch.empty(3, 2, device="meta")).shape == (many,)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_offsets_beyond_32_bits_change_nothing(metric):
    """The input has three rows, 2^30 entries apart: 4 GB of addresses, of which three pages are touched."""
    far = torch.empty(2**31 + 64, dtype=torch.float16).as_strided((3, 8), (2**30, 1))
    far.copy_(torch.randn(3, 8))
    codebook = vqssl.EMACodebook(codebook_size=16, dim=8, metric=metric)
    near = copy.deepcopy(codebook)
    for _ in range(2):
        assert_same_bits(codebook(far), near(far.clone()))
    assert_same_bits(state_of(codebook), state_of(near))


# ---- threads ----


def test_concurrent_quantisation_equals_sequential():
    codebook = vqssl.EMACodebook(codebook_size=64, dim=8).eval()
    codebook.set_codes_(codebook.embed)
    batches = [torch.randn(500 + 10 * n, 8) for n in range(32)]
    expected = [codebook(x) for x in batches]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            for found, out in zip(pool.map(codebook, batches), expected, strict=True):
                assert_same_bits(found, out)


def test_concurrent_training_of_separate_codebooks_equals_sequential():
    """Several runs in one process share nothing but torch."""

    def train(seed):
        codebook = vqssl.EMACodebook(codebook_size=32, dim=8, seed=seed, decay=0.8)
        for step in range(20):
            codebook(torch.randn(200, 8, generator=torch.Generator().manual_seed(100 * seed + step)))
        return state_of(codebook)

    expected = [train(seed) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for found, state in zip(pool.map(train, range(8)), expected, strict=True):
            assert_same_bits(found, state)


def test_concurrent_training_of_one_codebook_keeps_its_state_valid():
    """The order of updates is undefined, as with BatchNorm, but every code is finite and no count is negative."""
    codebook = vqssl.EMACodebook(codebook_size=32, dim=8, decay=0.9)
    codebook(torch.randn(200, 8))
    start = threading.Barrier(4)

    def train(seed):
        start.wait()
        for step in range(30):
            codebook(torch.randn(200, 8, generator=torch.Generator().manual_seed(100 * seed + step)))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(train, range(4)))
    assert torch.isfinite(codebook.embed).all()
    assert (codebook.cluster_size >= 0).all()
    assert codebook(torch.randn(10, 8)).indices.min() >= 0


# ---- grad modes ----


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_grad_mode_changes_only_the_graph(mode):
    codebook, other = (vqssl.EMACodebook(codebook_size=16, dim=4, decay=0.8) for _ in range(2))
    for step in range(6):
        x = torch.randn(50, 4)
        with mode() if step % 2 else torch.enable_grad():
            found = codebook(x)
        expected = other(x)
        assert torch.equal(found.quantized.clone(), expected.quantized)
        assert_same_bits(state_of(codebook), state_of(other))
    # Training continues outside the mode.
    assert not codebook.embed.is_inference()
    x = torch.randn(50, 4, requires_grad=True)
    codebook(x).commitment_loss.backward()
    assert x.grad.abs().sum() > 0


# ---- copies, files, moves ----


def quantizers():
    return {
        "codebook": vqssl.EMACodebook(codebook_size=12, dim=6, decay=0.8),
        "multi-scale": vqssl.MultiScaleQuantizer([6], codebook_size=12, dim=6, channels_last=True, decay=0.8),
    }


def feed(module, step):
    x = torch.randn(3, 20, 6, generator=torch.Generator().manual_seed(step))
    return module([x] if isinstance(module, vqssl.MultiScaleQuantizer) else x)


def module_through_file(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("kind", quantizers())
@pytest.mark.parametrize(
    "how", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), module_through_file]
)
def test_copies_continue_like_the_original(kind, how):
    module = quantizers()[kind]
    for step in range(3):
        feed(module, step)
    twin = copy.deepcopy(module)
    found = how(twin)
    for step in range(3, 6):
        assert_same_bits(feed(found, step), feed(module, step))
    assert_same_bits(state_of(found), state_of(module))


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield dist.new_group([0])
    dist.destroy_process_group()


def test_process_group_is_copied_but_not_saved(group):
    codebook = vqssl.EMACodebook(codebook_size=8, dim=4, process_group=group)
    assert copy.deepcopy(codebook).process_group is group
    assert pickle.loads(pickle.dumps(codebook)).process_group is None
    teacher = vqssl.MomentumTeacher(nn.Sequential(nn.Linear(4, 4), codebook), process_group=group)
    assert teacher.module[1].process_group is group
    assert copy.deepcopy(teacher).process_group is group
    codebook.process_group = None
    assert codebook.process_group is None


@pytest.mark.parametrize("kind", quantizers())
def test_moves_during_training_change_nothing(kind):
    """Moves to another dtype and back, and to the meta device and back by a state dict."""
    module, other = quantizers()[kind], quantizers()[kind]
    moves = [
        lambda m: m.to("cpu"),
        lambda m: m.half().float(),
        lambda m: m.bfloat16().float(),
        lambda m: m.double().float(),
        lambda m: m.to(memory_format=torch.contiguous_format),
    ]
    for step, move in enumerate(moves):
        assert_same_bits(feed(module, step), feed(other, step))
        if kind == "multi-scale" and step in (1, 2):
            continue  # .half() and .bfloat16() round the projection's weights, as they should
        module = move(module)
    state = through_file(module.state_dict())
    module.to("meta")
    module.to_empty(device="cpu")
    module.load_state_dict(state)
    assert_same_bits(feed(module, 9), feed(other, 9))
    assert_same_bits(state_of(module), state_of(other))


# ---- states of another size or version ----


@pytest.mark.parametrize(("size", "dim"), [(13, 6), (12, 7)])
def test_state_of_another_size_is_refused_before_any_change(size, dim):
    codebook = vqssl.EMACodebook(codebook_size=12, dim=6)
    before = state_of(codebook)
    with pytest.raises(ValueError, match=r"must have the shapes of this EMACodebook: embed \(12, 6\), got") as refusal:
        codebook.load_state_dict(vqssl.EMACodebook(codebook_size=size, dim=dim).state_dict())
    assert "build the module with the sizes that the checkpoint was written with" in str(refusal.value)
    assert_same_bits(state_of(codebook), before)


@pytest.mark.parametrize("prefix", ["", "quantizer.codebooks.0."])
@pytest.mark.parametrize("form", ["version 1", "safetensors"])
def test_state_without_initialized_and_rng_loads(form, prefix):
    """Version 1 held neither; a safetensors file names no version."""
    trained = vqssl.EMACodebook(codebook_size=12, dim=6, decay=0.8)
    for step in range(4):
        feed(trained, step)
    state = trained.state_dict()
    del state["initialized"], state["rng"]
    if form == "version 1":
        state._metadata[""]["version"] = 1
    else:
        state = safetensors.torch.load(safetensors.torch.save(dict(state)))
    found = vqssl.EMACodebook(codebook_size=12, dim=6, decay=0.8, seed=7)
    holder = found
    if prefix:
        holder = nn.Module()
        holder.quantizer = nn.Module()
        holder.quantizer.codebooks = nn.ModuleList([found])
        metadata = getattr(state, "_metadata", None)
        state = {prefix + name: tensor for name, tensor in state.items()}
        if metadata:
            state = type(trained.state_dict())(state)
            state._metadata = {prefix.rstrip("."): metadata[""]}
    holder.load_state_dict(state)
    assert found.initialized
    for name in ("embed", "cluster_size", "embed_avg"):
        assert torch.equal(getattr(found, name), getattr(trained, name))
    # Training continues from there, with draws from its own seed.
    before = found.embed.clone()
    assert_same_bits(found.quantize(torch.ones(2, 6)), trained.quantize(torch.ones(2, 6)))
    feed(found, 5)
    assert (found.embed - before).abs().max() < 2


def test_incomplete_state_of_this_version_is_refused():
    state = vqssl.EMACodebook(codebook_size=12, dim=6).state_dict()
    del state["rng"]
    with pytest.raises(RuntimeError, match="Missing key"):
        vqssl.EMACodebook(codebook_size=12, dim=6).load_state_dict(state)
