"""Teachers of unusual students."""

import torch

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
