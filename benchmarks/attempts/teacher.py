"""Teachers of unusual students."""

import copy
import datetime
import io
import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.multiprocessing.spawn import start_processes

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


def _norms_multiply_to_one(student: nn.Module, teacher: vqssl.MomentumTeacher) -> Outcome:
    optimizer = torch.optim.Adam(student.parameters(), 1e-3)
    x, y = torch.randn(256, 32), torch.randn(256, 32)
    for _ in range(300):
        optimizer.zero_grad()
        (30 * student(x) - y).square().mean().backward()
        optimizer.step()
        teacher.update_(student)
    teacher(x)
    product = 1.0
    for layer in teacher.module.children():
        product *= torch.linalg.matrix_norm(layer.weight, 2).item()
    return Outcome(0.9 < product < 1.1, f"norms multiply to {product:.2f}")


@attempt(
    "20 layers with torch's older spectral norm, teacher in eval mode",
    right="norms of the teacher's layers multiply to 1",
)
def older_spectral_norm() -> Outcome:
    torch.manual_seed(0)
    student = nn.Sequential(*[nn.utils.spectral_norm(nn.Linear(32, 32)) for _ in range(20)])
    return _norms_multiply_to_one(student, vqssl.MomentumTeacher(student).eval())


@attempt("update_ of a student with spectral norm under torch.compile(fullgraph=True)", right="it compiles")
def compiled_spectral_norm() -> Outcome:
    student = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)))
    teacher = vqssl.MomentumTeacher(student, total_steps=9)
    torch.compile(teacher.update_, fullgraph=True, backend="eager")(student)
    return Outcome(teacher.step == 1, f"step {teacher.step}")


class _FirstStatistics(nn.Module):
    """A layer that takes its first statistics as they are, and sets a flag."""

    running_mean: torch.Tensor
    initialized: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.register_buffer("running_mean", torch.zeros(3))
        self.register_buffer("initialized", torch.tensor(False))


@attempt("statistics beside a flag that says that they are there", right="flag and statistics of one module agree")
def statistics_beside_a_flag() -> Outcome:
    student = _FirstStatistics()
    teacher = vqssl.MomentumTeacher(student)
    student.running_mean.fill_(50.0)
    student.initialized.fill_(True)
    teacher.update_(student)
    found = dict(teacher.module.named_buffers())
    mean, flag = found["running_mean"].mean().item(), bool(found["initialized"])
    return Outcome(flag and mean == 50.0, f"initialized {flag}, mean {mean:g}")


@attempt("a bfloat16 state is assigned to a float32 teacher", right="a bfloat16 teacher that moves")
def assigned_half_state() -> Outcome:
    student = nn.Linear(8, 8).bfloat16()
    teacher = vqssl.MomentumTeacher(nn.Linear(8, 8))
    teacher.load_state_dict(vqssl.MomentumTeacher(student).state_dict(), assign=True)
    weight = teacher.module.get_parameter("weight")
    start = weight.float().clone()
    with torch.no_grad():
        student.weight.mul_(2)
    for _ in range(500):
        teacher.update_(student)
    closed = ((weight.float() - start).norm() / (student.weight.float() - start).norm()).item()
    return Outcome(weight.dtype == torch.bfloat16 and 0.82 < closed < 0.9, f"{weight.dtype}, {closed:.1%} closed")


@attempt("a float32 teacher's state in a bfloat16 teacher, which is cast back", right="not rounded")
def float32_state_in_a_half_teacher() -> Outcome:
    torch.manual_seed(0)
    wide, narrow = vqssl.MomentumTeacher(nn.Linear(8, 8)), vqssl.MomentumTeacher(nn.Linear(8, 8).bfloat16())
    narrow.load_state_dict(wide.state_dict())
    narrow.float()
    off = (narrow.module.get_parameter("weight") - wide.module.get_parameter("weight")).abs().max().item()
    return Outcome(off == 0, f"off by {off:.1e}")


@attempt(
    "all tensors of a state in float16, 2,048 updates so far, assign=True", right="the next update is number 2,049"
)
def count_in_half_precision() -> Outcome:
    student = nn.Linear(2, 2).half()
    teacher = vqssl.MomentumTeacher(student)
    teacher.step = 2048
    state = {name: value.half() for name, value in teacher.state_dict().items() if isinstance(value, torch.Tensor)}
    teacher.load_state_dict(state, strict=False, assign=True)
    teacher.update_(student)
    return Outcome(teacher.step == 2049, f"step {teacher.step}")


@attempt("an int8 parameter in the student", right="it is copied")
def integer_parameter() -> Outcome:
    student = nn.Linear(2, 2)
    student.register_parameter("levels", nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False))
    teacher = vqssl.MomentumTeacher(student)
    student.get_parameter("levels").data.fill_(5)
    teacher.update_(student)
    found = teacher.module.get_parameter("levels").tolist()
    return Outcome(found == [5, 5, 5], f"{found}")


def _loaded_on_rank_0(rank: int, folder: str) -> None:
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=30),
    )
    torch.manual_seed(0)
    student = nn.Linear(4, 4).bfloat16()
    teacher = vqssl.MomentumTeacher(student, total_steps=1000)
    if rank == 0:
        for _ in range(950):
            teacher.update_(student)
    nn.parallel.DistributedDataParallel(nn.ModuleDict({"student": student, "teacher": teacher}))
    teacher.update_(student)
    Path(folder, f"rank{rank}").write_text(str(teacher.step))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@attempt(
    "a bfloat16 teacher is trained on rank 0 alone, then wrapped for two ranks", right="both ranks count on from 950"
)
def state_on_one_rank() -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        start_processes(_loaded_on_rank_0, (folder,), 2, start_method="spawn")
        steps = [int(Path(folder, f"rank{rank}").read_text()) for rank in range(2)]
    return Outcome(steps == [951, 951], f"steps {steps}")


@attempt("a momentum by position", right="a TypeError that says what to write")
def momentum_by_position() -> Outcome:
    try:
        vqssl.MomentumTeacher(nn.Linear(2, 2), 0.99)  # type: ignore[call-arg]
    except TypeError as error:
        return Outcome("momentum=" in str(error), str(error)[:120])
    return Outcome(survived=False, seen="accepted")
