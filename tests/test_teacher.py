"""MomentumTeacher: the copy, the update, buffer policies, the schedule, wrapped students, errors."""

import copy
import gc
import io
import math
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
from vqssl import MomentumTeacher
from vqssl.functional import BUFFER_POLICIES, cosine_momentum
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
            if name in parameters or (policy == "ema" and tensor.is_floating_point()):
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
    floating = {name for name, tensor in kept.items() if tensor.is_floating_point()}
    found = everything(teacher.module)
    assert_same({name: found[name] for name in floating}, {name: kept[name] for name in floating})


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
    # AveragedModel averages integers too, with rounding; the teacher copies them.
    compared = [name for name, tensor in expected.items() if tensor.is_floating_point() or policy == "copy"]
    assert len(compared) >= 11
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_teacher_of_a_half_precision_student(dtype):
    student = Student().to(dtype)
    teacher = MomentumTeacher(student, momentum=0.5)
    assert {t.dtype for t in teacher.parameters()} == {dtype}
    before = everything(teacher.module)
    disturb(student)
    teacher.update_(student)
    found = everything(teacher.module)
    for name, tensor in everything(student).items():
        if tensor.is_floating_point():
            exact = slow_ema(before[name], tensor, 0.5)
            torch.testing.assert_close(found[name].double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-3)


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
            exact = slow_ema(before[name], tensor, 0.9)
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


@pytest.mark.parametrize(
    ("policy", "averaged"),
    [
        ("ema", ["encoder.1.running_mean", "encoder.1.running_var", "centre", "unsaved"]),
        ("copy", ["encoder.1.running_mean", "encoder.1.running_var", "centre", "unsaved"]),
        ("own", []),
        (follow_means, ["encoder.1.running_mean", "centre"]),
    ],
)
def test_floating_buffers_that_the_policy_changes_are_averaged_over_ranks(policy, averaged, monkeypatch):
    student = Student()
    teacher = MomentumTeacher(student, buffers=policy)
    names = {id(buffer): name for name, buffer in teacher.module.named_buffers()}
    seen = []
    monkeypatch.setattr(
        vqssl.teacher, "all_reduce_mean_", lambda tensors, group: seen.extend(names[id(tensor)] for tensor in tensors)
    )
    teacher.update_(student)
    assert sorted(seen) == sorted(averaged)


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
    teacher.update_(student, step=10)  # momentum 1: nothing but the counter moves
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
        (ValueError, "total_steps must be at least 1", {"total_steps": 0}),
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
