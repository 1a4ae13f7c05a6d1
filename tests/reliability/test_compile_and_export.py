"""Compilation, export, torch.func, activation checkpointing and gradient accumulation leave results unchanged."""

import copy
import io

import numpy as np
import onnxruntime
import pytest
import torch
import torch._dynamo
import torch._dynamo.config
import torch._dynamo.testing
from torch import nn
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap
from torch.utils.checkpoint import checkpoint

import vqssl
from tests.laws import assert_differs, assert_same_bits, state_of
from tests.profiles import few
from tests.reliability.material import Net, Student, gradients, images


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


def initialized_net(**options):
    """Return a net with initialised codebooks: initialisation happens once, outside any compiled graph."""
    net = Net(**options)
    net(images(0, 8))
    return net


# ---- compile ----


@pytest.mark.thorough
def test_training_step_compiles_once_to_one_graph():
    """The step is forward, backward, optimizer, teacher and codebooks."""
    net = initialized_net()
    other = copy.deepcopy(net)
    parameters = net.trained()

    def step(net, parameters, views):
        loss = net(views)
        for parameter, g in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.data.sub_(0.05 * g)
        net.teacher.update_(net.student)
        return loss.detach()

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        compiled = torch.compile(step, fullgraph=True, backend=counter)
        for number in range(12):
            found = compiled(net, parameters, images(number, 8))
            expected = step(other, other.trained(), images(number, 8))
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1
    assert net.teacher.step == other.teacher.step == 12
    for name, tensor in [*other.named_parameters(), *other.named_buffers()]:
        torch.testing.assert_close(net.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize("training", [True, False])
def test_batch_size_does_not_recompile(training):
    net = initialized_net().train(training)
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(copy.deepcopy(net), fullgraph=True, dynamic=True, backend=counter)
    frames = []
    for number, count in enumerate((4, 7, 5, 12, 9)):
        expected = net(images(number, count))
        torch.testing.assert_close(compiled(images(number, count)), expected, rtol=1e-5, atol=1e-5)
        frames.append(counter.frame_count)
    assert frames[0] > 0
    assert frames == frames[:1] * 5


@pytest.mark.parametrize("schedule", few([None, 1000]))
def test_teacher_step_does_not_recompile(schedule):
    student = Student()
    teacher = vqssl.MomentumTeacher(student, momentum=0.9, total_steps=schedule)
    plain = copy.deepcopy(teacher)
    counter = torch._dynamo.testing.CompileCounter()
    update = torch.compile(teacher.update_, fullgraph=True, backend=counter)
    for _ in range(20):
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        update(student)
        plain.update_(student)
    assert counter.frame_count == 1
    for step in range(30, 40):
        update(student, step=step)
        plain.update_(student, step=step)
    assert counter.frame_count <= 3  # without a step, with the first, and with any
    assert teacher.step == plain.step == 40
    for found, expected in zip(teacher.module.parameters(), plain.module.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # inductor's own
def test_inductor_equals_eager():
    """In float64, so that rounding is far below the tolerance."""
    net = initialized_net().double()
    compiled = torch.compile(copy.deepcopy(net), fullgraph=True)
    for number in range(3):
        views = images(number, 8).double()
        found, expected = compiled(views), net(views)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        found.backward()
        expected.backward()
    for name, g in gradients(net).items():
        torch.testing.assert_close(gradients(compiled._orig_mod)[name], g, rtol=1e-7, atol=1e-9)


# ---- export ----


class Indices(nn.Module):
    """An encoder and a quantiser, as a user would deploy them."""

    def __init__(self, metric="euclidean"):
        super().__init__()
        self.student = Student()
        self.quantizer = vqssl.MultiScaleQuantizer([8, 12], codebook_size=16, dim=8, metric=metric)

    def forward(self, images):
        out = self.quantizer(self.student(images)[1])
        return *out.indices, *out.quantized


def trained_indices(metric="euclidean"):
    model = Indices(metric)
    for number in range(3):
        model(images(number, 8)[0])
    return model.eval()


def test_exported_program_equals_the_module():
    model = trained_indices()
    program = torch.export.export(model, (images(9, 3)[0],), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for count in (1, 3, 6):
        x = images(count, count)[0]
        for found, expected in zip(loaded(x), model(x), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.thorough
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the exporter's own
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_onnx_equals_the_module(metric, tmp_path):
    model = trained_indices(metric)
    path = tmp_path / "indices.onnx"
    torch.onnx.export(
        model, (images(9, 3)[0],), path, dynamo=True, dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), verbose=False
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    tokens = 0
    for count in (1, 3, 40):
        x = images(count, count)[0]
        x[-1, 0, 3, 3] = float("nan")  # an image with NaN has no codes
        found = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        expected = [tensor.detach().numpy() for tensor in model(x)]
        assert (expected[0][-1] == -1).any()
        for a, b in zip(found, expected, strict=True):
            assert a.dtype == b.dtype
            # No token here is so close to a boundary between two codes that float32 rounding decides.
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
        tokens += sum(a.size for a in found[:2])
    assert tokens > 3000


def test_plain_operators_for_onnx_equal_the_reference():
    """Ties go to the lowest index, non-finite tokens to -1; a non-finite code is never chosen."""
    codes = torch.randn(20, 4)
    codes[10:] = codes[:10]
    codes[3, 1] = float("nan")
    x = torch.randn(500, 4)
    x[5, 0], x[6, 2] = float("inf"), float("nan")
    for metric in ("euclidean", "cosine"):
        expected = vqssl.kernels.nearest_reference(x, codes, metric)
        assert torch.equal(vqssl.kernels.nearest_codeword_plain(x, codes, metric), expected)
    assert (expected == 13).any()  # the copy of the non-finite code
    for dtype in (torch.float16, torch.bfloat16):
        half = (60 * codes).to(dtype)
        expected_half = vqssl.kernels.nearest_reference(60 * x, half)
        assert (vqssl.kernels.nearest_codeword_plain(60 * x, half, "euclidean") != expected_half).sum() <= 1
    error = vqssl.kernels.squared_error_plain(x[7:], expected[7:], codes)
    torch.testing.assert_close(error, vqssl.kernels.squared_error(x[7:], expected[7:], codes))


# ---- torch.func ----


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch.func's own
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_torch_func_transforms_equal_loops_and_autograd(metric):
    codebook = vqssl.EMACodebook(codebook_size=16, dim=4, metric=metric).eval()
    codebook.set_codes_(codebook.embed)
    x = torch.randn(5, 7, 4)

    def loss(x):
        out = codebook(x)
        return (out.quantized * x).sum() + out.commitment_loss

    each = x.clone().requires_grad_()
    for sample in each:
        loss(sample).backward()
    torch.testing.assert_close(vmap(grad(loss))(x), each.grad)
    torch.testing.assert_close(torch.stack([grad(loss)(sample) for sample in x]), each.grad)
    looped = [codebook(sample) for sample in x]
    out = vmap(codebook)(x)
    assert torch.equal(out.indices, torch.stack([one.indices for one in looped]))
    torch.testing.assert_close(out.commitment_loss, torch.stack([one.commitment_loss for one in looped]))
    # An ensemble: vmap over codebooks.
    states = torch.randn(3, 16, 4)
    found = vmap(lambda codes: functional_call(codebook, {"embed": codes}, (x[0],)).indices)(states)
    assert torch.equal(found, torch.stack([vqssl.functional.nearest_codeword(x[0], c, metric) for c in states]))
    curvature = jacrev(jacrev(lambda z: codebook(z).commitment_loss))(x[0, :1])
    expected = torch.autograd.functional.hessian(lambda z: codebook(z).commitment_loss, x[0, :1])
    torch.testing.assert_close(curvature, expected)
    torch.testing.assert_close(hessian(lambda z: codebook(z).commitment_loss)(x[0, :1]), expected)
    direction = torch.randn_like(x[0])
    _, slope = jvp(loss, (x[0],), (direction,))
    # In forward mode torch promotes a float32 scalar times a Python number to float64.
    torch.testing.assert_close(slope, (grad(loss)(x[0]) * direction).sum(), check_dtype=False)


def test_functional_call_equals_the_net():
    net = initialized_net().eval()
    parameters = {name: parameter for name, parameter in net.named_parameters() if parameter.requires_grad}
    found = grad(lambda p: functional_call(net, p, (images(3, 4),)))(parameters)
    net(images(3, 4)).backward()
    for name, expected in gradients(net).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-6)


# ---- recomputed activations and accumulated gradients ----


def test_checkpointed_quantize_then_update_equals_forward():
    codebook, other = (vqssl.EMACodebook(codebook_size=16, dim=8, decay=0.9) for _ in range(2))
    encoder = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    for number in range(5):
        x = torch.randn(64, 8, generator=torch.Generator().manual_seed(number))

        def block(x):
            z = encoder(x)
            return z, *codebook.quantize(z)

        with torch.no_grad():
            codebook.initialize_(encoder(x))
        z, quantized, indices, loss = checkpoint(block, x, use_reentrant=False)
        (quantized.square().sum() + loss).backward()
        codebook.update_(z, indices)

        # The same without checkpointing, in one call.
        z = encoder(x)
        found = other(z)
        assert_same_bits(found.quantized, quantized)
    assert_same_bits(state_of(codebook), state_of(other))


def test_accumulated_batches_equal_one_batch():
    whole = vqssl.EMACodebook(codebook_size=16, dim=8, decay=0.9, dtype=torch.float64)
    parts = copy.deepcopy(whole)
    encoder = nn.Linear(8, 8, dtype=torch.float64)
    other = copy.deepcopy(encoder)
    for number in range(5):
        x = torch.randn(4, 32, 8, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
        z = encoder(x.flatten(0, 1))
        out = whole(z)
        (out.quantized.square().mean() + out.commitment_loss).backward()

        seen = []
        with torch.no_grad():
            parts.initialize_(other(x.flatten(0, 1)))
        for part in x:
            z = other(part)
            out = parts.quantize(z)
            ((out.quantized.square().mean() + out.commitment_loss) / len(x)).backward()
            seen.append((z.detach(), out.indices))
        parts.update_(torch.cat([z for z, _ in seen]), torch.cat([k for _, k in seen]))
        torch.testing.assert_close(other.weight.grad, encoder.weight.grad)
        for name, tensor in state_of(whole).items():
            torch.testing.assert_close(parts.state_dict()[name], tensor)
    untrained = vqssl.EMACodebook(codebook_size=16, dim=8, dtype=torch.float64)
    assert_differs(state_of(whole), state_of(untrained))
