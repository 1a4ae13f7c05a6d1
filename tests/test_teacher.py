"""MomentumTeacher: the copy, the update, buffer policies, the schedule, wrapped students, errors."""

import copy
import gc
import io
import math
import pickle
import weakref
from typing import get_args

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import vqssl.teacher
from tests.profiles import few
from vqssl import EMACodebook, MomentumTeacher
from vqssl.functional import BUFFER_POLICIES, cosine_momentum, ema_buffers
from vqssl.functional.teacher_buffers import BufferPolicyName

POLICIES = tuple(BUFFER_POLICIES)


class Student(nn.Module):
    """A student with convolution and BatchNorm in an encoder, a head, and buffers of every kind."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Conv1d(3, 4, 1))
        self.head = nn.Linear(4, 2)
        self.register_buffer("centre", torch.randn(2))
        self.register_buffer("unsaved", torch.randn(2), persistent=False)
        self.register_buffer("flags", torch.tensor([True, False]))
        self.register_buffer("absent", None)

    def forward(self, x):
        return self.head(self.encoder(x).mean(-1)) - self.centre


def batch():
    return torch.randn(5, 2, 7)


def everything(module):
    """Return copies of all parameters and buffers by name."""
    return {name: t.detach().clone() for name, t in [*module.named_parameters(), *module.named_buffers()]}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensor.dtype == found[name].dtype, name
        assert found[name].equal(tensor), name


def disturb(module):
    """Change every number of a module, as optimizer step and forward pass do together."""
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            if tensor.is_floating_point():
                tensor.add_(torch.randn_like(tensor))
            elif tensor.dtype == torch.bool:
                tensor.logical_not_()
            else:
                tensor.add_(3)


def slow_ema(mine, theirs, momentum):
    """Compute m x teacher + (1 - m) x student, number by number in Python floats."""
    pairs = zip(mine.reshape(-1).tolist(), theirs.reshape(-1).tolist(), strict=True)
    values = [momentum * a + (1 - momentum) * b for a, b in pairs]
    return torch.tensor(values, dtype=torch.float64).reshape(mine.shape)


# ---- the copy ----


@pytest.mark.parametrize("training", [True, False])
def test_starts_as_an_exact_copy(training):
    student = Student().train(training)
    teacher = MomentumTeacher(student)
    assert_same(everything(teacher.module), everything(student))
    assert teacher.module.encoder.training == training
    x = batch()
    student.eval()
    teacher.eval()
    assert teacher(x).equal(student(x))


def test_copy_is_independent_of_the_student():
    student = Student()
    teacher = MomentumTeacher(student)
    before = everything(teacher.module)
    disturb(student)
    assert_same(everything(teacher.module), before)
    before = everything(student)
    disturb(teacher.module)
    assert_same(everything(student), before)


def test_keeps_no_reference_to_the_student():
    student = Student()
    teacher = MomentumTeacher(student)
    student(batch()).sum().backward()
    teacher.update_(student)
    watched = [weakref.ref(student), weakref.ref(student.head.weight), weakref.ref(student.head)]
    del student
    gc.collect()
    assert [watch() for watch in watched] == [None, None, None]
    assert teacher(batch()).shape == (5, 2)


def test_teacher_has_no_gradient_and_makes_no_graph():
    student = Student()
    x = batch().requires_grad_()
    student(x).sum().backward()  # the student's gradients are not copied
    teacher = MomentumTeacher(student)
    assert not any(p.requires_grad for p in teacher.parameters())
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.requires_grad and p.grad is not None for p in student.parameters())
    out = teacher(x)
    assert not out.requires_grad
    assert out.grad_fn is None


def test_call_has_the_students_arguments_and_result():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 2)

        def forward(self, x, *, scale, extra=None):
            return {"y": self.linear(x) * scale, "extra": extra}

    student = Named()
    found = MomentumTeacher(student)(torch.ones(1, 2), scale=3, extra="kept")
    assert found["y"].equal(student(torch.ones(1, 2), scale=3)["y"])
    assert found["extra"] == "kept"


# ---- the update ----


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@given(momentum=st.sampled_from([0.0, 0.5, 0.9, 0.996, 1.0]), steps=st.integers(1, 3))
def test_update_equals_formula_for_parameters_and_buffers(policy, training, momentum, steps):
    student = Student().double().train(training)
    teacher = MomentumTeacher(student, momentum=momentum, buffers=policy).train(training)
    expected = everything(teacher.module)
    parameters = dict(student.named_parameters())
    for _ in range(steps):
        x = batch().double()
        student(x)
        teacher(x)
        if training:  # the teacher's own forward pass has changed its BatchNorm
            moved = dict(teacher.module.encoder[1].named_buffers(prefix="encoder.1"))
            assert {name.rpartition(".")[2] for name in moved} == {"running_mean", "running_var", "num_batches_tracked"}
            assert not any(tensor.equal(expected[name]) for name, tensor in moved.items())
            expected.update({name: tensor.clone() for name, tensor in moved.items()})
        assert_same(everything(teacher.module), expected)
        disturb(student)
        leader = everything(student)
        teacher.update_(student)
        assert_same(everything(student), leader)
        for name, tensor in leader.items():
            if name in parameters or (policy == "ema" and "running_" in name):
                expected[name] = slow_ema(expected[name], tensor, momentum)
            elif policy != "own":
                expected[name] = tensor.clone()
        found = everything(teacher.module)
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-13, atol=1e-14)
        expected = found
    assert teacher.step == steps


@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_momentum_zero_and_one_are_exact(momentum):
    student = Student()
    teacher = MomentumTeacher(student, momentum=momentum)
    before = everything(teacher.module)
    disturb(student)
    teacher.update_(student)
    kept = before if momentum == 1 else everything(student)
    averaged = {name for name in kept if "running_" in name or name in dict(student.named_parameters())}
    found = everything(teacher.module)
    assert_same({name: found[name] for name in averaged}, {name: kept[name] for name in averaged})


@pytest.mark.parametrize("policy", ["ema", "copy"])
def test_update_equals_torchs_averaged_model_bit_for_bit(policy):
    student = Student()
    teacher = MomentumTeacher(student, momentum=0.9, buffers=policy)
    averaged = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=policy == "ema")
    averaged.update_parameters(student)  # its first update copies
    for _ in range(4):
        disturb(student)
        teacher.update_(student)
        averaged.update_parameters(student)
    found, expected = everything(teacher.module), everything(averaged.module)
    # AveragedModel averages all buffers, also integers with rounding; the teacher only those that are means.
    means = {"encoder.1.running_mean", "encoder.1.running_var", *dict(student.named_parameters())}
    compared = [name for name in expected if name in means or policy == "copy"]
    assert len(compared) >= 10
    assert_same({name: found[name] for name in compared}, {name: expected[name] for name in compared})


def test_tied_parameters_are_updated_once():
    student = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    student[1].weight = student[0].weight
    teacher = MomentumTeacher(student, momentum=0.9)
    assert teacher.module[1].weight is teacher.module[0].weight
    before = teacher.module[0].weight.clone()
    disturb(student)
    teacher.update_(student)
    torch.testing.assert_close(teacher.module[1].weight.detach(), torch.lerp(before, student[0].weight, 0.1).detach())


# ---- half precision ----

HALVES = (torch.float16, torch.bfloat16)


def followed(teacher, student, steps=500):
    """Return what share of the gap to the student the teacher closes, worst tensor of those that are averaged."""
    before, target = everything(teacher.module), everything(student)
    averaged = [name for name in target if "running_" in name or name in dict(student.named_parameters())]
    for name in averaged:
        (dict(student.named_parameters()) | dict(student.named_buffers()))[name].data.mul_(1.5).add_(0.5)
    target = everything(student)
    for _ in range(steps):
        teacher.update_(student)
    found = everything(teacher.module)
    gaps = {name: (target[name].double() - before[name].double()).norm() for name in averaged}
    return min((found[name].double() - before[name].double()).norm() / gaps[name] for name in averaged)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize("total_steps", few([500, None]))
def test_teacher_closes_the_same_share_of_the_gap_in_every_dtype(dtype, total_steps):
    student = Student().to(dtype)
    teacher = MomentumTeacher(student, momentum=0.996, total_steps=total_steps)
    assert {t.dtype for t in teacher.module.parameters()} == {dtype}
    left = math.prod(teacher.momentum_at(t) for t in range(500))
    assert followed(teacher, student) == pytest.approx(1 - left, rel=0.02)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("momentum", [0.5, 0.999])
def test_half_teacher_is_the_rounded_float32_teacher(dtype, momentum):
    student = Student().to(dtype)
    teacher = MomentumTeacher(student, momentum=momentum)
    wide = MomentumTeacher(copy.deepcopy(student).float(), momentum=momentum)
    for _ in range(20):
        disturb(student)
        teacher.update_(student)
        wide.update_(student)
    found, expected = everything(teacher.module), everything(wide.module)
    assert_same(found, {name: t.to(found[name].dtype) for name, t in expected.items()})


@pytest.mark.parametrize("cast", ["half", "bfloat16"])
def test_cast_of_the_whole_model_keeps_the_float32_average(cast):
    model = nn.Module()
    model.student = Student()
    model.teacher = MomentumTeacher(model.student, momentum=0.9)
    wide = copy.deepcopy(model.teacher)
    assert not list(model.teacher.averages.buffers())
    getattr(model, cast)()
    student = model.student
    for _ in range(20):
        disturb(student)
        model.teacher.update_(student)
        wide.update_(student)
    found, expected = everything(model.teacher.module), everything(wide.module)
    assert_same(found, {name: t.to(found[name].dtype) for name, t in expected.items()})
    model.float()  # and back: nothing was rounded
    averaged = [name for name in expected if "running_" in name or name in dict(student.named_parameters())]
    found = everything(model.teacher.module)
    assert_same({name: found[name] for name in averaged}, {name: expected[name] for name in averaged})
    assert not list(model.teacher.averages.buffers())


def test_one_student_may_have_several_dtypes():
    student = Student()
    student.head.bfloat16()
    teacher = MomentumTeacher(student, momentum=0.996)
    assert set(teacher.averages.names()) <= {"head.weight", "head.bias"}
    assert followed(teacher, student) == pytest.approx(1 - 0.996**500, rel=0.02)
    assert set(teacher.averages.names()) == {"head.weight", "head.bias"}


@pytest.mark.parametrize("assign", [False, True])
def test_half_run_resumes_bit_for_bit(assign):
    student = Student().bfloat16()
    teacher, resumed = (MomentumTeacher(student, momentum=0.99) for _ in range(2))
    for _ in range(5):
        disturb(student)
        teacher.update_(student)
    file = io.BytesIO()
    torch.save(teacher.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True), assign=assign)
    resumed.module.unsaved.copy_(teacher.module.unsaved)
    for _ in range(5):
        disturb(student)
        teacher.update_(student)
        resumed.update_(student)
    assert_same(everything(resumed), everything(teacher))


def test_states_of_half_and_float32_teachers_load_into_each_other():
    student = Student()
    wide = MomentumTeacher(student, momentum=0.99)
    half = MomentumTeacher(copy.deepcopy(student).bfloat16(), momentum=0.99)
    for _ in range(5):
        disturb(student)
        wide.update_(student)
        half.update_(student)
    restored = MomentumTeacher(student)
    restored.load_state_dict(half.state_dict())
    for name in half.averages.names():
        if name in dict(restored.module.named_parameters()):
            assert dict(restored.module.named_parameters())[name].equal(
                half.averages.of(name, dict(half.module.named_parameters())[name])
            )
    narrow = MomentumTeacher(copy.deepcopy(student).bfloat16())
    narrow.load_state_dict(wide.state_dict())
    assert narrow.module.head.weight.equal(wide.module.head.weight.bfloat16())
    narrow.update_(student)


def test_float32_state_in_a_half_teacher_is_not_rounded():
    student = Student()
    wide = MomentumTeacher(student)
    disturb(wide.module)
    narrow = MomentumTeacher(copy.deepcopy(student).bfloat16())
    narrow.load_state_dict(wide.state_dict())
    narrow.float()
    for name in dict(student.named_parameters()):
        assert narrow.module.get_parameter(name).equal(wide.module.get_parameter(name))


@pytest.mark.parametrize("with_averages", [True, False])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_assigned_half_state_makes_a_half_teacher(device, with_averages):
    """As it makes a half student: they have to take the same input."""
    trained = MomentumTeacher(Student().bfloat16(), momentum=0.99)
    for _ in range(5):
        student = Student().bfloat16()
        trained.update_(student)
    state = trained.state_dict()
    if not with_averages:
        state = {name: value for name, value in state.items() if not name.startswith("averages.")}
    teacher = MomentumTeacher(Student().to(device), momentum=0.99)
    teacher.load_state_dict(state, assign=True)
    assert {parameter.dtype for parameter in teacher.module.parameters()} == {torch.bfloat16}
    for each in (teacher, trained):
        each.module.unsaved = student.unsaved.clone()
        each.update_(student)
    assert teacher.averages.state_dict().keys() == trained.averages.state_dict().keys()
    if with_averages:
        assert_same(dict(teacher.averages.named_buffers()), dict(trained.averages.named_buffers()))


def test_teachers_have_their_averages_before_the_first_update():
    """DistributedDataParallel and FSDP send tensors by their order or name: all ranks need the same ones."""
    student = Student().bfloat16()
    fresh, moved = MomentumTeacher(student), MomentumTeacher(student)
    moved.update_(student)
    assert list(fresh.state_dict()) == list(moved.state_dict())
    assert len(fresh.averages.names()) == len(list(student.parameters())) + 2


def test_what_is_written_to_a_half_teacher_counts():
    student = Student().bfloat16()
    teacher = MomentumTeacher(student, momentum=0.99)
    teacher.update_(student)
    teacher.module.head.weight.fill_(3.0)
    teacher.update_(student)
    exact = slow_ema(torch.full((2, 4), 3.0), student.head.weight, 0.99)
    torch.testing.assert_close(teacher.module.head.weight.double(), exact, rtol=0.01, atol=0)


def test_half_teacher_compiles_to_one_graph():
    student = Student().bfloat16()
    teacher, plain = (MomentumTeacher(student, momentum=0.9, total_steps=8) for _ in range(2))
    teacher.update_(student)
    plain.update_(student)
    update = torch.compile(teacher.update_, fullgraph=True, backend="eager")
    for _ in range(3):
        disturb(student)
        update(student)
        plain.update_(student)
    assert_same(everything(teacher.module), everything(plain.module))
    assert teacher.step == plain.step == 4


def test_complex_parameters_are_averaged_and_complex_buffers_copied():
    class Fourier(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 3, dtype=torch.cfloat))
            self.register_buffer("phase", torch.randn(3, dtype=torch.cfloat))

    student = Fourier()
    teacher = MomentumTeacher(student, momentum=0.9)
    before = teacher.module.weight.detach().clone()
    with torch.no_grad():
        student.weight.add_(1 + 2j)
        student.phase.add_(1j)
    teacher.update_(student)
    torch.testing.assert_close(teacher.module.weight.detach(), 0.9 * before + 0.1 * student.weight.detach())
    assert teacher.module.phase.equal(student.phase)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_float32_teacher_follows_a_student_cast_later(dtype):
    student = Student()
    teacher = MomentumTeacher(student, momentum=0.9)
    before = everything(teacher.module)
    student.to(dtype)
    disturb(student)
    teacher.update_(student)
    found = everything(teacher.module)
    for name, tensor in everything(student).items():
        if tensor.is_floating_point():
            assert found[name].dtype == torch.float32
            averaged = "running_" in name or name in dict(student.named_parameters())
            exact = slow_ema(before[name], tensor, 0.9 if averaged else 0.0)
            torch.testing.assert_close(found[name].double(), exact, rtol=1e-6, atol=1e-6)


# ---- buffer policies ----


def follow_means(name, teacher, student, weight):
    """Let running means follow, copy the student's centre, and leave all other buffers."""
    if name.endswith("running_mean"):
        return torch.lerp(teacher, student, weight)
    return student if name == "centre" else teacher


def test_every_buffer_policy_has_its_name_as_a_type():
    assert get_args(BufferPolicyName) == tuple(BUFFER_POLICIES)


@pytest.mark.parametrize("policy", POLICIES)
def test_buffer_policy_functions_equal_names(policy):
    student = Student()
    named = MomentumTeacher(student, momentum=0.9, buffers=policy)
    written = MomentumTeacher(student, momentum=0.9, buffers=BUFFER_POLICIES[policy])
    for _ in range(3):
        disturb(student)
        named.update_(student)
        written.update_(student)
    assert_same(everything(written.module), everything(named.module))


def test_custom_buffer_policy_decides_for_each_buffer_by_name():
    student = Student()
    teacher = MomentumTeacher(student, momentum=0.75, buffers=follow_means)
    expected = everything(teacher.module)
    disturb(student)
    leader = everything(student)
    teacher.update_(student)
    found = everything(teacher.module)
    expected["encoder.1.running_mean"].lerp_(leader["encoder.1.running_mean"], 0.25)
    expected["centre"] = leader["centre"]
    buffers = dict(student.named_buffers())
    assert_same({name: found[name] for name in buffers}, {name: expected[name] for name in buffers})
    assert "buffers='follow_means'" in repr(teacher)


STATISTICS = ["encoder.1.running_mean", "encoder.1.running_var"]


@pytest.mark.parametrize(
    ("policy", "averaged"),
    [
        ("ema", STATISTICS),
        ("copy", STATISTICS),
        ("own", []),
        (ema_buffers("centre"), [*STATISTICS, "centre"]),
        (follow_means, ["encoder.1.running_mean"]),
    ],
)
def test_means_are_averaged_over_ranks_and_what_is_copied_is_not(policy, averaged, monkeypatch):
    student = Student()
    teacher = MomentumTeacher(student, buffers=policy)

    def stand_in(tensors, group):
        for tensor in tensors:
            tensor.fill_(7.0)

    monkeypatch.setattr(vqssl.teacher, "all_reduce_mean_", stand_in)
    teacher.update_(student)
    found = dict(teacher.module.named_buffers())
    assert sorted(
        name for name, tensor in found.items() if (tensor == 7.0).all() and tensor.is_floating_point()
    ) == sorted(averaged)


@pytest.mark.filterwarnings("ignore:.*spectral_norm:FutureWarning")
@pytest.mark.parametrize("buffers", few(["ema", ema_buffers()]))
@pytest.mark.parametrize("norm", [nn.utils.parametrizations.spectral_norm, nn.utils.spectral_norm])
def test_spectral_norm_of_the_teacher_is_that_of_its_weights(norm, buffers):
    """Averaged power-iteration vectors are no unit vectors: the norm of a layer was 1.1 to 1.9 then."""
    student = nn.Sequential(*[norm(nn.Linear(16, 16)) for _ in range(4)])
    teacher = MomentumTeacher(student, momentum=0.99, buffers=buffers).eval()
    optimizer = torch.optim.Adam(student.parameters(), 1e-3)
    for _ in range(200):
        x = torch.randn(32, 16)
        optimizer.zero_grad()
        (student(x) - x.roll(1, -1)).square().mean().backward()
        optimizer.step()
        teacher.update_(student)
    teacher(x)  # the older norm computes its weight in forward
    for layer in teacher.module:
        assert torch.linalg.matrix_norm(layer.weight, 2).item() == pytest.approx(1.0, abs=0.05)


@pytest.mark.filterwarnings("ignore:.*spectral_norm:FutureWarning")
@pytest.mark.parametrize("layer", few([nn.ConvTranspose2d(4, 3, 2), nn.Conv2d(3, 4, 3), nn.Linear(5, 3)]), ids=repr)
@pytest.mark.parametrize("norm", [nn.utils.parametrizations.spectral_norm, nn.utils.spectral_norm])
def test_power_iteration_equals_that_of_a_forward_pass_in_training(norm, layer):
    student = norm(copy.deepcopy(layer))
    teacher = MomentumTeacher(student, momentum=0.0)
    disturbed = copy.deepcopy(student)
    with torch.no_grad():
        for each in (student, disturbed):
            for name, parameter in each.named_parameters():
                parameter.copy_(torch.linspace(-1, 2, parameter.numel()).reshape(parameter.shape).sin() + len(name))
    torch._dynamo.reset()
    torch.compile(teacher.update_, fullgraph=True, backend="eager")(student)
    torch._dynamo.reset()
    disturbed.train()(torch.randn(2, 5) if isinstance(layer, nn.Linear) else torch.randn(1, student.in_channels, 6, 6))
    for name, buffer in disturbed.named_buffers():
        torch.testing.assert_close(dict(teacher.module.named_buffers())[name], buffer)


class Flagged(nn.Module):
    """A normalisation layer that takes its first statistics as they are, and says so."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))
        self.register_buffer("running_mean", torch.zeros(2))
        self.register_buffer("initialized", torch.tensor(False))


@pytest.mark.parametrize(
    ("buffers", "expected"), [("ema", 50.0), (ema_buffers(), 50.0), (ema_buffers("running_mean"), 5.0)]
)
def test_statistics_beside_a_flag_are_copied_with_it_unless_they_are_named(buffers, expected):
    student = nn.Sequential(Flagged())
    teacher = MomentumTeacher(student, momentum=0.9, buffers=buffers)
    student[0].running_mean.fill_(50.0)
    student[0].initialized.fill_(True)
    teacher.update_(student)
    assert teacher.module[0].initialized
    torch.testing.assert_close(teacher.module[0].running_mean, torch.full((2,), expected))


def test_own_function_gets_teacher_and_student_in_one_dtype():
    student = Student().bfloat16()
    teacher = MomentumTeacher(student, buffers=follow_means)
    student.encoder[1].running_mean.fill_(1.0)
    for _ in range(500):
        teacher.update_(student)
    found = teacher.module.encoder[1].running_mean.float()
    torch.testing.assert_close(found, torch.full((3,), 1 - 0.996**500), rtol=0.01, atol=0)


def test_copied_buffers_have_no_float32_average():
    student = Student().bfloat16()
    teacher = MomentumTeacher(student)
    disturb(student)
    teacher.update_(student)
    assert not {"centre", "unsaved"} & set(teacher.averages.names())
    assert teacher.module.centre.equal(student.centre)


def test_integer_parameters_are_copied():
    student = nn.Linear(2, 2)
    student.codes = nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False)
    teacher = MomentumTeacher(student)
    student.codes.data.fill_(5)
    teacher.update_(student)
    assert teacher.module.codes.equal(student.codes)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("policy", ["ema", "copy"])
def test_codebook_in_the_student_is_copied_whole(policy, training):
    centres = 5 * torch.randn(32, 8) + 20

    def tokens():
        return centres[torch.randint(32, (512,))] + 0.1 * torch.randn(512, 8)

    student = nn.Sequential(nn.Linear(8, 8), EMACodebook(codebook_size=64, dim=8))
    nn.init.eye_(student[0].weight)
    teacher = MomentumTeacher(student, buffers=policy).train(training)
    for _ in range(30):
        student(tokens())
        teacher.update_(student)
        x = tokens()
        ours, theirs = (copy.deepcopy(m).eval()(x).commitment_loss.item() for m in (teacher.module, student))
        assert ours < 3 * theirs
        assert_same(everything(teacher.module[1]), everything(student[1]))


@pytest.mark.parametrize("result", [None, torch.zeros(()), torch.zeros(7)])
def test_buffer_policy_with_a_wrong_result_is_refused_and_nothing_changes(result):
    student = Student()
    teacher = MomentumTeacher(student, momentum=0.5, buffers=lambda name, teacher, student, weight: result)
    before = everything(teacher.module)
    disturb(student)
    with pytest.raises(
        ValueError, match=r"buffers must return a tensor of the buffer's shape, \(2,\) for 'centre', got"
    ):
        teacher.update_(student)
    assert_same(everything(teacher.module), before)
    assert teacher.step == 0


# ---- the schedule ----


@pytest.mark.filterwarnings("ignore:the teacher's schedule ended")
def test_momentum_follows_the_schedule_and_steps_are_counted():
    student = Student()
    teacher = MomentumTeacher(student, momentum=0.9, final_momentum=0.99, total_steps=4)
    for t in range(6):
        assert teacher.step == t
        assert teacher.momentum_at(t) == cosine_momentum(t, 4, 0.9, 0.99)
        assert type(teacher.momentum_at(t)) is float
        before = teacher.module.head.weight.detach().clone()
        disturb(student)
        teacher.update_(student)
        expected = slow_ema(before, student.head.weight, cosine_momentum(t, 4, 0.9, 0.99))
        torch.testing.assert_close(teacher.module.head.weight.double(), expected, rtol=1e-5, atol=1e-6)
    constant = MomentumTeacher(student, momentum=0.9)
    assert [constant.momentum_at(t) for t in (0, 5, 10**9)] == [0.9] * 3
    assert (constant.final_momentum, MomentumTeacher(student).momentum) == (1.0, 0.996)


def test_given_step_sets_schedule_and_counter():
    student = Student()
    teacher = MomentumTeacher(student, momentum=0.0, final_momentum=1.0, total_steps=10)
    before = everything(teacher.module)
    disturb(student)
    teacher.update_(student, step=10)  # momentum 1: nothing but the counter moves, without a warning
    assert teacher.module.head.weight.equal(before["head.weight"])
    assert teacher.step == 11
    teacher.update_(student, step=0)  # momentum 0: the student itself
    assert teacher.module.head.weight.equal(student.head.weight)
    assert teacher.step == 1


@pytest.mark.parametrize("numbers", ["python", "numpy"])
def test_resumed_run_continues_bit_for_bit(numbers):
    scalar = (lambda value: value) if numbers == "python" else (lambda value: np.array([value])[0])

    def build():
        torch.manual_seed(1)
        student = Student()
        options = {"momentum": scalar(0.5), "final_momentum": scalar(1.0), "total_steps": 6}
        return student, MomentumTeacher(student, **options)

    student, teacher = build()
    for step in range(3):
        disturb(student)
        teacher.update_(student, step=scalar(step))
    file = io.BytesIO()
    torch.save({"student": student.state_dict(), "teacher": teacher.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)  # NumPy scalars would be refused here

    resumed_student, resumed = build()
    resumed_student.load_state_dict(saved["student"])
    resumed_student.unsaved.copy_(student.unsaved)
    resumed.load_state_dict(saved["teacher"])
    resumed.module.unsaved.copy_(teacher.module.unsaved)
    assert resumed.step == 3
    assert type(resumed.step) is int
    for pair in ((student, teacher), (resumed_student, resumed)):
        torch.manual_seed(2)
        for _ in range(4):
            disturb(pair[0])
            pair[1].update_(pair[0])
    assert_same(everything(resumed.module), everything(teacher.module))
    assert resumed.step == teacher.step == 7


def test_end_of_the_schedule_is_said_once():
    student = Student()
    teacher = MomentumTeacher(student, total_steps=2)
    for _ in range(3):
        teacher.update_(student)
    with pytest.warns(UserWarning, match="ended after total_steps = 2 updates, and this is number 4") as caught:
        teacher.update_(student)
    assert caught[0].filename == __file__
    teacher.update_(student)


def test_run_of_one_update_has_the_last_momentum():
    student = Student()
    teacher = MomentumTeacher(student, momentum=0.5, final_momentum=0.25, total_steps=0)
    assert teacher.momentum_at(0) == 0.25
    before = teacher.module.head.weight.detach().clone()
    disturb(student)
    teacher.update_(student)
    torch.testing.assert_close(teacher.module.head.weight.double(), slow_ema(before, student.head.weight, 0.25))


def test_momentum_of_one_update_may_be_given():
    student = Student()
    teacher, expected = (MomentumTeacher(student, momentum=m) for m in (0.9, 0.3))
    disturb(student)
    teacher.update_(student, momentum=0.3)
    expected.update_(student)
    assert_same(everything(teacher.module), everything(expected.module))
    assert teacher.step == 1
    for wrong, error in ((1.5, ValueError), ("0.5", TypeError)):
        before = everything(teacher)
        disturb(student)
        with pytest.raises(error, match="momentum must be"):
            teacher.update_(student, momentum=wrong)
        assert_same(everything(teacher), before)


@pytest.mark.parametrize("step", [0, 3])
def test_step_and_momentum_together_are_refused_and_nothing_changes(step):
    student = Student()
    teacher = MomentumTeacher(student)
    before = everything(teacher)
    disturb(student)
    with pytest.raises(ValueError, match=f"give step or momentum, got step={step} and momentum=0.9"):
        teacher.update_(student, step, momentum=0.9)
    assert_same(everything(teacher), before)


def test_copy_in_a_wrapper_is_refused_with_the_cure():
    student = Student()
    averaged = AveragedModel(student)
    with pytest.raises(ValueError, match=r"parameter 'module.encoder.0.weight' .* write copy=its \.module"):
        MomentumTeacher(student, copy=averaged)
    assert MomentumTeacher(student, copy=averaged.module).module is averaged.module
    with pytest.raises(ValueError, match=r"'weight' is \(2, 3\) .* is \(2, 2\): leave copy out"):
        MomentumTeacher(nn.Linear(2, 2), copy=nn.Linear(3, 2))


@pytest.mark.parametrize(
    ("arguments", "options", "says"),
    [
        ((0.99,), {}, r"options by name.*got 0.99: write MomentumTeacher\(student, momentum=, total_steps=\)"),
        ((), {"decay": 0.99}, "no argument 'decay'.*write momentum="),
        ((), {"ema_model": None}, "no argument 'ema_model'.*write copy="),
        ((), {"momentun": 0.9}, "no argument 'momentun': write momentum="),
    ],
)
def test_options_of_other_libraries_are_refused_with_ours(arguments, options, says):
    with pytest.raises(TypeError, match=says):
        MomentumTeacher(nn.Linear(2, 2), *arguments, **options)


def test_functions_as_hooks_are_shared_and_methods_are_copied():
    class Keeper(nn.Linear):
        def __init__(self):
            super().__init__(2, 2)
            self.register_forward_hook(self.keep)

        def keep(self, module, inputs, output):
            self.seen = inputs[0]

    shared = {}
    student = Keeper()
    student.register_forward_hook(lambda module, inputs, output: shared.update(last=module))
    teacher = MomentumTeacher(student)
    x, y = torch.zeros(1, 2), torch.ones(1, 2)
    student(x)
    assert shared["last"] is student
    teacher(y)
    assert shared["last"] is teacher.module
    assert student.seen is x
    assert teacher.module.seen is y


def test_an_existing_copy_may_follow():
    student = Student()
    copied = copy.deepcopy(student)
    teacher, expected = MomentumTeacher(student, copy=copied), MomentumTeacher(student)
    assert teacher.module is copied
    assert not any(parameter.requires_grad for parameter in copied.parameters())
    for each in (teacher, expected):
        torch.manual_seed(1)
        disturb(student)
        each.update_(student)
        student.load_state_dict(expected.module.state_dict() if each is expected else student.state_dict())
    with pytest.raises(ValueError, match=r"tensors of its own, but its parameter 'encoder.0.weight' is the student's"):
        MomentumTeacher(student, copy=student)


# ---- the number of updates ----


def test_every_entry_of_the_state_is_a_tensor():
    state = MomentumTeacher(Student()).state_dict()
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    safetensors = pytest.importorskip("safetensors.torch")
    model, other = (nn.ModuleDict({"teacher": MomentumTeacher(Student(), total_steps=9)}) for _ in range(2))
    model["teacher"].step = 5
    other.load_state_dict(safetensors.load(safetensors.save(model.state_dict())))
    assert other["teacher"].step == 5


def test_states_with_the_extra_state_of_0_1_load():
    teacher = MomentumTeacher(Student())
    teacher.step = 3
    old = teacher.state_dict()
    del old["num_updates"]
    old["_extra_state"] = {"step": 7}
    for strict in (True, False):
        fresh = MomentumTeacher(Student())
        assert not any(fresh.load_state_dict(old, strict=strict))
        assert fresh.step == 7
    del old["_extra_state"]
    teacher.load_state_dict(old, strict=False)
    assert teacher.step == 3
    nested = nn.ModuleDict({"teacher": teacher})
    nested.load_state_dict(
        {f"teacher.{name}": value for name, value in old.items()} | {"teacher._extra_state": {"step": 2}}
    )
    assert teacher.step == 2


def test_number_of_updates_is_an_integer_whatever_a_state_has():
    student = Student()
    teacher = MomentumTeacher(student)
    teacher.step = 2048  # float16 knows no 2049
    state = {name: value.half() for name, value in teacher.state_dict().items()}
    teacher.load_state_dict(state, assign=True)
    student.half()
    teacher.module.unsaved = student.unsaved.clone()
    teacher.update_(student)
    assert teacher.step == 2049


def test_count_starts_at_0_where_memory_is_new():
    teacher = MomentumTeacher(Student().to("meta"))
    teacher.to_empty(device="cpu")
    assert teacher.step == 0
    teacher.step = 3
    teacher.to_empty(device="meta")
    assert teacher.to_empty(device="cpu").step == 0


def test_impossible_number_of_updates_is_refused_and_nothing_changes():
    teacher = MomentumTeacher(Student())
    state = MomentumTeacher(Student()).state_dict() | {"num_updates": torch.tensor(-1)}
    before = everything(teacher)
    with pytest.raises(ValueError, match="num_updates of a state must be at least 0, got -1"):
        teacher.load_state_dict(state)
    assert_same(everything(teacher), before)


def test_count_is_not_read_from_a_device_where_nothing_else_wrote_it(monkeypatch):
    """As on a GPU, where reading would synchronise: only a write by another makes the teacher look again."""
    monkeypatch.setattr(vqssl.teacher, "can_read_without_sync", lambda tensor: False)
    student = Student()
    teacher = MomentumTeacher(student, momentum=0.5, final_momentum=1.0, total_steps=10)
    teacher.update_(student)
    reads = []
    monkeypatch.setattr(torch.Tensor, "__int__", lambda tensor: reads.append(tensor) or tensor.item())
    teacher.update_(student)
    teacher.update_(student)
    assert not reads
    teacher.num_updates.fill_(8)
    teacher.update_(student)
    assert len(reads) == 1
    assert teacher.step == 9
    for other in (copy.deepcopy(teacher), pickle.loads(pickle.dumps(teacher))):
        other.update_(student)
        assert other.step == 10


def test_momenta_are_plain_floats():
    teacher = MomentumTeacher(Student(), momentum=np.float64(0.9), final_momentum=1)
    assert [type(m) for m in (teacher.momentum, teacher.final_momentum, teacher.momentum_at(0))] == [float] * 3


# ---- wrapped students ----


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def wrappers():
    def compiled(module):
        return torch.compile(module, backend="eager")

    return {
        "DistributedDataParallel": DistributedDataParallel,
        "compile": compiled,
        "compile of DDP": lambda module: compiled(DistributedDataParallel(module)),
        "DDP of compile": lambda module: DistributedDataParallel(compiled(module)),
    }


@pytest.mark.parametrize("wrap", wrappers().values(), ids=wrappers())
@pytest.mark.usefixtures("one_process")
def test_wrapped_student_equals_its_module(wrap):
    student = Student()
    wrapped = wrap(student)
    teacher, plain = MomentumTeacher(wrapped, momentum=0.9), MomentumTeacher(student, momentum=0.9)
    assert type(teacher.module) is Student
    assert_same(everything(teacher.module), everything(plain.module))
    assert teacher.state_dict().keys() == plain.state_dict().keys()
    wrapped(batch()).sum().backward()
    torch.optim.SGD(wrapped.parameters(), lr=0.1).step()
    teacher.update_(wrapped)
    plain.update_(student)
    assert not teacher.module.head.weight.equal(student.head.weight)
    assert_same(everything(teacher.module), everything(plain.module))
    # Each may follow the other form: a run may be resumed without its wrapper.
    teacher.update_(student)
    plain.update_(wrapped)
    assert_same(everything(teacher.module), everything(plain.module))


def test_student_with_a_compiled_part():
    student = Student()
    fresh = copy.deepcopy(student.encoder)
    student.encoder = torch.compile(student.encoder, backend="eager")
    teacher = MomentumTeacher(student.eval(), momentum=0.9).eval()
    x = batch()
    before = teacher(x)
    assert before.equal(student(x))
    disturb(student)
    assert teacher(x).equal(before)
    teacher.update_(student)
    assert not teacher(x).equal(before)
    # Its weights have their own names, not those of the wrapper.
    fresh.load_state_dict(teacher.backbone_state_dict("encoder"))
    found, expected = fresh.state_dict().values(), teacher.module.encoder.state_dict().values()
    assert all(a.equal(b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("buffers", ["ema", "copy"])
def test_infinities_in_a_buffer_stay(buffers):
    """The average of two infinities, as in a causal mask, would be NaN."""
    student = Student()
    student.register_buffer("mask", torch.full((3, 3), float("-inf")).triu(1), persistent=False)
    teacher = MomentumTeacher(student, buffers=buffers)
    for _ in range(3):
        teacher.update_(student)
    assert teacher.module.mask.equal(student.mask)


def test_teacher_compiles_to_one_graph():
    student = Student().eval()
    teacher = MomentumTeacher(student).eval()
    x = batch()
    assert torch.compile(teacher, fullgraph=True, backend="eager")(x).equal(student(x).detach())


# ---- the backbone ----


@pytest.mark.parametrize("name", ["", "encoder", "encoder.1", "head"])
def test_backbone_state_loads_strictly_into_the_part(name):
    student = Student()
    teacher = MomentumTeacher(student)
    disturb(teacher.module)
    state = teacher.backbone_state_dict(name)
    part = Student().get_submodule(name)
    part.load_state_dict(state, strict=True)
    assert_same(dict(part.state_dict()), dict(teacher.module.get_submodule(name).state_dict()))
    # Copies: changing them does not change the teacher.
    before = everything(teacher.module)
    for tensor in state.values():
        assert not tensor.requires_grad
        tensor.zero_()
    assert_same(everything(teacher.module), before)


@pytest.mark.parametrize("name", ["backbone", "encoder.9", "head.weight"])
def test_backbone_of_an_unknown_name_is_refused(name):
    with pytest.raises(ValueError, match=f"got '{name}': it has 'encoder', 'head'"):
        MomentumTeacher(Student()).backbone_state_dict(name)


def test_backbone_of_a_student_without_submodules_is_refused():
    with pytest.raises(ValueError, match="got 'encoder': it has none: leave name out"):
        MomentumTeacher(nn.Linear(2, 2)).backbone_state_dict("encoder")


# ---- errors ----


def test_state_of_another_student_is_refused_and_nothing_changes():
    teacher, other = (MomentumTeacher(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, d))) for d in (3, 4))
    other.step = 5
    before = everything(teacher.module)
    with pytest.raises(ValueError, match=r"module.1.weight \(3, 2\), got \(4, 2\)"):
        teacher.load_state_dict(other.state_dict())
    assert_same(everything(teacher.module), before)
    assert teacher.step == 0


@pytest.mark.parametrize(
    ("error", "says", "arguments"),
    [
        (TypeError, "student must be a torch.nn.Module, got function", {"student": lambda x: x}),
        (ValueError, "ReLU has none", {"student": nn.ReLU()}),
        (ValueError, "weight the first: run one batch", {"student": nn.LazyLinear(3)}),
        (ValueError, "momentum must be from 0 to 1", {"momentum": 1.5}),
        (ValueError, "momentum must be from 0 to 1", {"momentum": math.nan}),
        (TypeError, "momentum must be a number", {"momentum": "0.9"}),
        (ValueError, "final_momentum must be from 0 to 1", {"final_momentum": -0.1}),
        (ValueError, "total_steps must be at least 0", {"total_steps": -1}),
        (TypeError, "copy must be a torch.nn.Module, got function", {"copy": lambda x: x}),
        (ValueError, r"parameter .weight. is \(3, 2\) and the student.s is \(2, 2\)", {"copy": nn.Linear(2, 3)}),
        (TypeError, "total_steps must be an int", {"total_steps": 1.5}),
        (ValueError, "buffers must be one of 'ema', 'copy', 'own'", {"buffers": "none"}),
        (TypeError, r"buffers must be a name \('ema', .*got None", {"buffers": None}),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_wrong_options_are_refused(error, says, arguments):
    with pytest.raises(error, match=says):
        MomentumTeacher(**{"student": nn.Linear(2, 2), **arguments})


def narrower():
    other = Student()
    other.head = nn.Linear(4, 1)
    return other


def fewer():
    other = Student()
    other.head = nn.Identity()
    return other


def more():
    other = Student()
    other.extra = nn.Linear(2, 2)
    return other


def without_buffer():
    other = Student()
    del other.centre
    other.centre = 0.0
    return other


def wider_buffer():
    other = Student()
    other.centre = torch.zeros(3)
    return other


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    ("student", "says"),
    [
        (narrower, r"parameter 'head.weight' is \(1, 4\) and the teacher's is \(2, 4\)"),
        (fewer, r"parameter 'head.weight' is none"),
        (more, r"parameter 'extra.weight' is \(2, 2\) and the teacher's is none"),
        (without_buffer, r"buffer 'centre' is none"),
        (wider_buffer, r"buffer 'centre' is \(3,\)"),
    ],
)
def test_update_with_another_student_is_refused_and_nothing_changes(student, says, policy):
    teacher = MomentumTeacher(Student(), momentum=0.5, buffers=policy)
    teacher.update_(Student())
    before = everything(teacher.module)
    with pytest.raises(ValueError, match=says):
        teacher.update_(student())
    assert_same(everything(teacher.module), before)
    assert teacher.step == 1


def test_update_with_parameters_instead_of_a_module_is_refused():
    teacher = MomentumTeacher(Student())
    with pytest.raises(TypeError, match=r"student must be a torch\.nn\.Module, got generator"):
        teacher.update_(Student().parameters())


@pytest.mark.parametrize("total_steps", [None, 10])
@pytest.mark.parametrize(("error", "step"), [(ValueError, -1), (TypeError, 1.5), (TypeError, "1")])
def test_wrong_step_is_refused_and_nothing_changes(error, step, total_steps):
    student = Student()
    teacher = MomentumTeacher(student, momentum=0.5, total_steps=total_steps)
    before = everything(teacher.module)
    disturb(student)
    with pytest.raises(error):
        teacher.update_(student, step=step)
    assert_same(everything(teacher.module), before)
    assert teacher.step == 0


def test_repr_has_momentum_and_buffers():
    student = nn.Linear(2, 2)
    assert "momentum=0.9, buffers='copy'" in repr(MomentumTeacher(student, momentum=0.9, buffers="copy"))
    assert "momentum=0.996..1 over 10 steps, buffers='ema'" in repr(MomentumTeacher(student, total_steps=10))


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_student_with_weight_norm_is_copied_before_and_after_a_backward_pass():
    """DINO's heads have weight_norm, which keeps its result as an attribute with a graph."""
    student, halfway = (nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 4, bias=False)), nn.ReLU()) for _ in range(2))
    halfway.load_state_dict(student.state_dict())
    x = torch.randn(5, 3)
    for _ in range(2):
        teacher = MomentumTeacher(student, momentum=0.5)
        torch.testing.assert_close(teacher(x), student(x).detach())
        student(x).sum().backward()
    with torch.no_grad():
        student[0].weight_g.mul_(3)
        halfway[0].weight_g.mul_(2)
    teacher.update_(student)
    torch.testing.assert_close(teacher(x), halfway(x).detach())
    assert student[0].weight_g.grad is not None
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


class Keeping(nn.Module):
    """A module that keeps a tensor beside its parameter."""

    def __init__(self, keep):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 3))
        self.kept = keep(self.weight)

    def forward(self, x):
        return x @ self.weight.T


def test_view_of_a_parameter_gives_a_warning():
    with pytest.warns(UserWarning, match=r"keeps 1\.kept, a view of 1\.weight\. .* make it a property") as caught:
        MomentumTeacher(nn.Sequential(nn.Linear(3, 3), Keeping(lambda weight: weight.view(-1))))
    assert caught[0].filename == __file__
    # Another tensor with a graph, such as the features of the last step, gives none.
    student = Keeping(lambda weight: weight * 2)
    teacher = MomentumTeacher(student)
    torch.testing.assert_close(teacher.module.kept, student.kept.detach())
    assert not teacher.module.kept.requires_grad


@pytest.mark.parametrize("keep", [lambda weight: [weight * 2], lambda weight: {"a": weight.sum()}])
def test_graphs_in_containers_are_refused(keep):
    with pytest.raises(ValueError, match=r"deepcopy can copy, got Keeping .*: keep no tensors with a graph in lists"):
        MomentumTeacher(Keeping(keep))


def test_other_errors_of_copying_are_not_replaced():
    class Large(nn.Linear):
        def __deepcopy__(self, memo):
            raise torch.OutOfMemoryError("no memory")

    with pytest.raises(torch.OutOfMemoryError):
        MomentumTeacher(Large(2, 2))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_teacher_in_float8_follows(dtype):
    student = nn.Linear(8, 8)
    teacher = MomentumTeacher(student.to(dtype), momentum=0.99)
    start, target = teacher.module.weight.float(), torch.ones(8, 8)
    for parameter in student.parameters():
        parameter.data.copy_(torch.ones_like(parameter, dtype=torch.float32))
    for _ in range(100):
        teacher.update_(student)
    closed = ((teacher.module.weight.float() - start) / (target - start)).mean().item()
    assert teacher.module.weight.dtype == dtype
    assert closed == pytest.approx(1 - 0.99**100, abs=0.05)


def test_misspelt_buffer_is_refused():
    with pytest.raises(ValueError, match="buffers must name buffers of the student, got 'center'"):
        MomentumTeacher(nn.BatchNorm1d(3), buffers=ema_buffers("center"))
    MomentumTeacher(nn.BatchNorm1d(3), buffers=ema_buffers("running_var"))
