"""Teachers on two ranks, over gloo: what is loaded on one rank reaches the other, and half precision moves there too.

Real processes, started once for all tests, run every case and save what they saw; the tests compare.
"""

import datetime

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests.rank_processes import run_ranks
from vqssl import MomentumTeacher
from vqssl.functional import ema_buffers

RANKS = 2
TIMEOUT = datetime.timedelta(seconds=60)


class WithPhase(nn.Module):
    """A student with a complex buffer that is a mean."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.register_buffer("phase", torch.zeros(2, dtype=torch.complex64))


def build(dtype=torch.float32):
    """Return student and teacher in one module."""
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)).to(dtype)
    return nn.ModuleDict({"student": student, "teacher": MomentumTeacher(student, momentum=0.9, total_steps=1000)})


def moved(model, steps=10):
    """Return the model after its student has moved and its teacher has followed."""
    with torch.no_grad():
        for parameter in model["student"].parameters():
            parameter.add_(1.0)
    for _ in range(steps):
        model["teacher"].update_(model["student"])
    return model


def whole(state):
    """Return copies of the tensors of a state, gathered where they are sharded."""
    return {name: (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone() for name, t in state.items()}


def trained(dtype):
    """Return a model whose count of updates and averages are not those of a fresh one."""
    model = moved(build(dtype))
    model["teacher"].step = 950
    return model


def loaded_on_rank_0_then_data_parallel(rank):
    state = trained(torch.bfloat16).state_dict()  # on both ranks, because updates are collective
    model = build(torch.bfloat16)
    if rank == 0:
        model.load_state_dict(state)
    DistributedDataParallel(model)
    return whole(moved(model, 3).state_dict())


def loaded_on_rank_0_then_broadcast(rank):
    state = trained(torch.bfloat16).state_dict()
    model = build(torch.bfloat16)
    for part in (model["student"], model["teacher"].module):
        fully_shard(part)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, state if rank == 0 else {}, options=options)
    moved(model, 3)
    return whole(get_model_state_dict(model))


def sharded_half_teacher(rank):
    model = build(torch.bfloat16)
    for part in (model["student"], model["teacher"].module):
        fully_shard(part)
    return whole(moved(model).state_dict())


def sharded_spectral_norm(rank):
    torch.manual_seed(0)
    student = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)))
    teacher = MomentumTeacher(student, momentum=0.5).eval()
    fully_shard(teacher.module)
    with torch.no_grad():
        student[0].parametrizations.weight.original.add_(torch.randn(8, 8))
    for _ in range(100):
        teacher.update_(student)
    original = student[0].parametrizations.weight.original
    u, v = (dict(teacher.module.named_buffers())[f"0.parametrizations.weight.0.{name}"] for name in ("_u", "_v"))
    return {"norm": torch.linalg.matrix_norm(original, 2), "found": u @ original @ v}


def complex_mean(rank):
    student = WithPhase()
    teacher = MomentumTeacher(student, momentum=0.0, buffers=ema_buffers("phase"))
    student.phase.fill_(rank + 2j * rank)
    teacher.update_(student)
    return {"phase": teacher.module.phase}


CASES = (
    loaded_on_rank_0_then_data_parallel,
    loaded_on_rank_0_then_broadcast,
    sharded_half_teacher,
    sharded_spectral_norm,
    complex_mean,
)


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS, timeout=TIMEOUT)
    torch.save({case.__name__: case(rank) for case in CASES}, f"{folder}/rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(work, (str(folder),), RANKS)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(RANKS)]


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].equal(tensor), name


@pytest.mark.parametrize("case", ["loaded_on_rank_0_then_data_parallel", "loaded_on_rank_0_then_broadcast"])
def test_state_that_rank_0_loaded_continues_on_all_ranks(found, case):
    expected = whole(moved(trained(torch.bfloat16), 3).state_dict())
    assert expected["teacher.num_updates"].item() == 953
    for rank in found:
        assert_same(rank[case], expected)


def test_sharded_half_precision_teacher_equals_one_process(found):
    expected = whole(moved(build(torch.bfloat16)).state_dict())
    for rank in found:
        assert_same(rank["sharded_half_teacher"], expected)


def test_spectral_norm_of_a_sharded_teacher_is_that_of_all_its_weights(found):
    for rank in found:
        torch.testing.assert_close(rank["sharded_spectral_norm"]["found"], rank["sharded_spectral_norm"]["norm"])


def test_complex_means_are_averaged_over_ranks(found):
    for rank in found:
        torch.testing.assert_close(rank["complex_mean"]["phase"], torch.full((2,), 0.5 + 1j))
