"""Two and four processes over gloo: equal to the bit among each other, and to rounding with one process.

See test_distributed.py for a codebook's and a pyramid's every step; here are whole training loops, and FSDP2.
"""

import functools

import pytest
import torch

from tests.laws import assert_differs
from tests.reliability import ranks
from tests.test_distributed import BATCHES, make_codebook

pytestmark = pytest.mark.slow
STEPS = 200


@pytest.fixture(scope="module", params=[2, 4])
def found(request, tmp_path_factory):
    return ranks.run(request.param, tmp_path_factory.mktemp("ranks"), STEPS)


@functools.cache
def single(world, kind):
    return ranks.single(world, kind)


# BatchNorm in what is trained sees its own rank's images, as under any DDP without SyncBatchNorm.
OWN = ("student.stages.0.1.running", "student.stages.1.1.running", "fusion.mlp.1.running")


def assert_ranks_agree(found, case, own=()):
    for other in found[1:]:
        off = ranks.differing(found[0][case], other[case])
        assert [name for name in off if not name.startswith(own)] == []


def test_ddp_with_k_means_and_revival_stays_equal_to_the_bit(found):
    assert_ranks_agree(found, "ddp", OWN)
    assert sum(name.startswith("teacher.") for name in found[0]["ddp"]) > 10
    assert_ranks_agree(found, "ddp common")
    assert all(torch.isfinite(rank["ddp losses"]).all() for rank in found)
    # Each rank had batches of its own, or nothing was shown.
    assert not torch.equal(found[0]["ddp losses"], found[1]["ddp losses"])


@pytest.mark.parametrize("kind", ["euclidean", "cosine"])
def test_values_and_gradients_are_those_of_one_process(found, kind):
    """float64: ranks add in another order, nothing else."""
    expected_steps, expected = single(len(found), kind)
    for step, (loss, gradients) in enumerate(expected_steps):
        ours = [rank["parity", kind][0][step] for rank in found]
        mean = torch.stack([loss for loss, _ in ours]).mean()
        torch.testing.assert_close(mean, loss, rtol=1e-9, atol=1e-9)
        for name, gradient in gradients.items():
            torch.testing.assert_close(ours[0][1][name], gradient, rtol=1e-7, atol=1e-9, msg=f"{name}, step {step}")
    for name, tensor in found[0]["parity", kind][1].items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-7, atol=1e-9)
    assert_differs(expected, ranks.everything(ranks.Net("group", metric=kind).double()))


def test_a_sharded_teacher_follows_a_whole_student(found):
    assert_ranks_agree(found, ("fsdp", "alone"), OWN)
    losses = found[0]["fsdp", "neither", "losses"]
    torch.testing.assert_close(found[0]["fsdp", "alone", "losses"], losses, rtol=1e-4, atol=1e-5)
    for name, tensor in found[0]["fsdp", "neither"].items():
        torch.testing.assert_close(found[0]["fsdp", "alone"][name], tensor, rtol=1e-3, atol=1e-4)


def test_a_sharded_teacher_with_batch_norm_is_saved_as_it_is(found):
    assert_ranks_agree(found, "fsdp batch")
    assert len(found[0]["fsdp moved"]) > 4
    assert all(move > 0 for move in found[0]["fsdp moved"].values())


def test_large_statistics_are_averaged(found):
    assert found[0]["big"].tolist() == [40000.0, 40000.0]


def test_a_teacher_of_a_foreign_group_is_refused_and_unchanged(found):
    for rank in found:
        assert "this process is not in the process_group" in rank["foreign"]
        assert rank["foreign changed"] == ([], 0)


@pytest.mark.parametrize("teacher", ["whole", "sharded"])
def test_a_sharded_student_is_followed(found, teacher):
    assert_ranks_agree(found, ("fsdp", teacher), OWN)
    for rank in found:
        torch.testing.assert_close(
            rank["fsdp", teacher, "losses"], rank["fsdp", "as ddp", "losses"], rtol=1e-4, atol=1e-5
        )
        for name, tensor in rank["fsdp", "as ddp"].items():
            torch.testing.assert_close(rank["fsdp", teacher][name], tensor, rtol=1e-3, atol=1e-4)


def test_a_student_that_is_sharded_already_is_refused(found):
    assert "build MomentumTeacher(student) first, then shard" in found[0]["sharded first"]


@pytest.mark.parametrize("case", ["codebook", "early"])
def test_uneven_empty_masked_and_junk_batches(found, case):
    assert_ranks_agree(found, case)
    dtype = torch.float64 if case == "codebook" else torch.float32
    alone = make_codebook("k-means", str(dtype).removeprefix("torch."))
    kinds = list(BATCHES.values())
    for step in range(STEPS if case == "codebook" else 20):
        batch_of = kinds[step // 5 % len(kinds)] if case == "codebook" else kinds[0]
        parts = [batch_of(rank, step, dtype) for rank in range(len(found))]
        masks = [torch.ones(len(x), dtype=torch.bool) if mask is None else mask for x, mask in parts]
        alone(torch.cat([x for x, _ in parts]), torch.cat(masks))
    tolerance = 1e-9 if case == "codebook" else 1e-4
    for name, tensor in ranks.everything(alone).items():
        torch.testing.assert_close(found[0][case][name], tensor, rtol=tolerance, atol=tolerance)


def test_all_scales_travel_together(found):
    """Statistics of all scales in one all-reduce, and what dead codes may become in another."""
    scales, codes, dim = 3, 32, 8
    statistics = scales * 4 * (codes * (dim + 1) + 2 * len(found))
    for rank in found:
        assert rank["travels", True] == [statistics, scales * 4 * codes * dim]
        assert rank["travels", False] == [statistics]


def test_counts_beyond_float32_arrive(found):
    expected = [2**40 + 12345 + rank for rank in range(len(found))]
    assert all(rank["counts"].tolist() == expected for rank in found)
