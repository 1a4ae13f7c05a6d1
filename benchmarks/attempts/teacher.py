"""Teachers of unusual students."""

import copy
import io

import torch
from torch import nn

import vqssl
from benchmarks.attempts.attempt import Outcome, attempt


def _gap_closed(dtype: torch.dtype) -> Outcome:
    torch.manual_seed(0)
    student = torch.nn.Linear(64, 64).to(dtype)
    teacher = vqssl.MomentumTeacher(student, momentum=0.996)
    weight = teacher.module.get_parameter("weight")
    start = weight.float().clone()
    with torch.no_grad():
        student.weight.mul_(1.1)
    for _ in range(500):
        teacher.update_(student)
    closed = ((weight.float() - start).norm() / (student.weight.float() - start).norm()).item()
    right = 1 - 0.996**500
    return Outcome(abs(closed - right) < 0.05 * right, f"{closed:.1%} of the gap closed")


@attempt("a bfloat16 student moves once, momentum 0.996, 500 updates", right="86.5% of the gap is closed")
def bfloat16_student() -> Outcome:
    return _gap_closed(torch.bfloat16)


@attempt("a float16 student moves once, momentum 0.996, 500 updates", right="86.5% of the gap is closed")
def float16_student() -> Outcome:
    return _gap_closed(torch.float16)


@attempt("model.bfloat16() on a module that holds a float32 teacher", right="86.5% of the gap is closed")
def cast_of_the_whole_model() -> Outcome:
    torch.manual_seed(0)
    student = torch.nn.Linear(64, 64)
    teacher = vqssl.MomentumTeacher(student, momentum=0.996)
    nn.ModuleDict({"student": student, "teacher": teacher}).bfloat16()
    weight = teacher.module.get_parameter("weight")
    start = weight.float().clone()
    with torch.no_grad():
        student.weight.mul_(1.1)
    for _ in range(500):
        teacher.update_(student)
    closed = ((weight.float() - start).norm() / (student.weight.float() - start).norm()).item()
    return Outcome(abs(closed - 0.865) < 0.04, f"{closed:.1%} of the gap closed")


@attempt(
    "a student of 20 layers with spectral norm, teacher in eval mode",
    right="norms of the teacher's layers multiply to 1",
)
def spectral_norm() -> Outcome:
    torch.manual_seed(0)
    layers = [nn.utils.parametrizations.spectral_norm(nn.Linear(32, 32)) for _ in range(20)]
    student = nn.Sequential(*layers)
    teacher = vqssl.MomentumTeacher(student, momentum=0.996).eval()
    optimizer = torch.optim.Adam(student.parameters(), 1e-3)
    for _ in range(300):
        x = torch.randn(32, 32)
        optimizer.zero_grad()
        (student(x) - x.roll(1, -1)).square().mean().backward()
        optimizer.step()
        teacher.update_(student)
    product = 1.0
    for layer in teacher.module.children():
        product *= torch.linalg.matrix_norm(layer.weight, 2).item()
    return Outcome(0.8 < product < 1.25, f"norms multiply to {product:.2f}")


@attempt(
    "a codebook in the student, teacher in eval mode, 30 updates",
    right="its error is at most three times the student's",
)
def codebook_in_the_student() -> Outcome:
    torch.manual_seed(0)
    centres = 5 * torch.randn(32, 8) + 20
    linear, codebook = nn.Linear(8, 8), vqssl.EMACodebook(codebook_size=64, dim=8)
    nn.init.eye_(linear.weight)
    nn.init.zeros_(linear.bias)
    student = nn.Sequential(linear, codebook)
    teacher = vqssl.MomentumTeacher(student).eval()
    for _ in range(30):
        student(centres[torch.randint(32, (512,))] + 0.1 * torch.randn(512, 8))
        teacher.update_(student)
    x = centres[torch.randint(32, (512,))] + 0.1 * torch.randn(512, 8)
    ours, theirs = (copy.deepcopy(each).eval()(x).commitment_loss.item() for each in (teacher, student))
    return Outcome(ours < 3 * theirs, f"error {ours:.3f}, the student's {theirs:.3f}")


@attempt("every entry of a model's state dict is asked for its dtype", right="all are tensors")
def state_entries_are_tensors() -> Outcome:
    state = nn.ModuleDict({"teacher": vqssl.MomentumTeacher(nn.Linear(2, 2), total_steps=9)}).state_dict()
    others = [name for name, value in state.items() if not isinstance(value, torch.Tensor)]
    return Outcome(not others, f"{len(others)} entries are no tensors")


@attempt("a teacher's state with its count of updates missing, strict=False", right="the count stays")
def count_missing() -> Outcome:
    teacher = vqssl.MomentumTeacher(nn.Linear(2, 2))
    teacher.step = 7
    state = {name: value for name, value in teacher.state_dict().items() if name.startswith("module.")}
    teacher.load_state_dict(state, strict=False)
    return Outcome(teacher.step == 7, f"step {teacher.step}")


@attempt("a bfloat16 teacher is saved, loaded and trained on", right="equal to the bit to one that was not")
def half_teacher_resumes() -> Outcome:
    torch.manual_seed(0)
    student = nn.Linear(16, 16).bfloat16()
    teacher, resumed = (vqssl.MomentumTeacher(student, momentum=0.99) for _ in range(2))
    for step in range(40):
        with torch.no_grad():
            student.weight.add_(0.1 * torch.randn_like(student.weight))
        teacher.update_(student)
        if step < 20:
            file = io.BytesIO()
            torch.save(teacher.state_dict(), file)
            file.seek(0)
            resumed.load_state_dict(torch.load(file, weights_only=True))
        else:
            resumed.update_(student)
    same = torch.equal(resumed.module.get_parameter("weight"), teacher.module.get_parameter("weight"))
    moved = not torch.equal(teacher.module.get_parameter("weight"), student.weight)
    return Outcome(same and moved, "equal" if same else "other weights")
