"""Teachers from lightly checkpoints, for each way to name the momentum branch. With lightly itself: foreign.py."""

import copy
import math
import re

import pytest
import torch
from torch import nn

from tests.laws import assert_same_bits, state_of, through_file
from vqssl import MomentumTeacher
from vqssl.interop import load_lightly_teacher_, momentum_state_from_lightly

# Names of the student's and of the momentum branch's modules in lightly.
STYLES = {
    "examples of BYOL, MoCo": ("{}", "{}_momentum"),
    "examples of DINO, iBOT": ("student_{}", "teacher_{}"),
    "benchmark of BYOL": ("{}", "teacher_{}"),
    "benchmarks of DINO, TiCo": ("student_{}", "{}"),
    "benchmark of MoCo": ("query_{}", "{}"),
    "MSN": ("anchor_{}", "{}"),
    "first releases": ("{}", "momentum_{}"),
}


class Student(nn.Module):
    """A student with lightly's names for its submodules."""

    def __init__(self, width=4):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.ReLU())
        self.projection_head = nn.Sequential(nn.Linear(width, 3), nn.BatchNorm1d(3))

    def forward(self, x):
        return self.projection_head(self.backbone(x).mean((2, 3)))


def lightning_checkpoint(style, steps=3, momentum=0.9):
    """Return the checkpoint of a method like lightly's after a few steps, and its two branches."""
    of_student, of_teacher = STYLES[style]
    method, student = nn.Module(), Student()
    follower = copy.deepcopy(student)
    for name in ("backbone", "projection_head"):
        setattr(method, of_student.format(name), getattr(student, name))
        setattr(method, of_teacher.format(name), getattr(follower, name))
    method.prediction_head = nn.Linear(3, 3)
    method.criterion = nn.Module()
    method.criterion.register_buffer("center", torch.zeros(3))
    for _ in range(steps):
        update_momentum(student, follower, momentum)
        student(torch.randn(6, 1, 8, 8))
        follower(torch.randn(6, 1, 8, 8))
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.add_(torch.randn_like(parameter))
    file = {"epoch": 1, "global_step": steps, "state_dict": method.state_dict(), "hyper_parameters": {"lr": 0.1}}
    return through_file(file), student, follower


def update_momentum(model, follower, m):
    """Move parameters only, as lightly.models.utils.update_momentum does."""
    for theirs, ours in zip(follower.parameters(), model.parameters(), strict=True):
        theirs.data = theirs.data * m + ours.data * (1 - m)


@pytest.mark.parametrize("style", STYLES)
def test_teacher_loads_the_momentum_branch_and_continues(style):
    checkpoint, student, follower = lightning_checkpoint(style)
    teacher = MomentumTeacher(Student(), momentum=0.9, buffers="own")
    load_lightly_teacher_(teacher, checkpoint)
    assert_same_bits(state_of(teacher.module), state_of(follower))
    assert not teacher.module.backbone[0].weight.equal(student.backbone[0].weight)
    assert teacher.step == 3
    update_momentum(student, follower, 0.9)
    teacher.update_(student)
    found, expected = state_of(teacher.module), state_of(follower)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-7)
    assert not any(p.requires_grad for p in teacher.parameters())


def test_schedule_continues_at_their_step():
    n = 20
    checkpoint, _, _ = lightning_checkpoint("benchmark of BYOL", steps=5)
    teacher = MomentumTeacher(Student(), momentum=0.99, final_momentum=1.0, total_steps=n - 1, buffers="own")
    load_lightly_teacher_(teacher, checkpoint)
    theirs = [1.0 - 0.01 * (math.cos(math.pi * t / (n - 1)) + 1) / 2 for t in range(n)]
    assert teacher.momentum_at(teacher.step) == pytest.approx(theirs[5], abs=1e-12)
    assert [teacher.momentum_at(t) for t in range(n)] == pytest.approx(theirs, abs=1e-12)


def test_given_step_takes_precedence_and_a_state_dict_is_enough():
    checkpoint, _, follower = lightning_checkpoint("MSN")
    teacher = MomentumTeacher(Student())
    load_lightly_teacher_(teacher, checkpoint["state_dict"], step=11)
    assert teacher.step == 11
    assert_same_bits(state_of(teacher.module), state_of(follower))
    load_lightly_teacher_(teacher, checkpoint, step=0)
    assert teacher.step == 0


def test_parts_map_other_names():
    """For a student with other names, and for one that is the backbone alone."""
    checkpoint, _, follower = lightning_checkpoint("examples of BYOL, MoCo")
    student = nn.ModuleDict({"encoder": Student().backbone})
    teacher = MomentumTeacher(student)
    load_lightly_teacher_(teacher, checkpoint, parts={"encoder": "backbone_momentum"})
    assert_same_bits(state_of(teacher.module["encoder"]), state_of(follower.backbone))
    alone = MomentumTeacher(Student().backbone)
    load_lightly_teacher_(alone, checkpoint, parts={"": "backbone_momentum."})
    assert_same_bits(state_of(alone.module), state_of(follower.backbone))
    nested = {f"method.{name}": value for name, value in checkpoint["state_dict"].items()}
    load_lightly_teacher_(alone, nested, step=1, parts={"": "method.backbone"})
    assert alone.module[0].weight.equal(checkpoint["state_dict"]["backbone.0.weight"])


def test_parts_select_one_of_several_names_of_a_head():
    """lightly's example of iBOT has one head under three names."""
    checkpoint, _, follower = lightning_checkpoint("examples of DINO, iBOT")
    state = dict(checkpoint["state_dict"])
    state |= {
        name.replace("teacher_projection_head", "teacher_patch_head"): value
        for name, value in state.items()
        if name.startswith("teacher_projection_head")
    }
    teacher = MomentumTeacher(Student())
    with pytest.raises(ValueError, match=r"the student has no 'patch_head\.0\.weight'.*name the wanted ones alone"):
        load_lightly_teacher_(teacher, state, step=0)
    wanted = {"backbone": "teacher_backbone", "projection_head": "teacher_projection_head"}
    load_lightly_teacher_(teacher, state, step=0, parts=wanted)
    assert_same_bits(state_of(teacher.module), state_of(follower))


def test_extra_state_of_the_student_stays():
    class Counting(Student):
        count = 5

        def get_extra_state(self):
            return {"count": self.count}

        def set_extra_state(self, state):
            self.count = state["count"]

    checkpoint, _, follower = lightning_checkpoint("MSN")
    teacher = MomentumTeacher(Counting())
    load_lightly_teacher_(teacher, checkpoint)
    assert teacher.module.count == 5
    assert teacher.module.backbone[0].weight.equal(follower.backbone[0].weight)


def test_momentum_state_equals_the_branchs_state_dict():
    checkpoint, _, follower = lightning_checkpoint("benchmark of MoCo")
    assert_same_bits(momentum_state_from_lightly(checkpoint), dict(follower.state_dict()))


MOMENTUM = {"backbone_momentum.weight": torch.ones(2)}


@pytest.mark.parametrize(
    ("checkpoint", "options", "error", "words"),
    [
        (Student(), {}, TypeError, r"Student itself: write checkpoint.state_dict\(\)"),
        ("last.ckpt", {}, TypeError, "weights_only=True"),
        ({"state_dict": [1]}, {}, TypeError, r"checkpoint\['state_dict'\]"),
        ({"backbone.weight": torch.ones(2)}, {}, ValueError, "got 'backbone': write parts="),
        ({**MOMENTUM, "teacher_head.weight": torch.ones(2)}, {}, ValueError, "'teacher_head' and 'backbone_momentum'"),
        (MOMENTUM, {"parts": {"backbone": "teacher_backbone"}}, ValueError, "it has 'backbone_momentum'"),
        (MOMENTUM, {"parts": "backbone_momentum"}, TypeError, "parts must map"),
        (MOMENTUM, {"step": None}, ValueError, "write step=0"),
        ({"state_dict": MOMENTUM}, {"step": None}, ValueError, "holds no 'global_step'"),
        (MOMENTUM, {"step": -1}, ValueError, "step must be at least 0"),
        (MOMENTUM, {"step": 1.5}, TypeError, "step must be an int, got 1.5"),
        (MOMENTUM, {"step": True}, TypeError, "step must be an int, got True"),
        (MOMENTUM, {}, ValueError, "the branch lacks 'backbone.0.weight'"),
    ],
)
def test_wrong_input_is_refused_and_nothing_changes(checkpoint, options, error, words):
    teacher = MomentumTeacher(Student())
    before = state_of(teacher.module)
    with pytest.raises(error, match=words):
        load_lightly_teacher_(teacher, checkpoint, **{"step": 3, **options})
    assert_same_bits(state_of(teacher.module), before)
    assert teacher.step == 0


@pytest.mark.parametrize("name", ["backbone.1.running_var", "projection_head.0.bias"])
@pytest.mark.parametrize("how", ["missing", "another shape", "extra"])
def test_missing_extra_and_misshapen_tensors_are_refused_and_nothing_changes(name, how):
    checkpoint, _, _ = lightning_checkpoint("examples of DINO, iBOT")
    state, theirs = dict(checkpoint["state_dict"]), "teacher_" + name
    if how == "missing":
        del state[theirs]
        words = f"the branch lacks '{name}'"
    elif how == "another shape":
        state[theirs] = torch.ones(9)
        words = f"'{name}' is"
    else:
        state[theirs + "2"] = torch.ones(9)
        words = f"the student has no '{name}2'"
    teacher = MomentumTeacher(Student())
    before = state_of(teacher.module)
    with pytest.raises(ValueError, match=re.escape(words)):
        load_lightly_teacher_(teacher, state, step=2)
    assert_same_bits(state_of(teacher.module), before)
    assert teacher.step == 0


def test_student_instead_of_teacher_is_refused():
    with pytest.raises(TypeError, match=r"write MomentumTeacher\(student\)"):
        load_lightly_teacher_(Student(), MOMENTUM, step=0)
