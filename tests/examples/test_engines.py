"""On two ranks Lightning and Accelerate train the drop-in model to the bits of a loop by hand."""

import math

import pytest
import torch

from tests.examples.engines import STEPS
from tests.foreign_libraries import run_beside
from tests.laws import assert_same_bits

pytestmark = pytest.mark.thorough


@pytest.fixture(scope="module")
def found(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("engines")
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tests.examples.engines")
    _, errors = run_beside(request.config.cache, *launcher, str(folder))
    assert (folder / "rank1.pt").exists(), errors[-3000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("engine", ["by_hand", "with_accelerate", "with_lightning"])
def test_teacher_codes_and_weights_are_equal_on_both_ranks(found, engine):
    first, second = (rank[engine]["state"] for rank in found)
    shared = [name for name in first if "running_" not in name]  # of BatchNorm in the student: its own on each rank
    assert_same_bits({name: first[name] for name in shared}, {name: second[name] for name in shared})
    teacher = {name: value for name, value in first.items() if name.startswith("teacher.")}
    assert_same_bits(teacher, {name: second[name] for name in teacher})
    assert teacher["teacher.num_updates"].item() == STEPS
    updates = {value.item() for name, value in first.items() if name.startswith("quantizer") and "num_updates" in name}
    assert updates == {STEPS}


@pytest.mark.parametrize("engine", ["with_accelerate", "with_lightning"])
def test_engine_trains_to_the_bits_of_a_loop_by_hand(found, engine):
    for rank in found:
        assert rank[engine]["ranks"] == 2
        assert rank[engine]["losses"] == rank["by_hand"]["losses"]
        assert_same_bits(rank[engine]["state"], rank["by_hand"]["state"])


def test_each_rank_trains_on_its_own_half(found):
    losses = [rank["by_hand"]["losses"] for rank in found]
    assert all(map(math.isfinite, losses[0] + losses[1]))
    assert len(losses[0]) == STEPS
    assert losses[0] != losses[1]
    assert sum(losses[0][-3:]) < sum(losses[0][:3])
