"""Checks against other libraries themselves. test_foreign.py runs this file in a process that can import them.

torchvision, timm and lightly must not be in the environment of the other tests, because a torchvision built for another
torch breaks whatever imports it. ``python -m tests.interop.foreign`` runs every check and prints the names of those
that pass.
"""

import contextlib
import copy
import sys
import tempfile
import traceback
import types
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from torch import nn

from tests.laws import assert_same_bits, through_file
from tests.ports import audio_codec
from tests.ports.beside import assert_falls, assert_same_results, take_networks
from vqssl import MomentumTeacher, RandomProjectionQuantizer, tokens
from vqssl.functional import sinkhorn
from vqssl.interop import (
    codebook_from_embedding,
    codebook_from_encodec,
    codebook_from_vector_quantize_pytorch,
    codebook_prefixes,
    codebook_to_encodec,
    codebook_to_vector_quantize_pytorch,
    load_lightly_teacher_,
    momentum_state_from_lightly,
    residual_quantizer_from_encodec,
    residual_quantizer_from_mimi,
    resnet_state_dict,
)

NAMES = ("embed", "cluster_size", "embed_avg")
STEPS = 8


def make_torchvision_importable() -> torch.library.Library:
    """Define the two operators without which a torchvision that lacks its compiled part cannot be imported."""
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


def small_resnet():
    return import_module("torchvision.models").resnet18()


def trained_teacher(student, images):
    """Return a teacher after one update: weights and BatchNorm statistics differ from those of a fresh model."""
    teacher = MomentumTeacher(student, momentum=0.5)
    with torch.no_grad():
        student(images)
        for parameter in student.parameters():
            parameter.mul_(1 + 0.1 * torch.rand_like(parameter))
    teacher.update_(student)
    return teacher.eval()


# ---- backbone_state_dict() into ResNets ----


def resnets():
    """Return a fresh ResNet-18 of 1000 classes from each library."""
    timm, monai = import_module("timm"), import_module("monai.networks.nets")
    return {
        "torchvision": small_resnet(),
        "timm": timm.create_model("resnet18", pretrained=False),
        "MONAI": monai.resnet18(
            spatial_dims=2, n_input_channels=3, conv1_t_stride=2, bias_downsample=False, num_classes=1000
        ),
    }


def features(model, x):
    """Compute the pooled features of a ResNet."""
    model.fc = nn.Identity()
    return model.eval()(x).flatten(1)


def whole_resnet_loads_into_torchvision_timm_and_monai():
    student = nn.Sequential()
    student.encoder = small_resnet()
    student.encoder.fc = nn.Identity()
    teacher = trained_teacher(student, torch.randn(4, 3, 64, 64))
    state, x = teacher.backbone_state_dict("encoder"), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = teacher(x)
        for name, model in resnets().items():
            answer = model.load_state_dict(state, strict=False)
            assert answer.missing_keys == ["fc.weight", "fc.bias"], (name, answer)
            assert answer.unexpected_keys == [], (name, answer)
            assert features(model, x).equal(expected), name


def resnet_cut_into_a_sequential_loads_into_torchvision_timm_and_monai():
    cut = nn.Sequential(*list(small_resnet().children())[:-1])
    teacher = trained_teacher(cut, torch.randn(4, 3, 64, 64))
    state, x = resnet_state_dict(teacher.backbone_state_dict()), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = teacher(x).flatten(1)
        for name, model in resnets().items():
            answer = model.load_state_dict(state, strict=False)
            assert answer.missing_keys == ["fc.weight", "fc.bias"], (name, answer)
            assert features(model, x).equal(expected), name


# ---- teachers of lightly ----


class LightlyBYOL(nn.Module):
    """The submodules of lightly's example of BYOL, without Lightning."""

    def __init__(self):
        super().__init__()
        heads = import_module("lightly.models.modules")
        self.backbone = nn.Sequential(*list(small_resnet().children())[:-1])
        self.projection_head = heads.BYOLProjectionHead(512, 32, 16)
        self.prediction_head = heads.BYOLPredictionHead(16, 32, 16)
        self.backbone_momentum = copy.deepcopy(self.backbone)
        self.projection_head_momentum = copy.deepcopy(self.projection_head)


class LightlyMoCo(nn.Module):
    """The submodules of lightly's benchmark of MoCo, where the teacher has the plain names."""

    def __init__(self):
        super().__init__()
        head = import_module("lightly.models.modules").MoCoProjectionHead
        self.backbone = small_resnet()
        self.backbone.fc = nn.Identity()
        self.projection_head = head(512, 32, 16)
        self.query_backbone = copy.deepcopy(self.backbone)
        self.query_projection_head = head(512, 32, 16)


class Student(nn.Module):
    def __init__(self, backbone, projection_head):
        super().__init__()
        self.backbone = backbone
        self.projection_head = projection_head

    def forward(self, x):
        return self.projection_head(self.backbone(x).flatten(1))


def train_as_lightly(student, follower, step):
    """Do one step with lightly's schedule and update, then give the student new weights."""
    momentum = import_module("lightly.utils.scheduler").cosine_schedule(step, STEPS, 0.9, 1.0)
    update_momentum = import_module("lightly.models.utils").update_momentum
    for name in ("backbone", "projection_head"):
        update_momentum(getattr(student, name), getattr(follower, name), m=momentum)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))


def check_lightly(method, student, follower):
    """Train half of the steps with lightly, then half with both, and compare."""
    with torch.no_grad():
        follower(torch.randn(4, 3, 32, 32))  # changes the follower's buffers
    for step in range(STEPS // 2):
        train_as_lightly(student, follower, step)
    checkpoint = through_file({"state_dict": method.state_dict(), "global_step": STEPS // 2})
    ours = MomentumTeacher(student, momentum=0.9, total_steps=STEPS - 1, buffers="own")
    load_lightly_teacher_(ours, checkpoint)
    assert_same_bits(dict(ours.module.state_dict()), dict(follower.state_dict()))
    for step in range(STEPS // 2, STEPS):
        ours.update_(student)
        train_as_lightly(student, follower, step)
        for name, expected in follower.state_dict().items():
            torch.testing.assert_close(ours.module.state_dict()[name], expected, rtol=1e-5, atol=1e-6, msg=name)
    assert ours.step == STEPS
    return checkpoint


def byol_teacher_of_lightly_continues():
    method = LightlyBYOL()
    student = Student(method.backbone, method.projection_head)
    follower = Student(method.backbone_momentum, method.projection_head_momentum)
    checkpoint = check_lightly(method, student, follower)
    backbone = {
        name.removeprefix("backbone."): value
        for name, value in momentum_state_from_lightly(checkpoint, {"backbone": "backbone_momentum"}).items()
    }
    small_resnet().load_state_dict(resnet_state_dict(backbone), strict=False)


def moco_teacher_of_lightly_continues():
    method = LightlyMoCo()
    student = Student(method.query_backbone, method.query_projection_head)
    check_lightly(method, student, Student(method.backbone, method.projection_head))


# ---- balanced codes ----


def sinkhorn_equals_lightly():
    theirs = import_module("lightly.loss.swav_loss").sinkhorn
    for iterations in (1, 3, 10):
        for epsilon in (0.05, 0.5):
            scores = torch.nn.functional.normalize(torch.randn(40, 8), dim=-1) @ torch.randn(8, 12) / 3
            expected = theirs(scores.clone(), iterations, epsilon)
            found = sinkhorn(scores, iterations=iterations, epsilon=epsilon)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
            found = sinkhorn(scores.reshape(4, 10, 12), iterations=iterations, epsilon=epsilon)
            torch.testing.assert_close(found.flatten(0, 1), expected, rtol=1e-4, atol=1e-6)


# ---- codebooks ----


def assert_same_state(ours, theirs, **tolerances):
    for name in NAMES:
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), **tolerances)


def encodec_codebooks():
    # encodec imports torchaudio to read files; the quantiser does not use it.
    sys.modules.setdefault("torchaudio", types.ModuleType("torchaudio"))
    return import_module("encodec.quantization.core_vq")


def encodec_codebook_continues():
    for threshold in (0, 2):  # the expiry of codes makes no difference after loading
        theirs = encodec_codebooks().EuclideanCodebook(6, 24, threshold_ema_dead_code=threshold)
        for _ in range(5):
            theirs(torch.randn(100, 6))
        state = through_file(theirs.state_dict())
        ours = codebook_from_encodec(state)
        assert_same_bits(codebook_to_encodec(ours, like=state), dict(state))
        theirs.load_state_dict(codebook_to_encodec(ours, ""))
        for _ in range(10):
            x = torch.randn(4, 25, 6)
            assert (theirs.cluster_size < 2).any()
            assert ours(x).indices.equal(theirs(x)[1])
            assert_same_state(ours, theirs, rtol=1e-5, atol=1e-5)


def every_layer_of_an_encodec_model_loads():
    quantizer = encodec_codebooks().ResidualVectorQuantization(
        num_quantizers=4, dim=6, codebook_size=16, kmeans_init=False
    )
    for _ in range(3):
        quantizer(torch.randn(2, 6, 50))
    state = {"quantizer.vq." + name: value for name, value in quantizer.state_dict().items()}
    prefixes = codebook_prefixes(state)
    assert prefixes == [f"quantizer.vq.layers.{n}._codebook." for n in range(4)]
    x = torch.randn(2, 6, 50)
    expected, residual = quantizer.eval().encode(x), x.transpose(1, 2)
    for prefix, indices in zip(prefixes, expected, strict=True):
        found = codebook_from_encodec(state, prefix).eval()(residual)
        assert found.indices.equal(indices)
        residual = residual - found.quantized


def residual_quantizer_of_encodec_continues():
    """Indices and decoded sums to the bit; in training, the same steps: levels take what is left before an update."""
    theirs = encodec_codebooks().ResidualVectorQuantization(
        num_quantizers=4, dim=6, codebook_size=16, kmeans_init=False, threshold_ema_dead_code=0
    )
    for _ in range(3):
        theirs(torch.randn(2, 6, 50))
    state = through_file({"quantizer.vq." + name: value for name, value in theirs.state_dict().items()})
    ours = residual_quantizer_from_encodec(state)
    x = torch.randn(2, 6, 50)
    indices = theirs.eval().encode(x)
    found = ours.eval()(x.mT)
    assert found.indices.movedim(-1, 0).equal(indices)
    assert found.quantized.mT.equal(theirs.decode(indices))
    for levels in range(1, 5):
        assert ours.lookup(found.indices[..., :levels]).mT.equal(theirs.decode(indices[:levels]))
    theirs.train()
    ours.train()
    for _ in range(8):
        x = torch.randn(2, 6, 50)
        quantized, indices, losses = theirs(x)
        found = ours(x.mT)
        assert found.indices.movedim(-1, 0).equal(indices)
        torch.testing.assert_close(found.quantized.mT, quantized, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(torch.stack(found.commitment_losses), losses.flatten(), rtol=1e-5, atol=1e-6)
        for own, layer in zip(ours.codebooks, theirs.layers, strict=True):
            assert_same_state(own, layer._codebook, rtol=1e-5, atol=1e-5)


def audio_codec_with_our_quantizer_gives_their_results():
    """A port of a whole model: their results with their codes, at the bandwidths of theirs; and it trains."""
    encodec_codebooks()
    module = import_module("tests.ports.before.audio_codec")
    before, audio = module.Codec(), torch.sin(torch.arange(400) * torch.rand(4, 1, 1))
    assert_falls(module.train(before, audio, 40))
    after = audio_codec.Codec()
    take_networks(after, before)
    after.quantizer.quantizer.load_state_dict(
        residual_quantizer_from_encodec(before.quantizer.state_dict()).state_dict()
    )
    # In training mode, where their loss is; then with the codes that this step moved.
    assert_same_results(after(audio), before(audio), rtol=1e-4, atol=1e-5)
    after.eval()
    before.eval()
    for kilobits in (3.0, 8.0, 17.0, 24.0, 32.0):
        codes = after.encode(audio, kilobits)
        assert codes.equal(before.encode(audio, kilobits))
        torch.testing.assert_close(after.decode(codes), before.decode(codes), rtol=1e-4, atol=1e-5)
    assert_falls(audio_codec.train(after.train(), audio, 40))


def mimi_reads_and_continues():
    package = import_module("transformers")
    config = package.MimiConfig(
        num_quantizers=5, codebook_size=32, codebook_dim=6, hidden_size=12, vector_quantization_hidden_dimension=6,
        num_filters=2, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, intermediate_size=8,
        upsample_groups=12,
    )  # fmt: skip
    model = package.MimiModel(config).eval()
    for module in model.modules():
        if hasattr(module, "embed_sum"):
            module.embed_sum.normal_()
            module.cluster_usage.uniform_(0, 3)[0] = 1e-6  # clamped there
    state = through_file(dict(model.state_dict()))
    x = torch.randn(2, 12, 50)
    for name in ("semantic", "acoustic"):
        prefix = f"quantizer.{name}_residual_vector_quantizer."
        theirs = model.get_submodule(prefix.removesuffix("."))
        ours = residual_quantizer_from_mimi(state, prefix).eval()
        for own, layer in zip(ours.codebooks, theirs.layers, strict=True):
            assert own.embed.equal(layer.codebook.embed)
        with torch.no_grad():
            tokens_of_theirs, indices = theirs.input_proj(x).mT, theirs.encode(x)
            found = ours(tokens_of_theirs)
            assert found.indices.movedim(-1, 0).equal(indices)
            assert theirs.output_proj(found.quantized.mT).equal(theirs.decode(indices.transpose(0, 1)))
        ours.train()(tokens_of_theirs)


def dac_codes_are_read_level_by_level():
    package = import_module("transformers")
    config = package.DacConfig(
        encoder_hidden_size=8, hidden_size=16, n_codebooks=3, codebook_size=32, codebook_dim=4, downsampling_ratios=[2],
        upsampling_ratios=[2], decoder_hidden_size=8,
    )  # fmt: skip
    model = package.DacModel(config).eval()
    state, rest = through_file(dict(model.state_dict())), torch.randn(2, 16, 40)
    for level, theirs in enumerate(model.quantizer.quantizers):
        prefix = f"quantizer.quantizers.{level}.codebook."
        ours = codebook_from_embedding(state, prefix, metric="cosine").eval()
        with torch.no_grad():
            tokens_of_theirs = theirs.in_proj(rest)
            raw, indices = theirs.decode_latents(tokens_of_theirs)
            assert ours(tokens_of_theirs.mT).indices.equal(indices)
            assert state[prefix + "weight"][indices].mT.equal(raw)
            rest = rest - theirs.out_proj(raw)


def xcodec_reads_as_encodec():
    package = import_module("transformers.models.xcodec.modeling_xcodec")
    config = types.SimpleNamespace(codebook_size=20, codebook_dim=6, num_quantizers=4, frame_rate=50)
    theirs = package.XcodecResidualVectorQuantization(config)
    for layer in theirs.quantizers:
        layer.codebook.embed.normal_()
        layer.codebook.cluster_size.uniform_(1, 3)
        layer.codebook.embed_avg.copy_(layer.codebook.embed * layer.codebook.cluster_size[:, None])
    state = through_file({f"quantizer.{name}": value for name, value in theirs.state_dict().items()})
    ours = residual_quantizer_from_encodec(state).eval()
    x = torch.randn(2, 6, 50)
    indices = theirs.encode(x)
    found = ours(x.mT)
    assert found.indices.movedim(-1, 0).equal(indices)
    assert found.quantized.mT.equal(theirs.decode(indices))
    for prefix in codebook_prefixes(state):
        book = codebook_from_encodec(state, prefix)
        assert_same_bits(codebook_to_encodec(book, prefix, like=state), state)


def chameleon_codes_are_read():
    package = import_module("transformers")
    config = package.ChameleonVQVAEConfig(
        embed_dim=8, num_embeddings=24, latent_channels=8, resolution=16, base_channels=32, channel_multiplier=[1, 1],
        num_res_blocks=1,
    )  # fmt: skip
    model = package.ChameleonVQVAE(config).eval()
    # The published codes are far from the uniform ones of construction.
    model.quantize.embedding.weight.data.normal_()
    state = through_file({f"model.vqmodel.{name}": value for name, value in model.state_dict().items()})
    state["model.embed_tokens.weight"] = torch.randn(9, 4)
    ours = codebook_from_embedding(state).eval()
    x = torch.randn(2, 8, 5, 5)
    with torch.no_grad():
        quantized, _, indices = model.quantize(x)
        found = ours(x.movedim(1, -1))
    assert found.indices.flatten().equal(indices)
    torch.testing.assert_close(found.quantized.movedim(-1, 1), quantized, rtol=0, atol=1e-6)


def old_vector_quantize_pytorch_codebook_continues():
    """Load a state of release 0.7: no axis of heads, a flag of one float, and no sums for cosine codes."""
    package = import_module("vector_quantize_pytorch")
    for cosine in (False, True):
        theirs = package.VectorQuantize(dim=6, codebook_size=12, use_cosine_sim=cosine)
        for _ in range(5):
            theirs(torch.randn(2, 50, 6))
        state = through_file(theirs.state_dict())
        assert state["_codebook.embed"].shape == (12, 6)
        assert ("_codebook.embed_avg" in state) != cosine
        ours = codebook_from_vector_quantize_pytorch(
            state, metric="cosine" if cosine else "euclidean", estimator="straight_through"
        )
        assert_same_bits(codebook_to_vector_quantize_pytorch(ours, like=state), dict(state))
        theirs.load_state_dict(codebook_to_vector_quantize_pytorch(ours, like=state))
        for _ in range(1 if cosine else 10):  # for cosine, later steps differ: theirs averages means, ours sums
            x = torch.randn(2, 50, 6)
            assert ours(x).indices.equal(theirs(x)[1])
            if not cosine:
                assert_same_state(ours, theirs._codebook, rtol=1e-5, atol=1e-5)


# ---- shards ----


def parquet_shards_hold_what_npz_shards_do():
    read_table, folder = import_module("pyarrow.parquet").read_table, Path(tempfile.mkdtemp())
    model = RandomProjectionQuantizer(in_dim=4, codebook_size=16, dim=2, num_codebooks=2)
    loader = [(torch.randn(n, length, 4), [f"{n}-{i}" for i in range(n)]) for n, length in ((3, 10), (2, 7), (4, 7))]

    def stopped():
        yield from loader[:2]
        raise KeyboardInterrupt

    written = {
        name: tokens(model, loader, folder / name, shard_size=4, file_format=name).files for name in ("npz", "parquet")
    }
    for npz, parquet in zip(written["npz"], written["parquet"], strict=True):
        with np.load(npz) as shard:
            expected = {name: array.tolist() for name, array in shard.items()}
        assert read_table(parquet).to_pydict() == expected
    with contextlib.suppress(KeyboardInterrupt):
        tokens(model, stopped(), folder / "resumed", shard_size=4, file_format="parquet")
    resumed = tokens(model, loader, folder / "resumed", shard_size=4, file_format="parquet").files
    assert [path.read_bytes() for path in resumed] == [path.read_bytes() for path in written["parquet"]]


CHECKS = (
    whole_resnet_loads_into_torchvision_timm_and_monai,
    resnet_cut_into_a_sequential_loads_into_torchvision_timm_and_monai,
    byol_teacher_of_lightly_continues,
    moco_teacher_of_lightly_continues,
    sinkhorn_equals_lightly,
    encodec_codebook_continues,
    every_layer_of_an_encodec_model_loads,
    residual_quantizer_of_encodec_continues,
    audio_codec_with_our_quantizer_gives_their_results,
    mimi_reads_and_continues,
    dac_codes_are_read_level_by_level,
    xcodec_reads_as_encodec,
    chameleon_codes_are_read,
    old_vector_quantize_pytorch_codebook_continues,
    parquet_shards_hold_what_npz_shards_do,
)

if __name__ == "__main__":
    registered = make_torchvision_importable()  # the operators exist as long as this reference
    for check in CHECKS:
        torch.manual_seed(0)
        try:
            check()
        except Exception:  # the other checks still run
            traceback.print_exc()
        else:
            print(check.__name__, flush=True)
