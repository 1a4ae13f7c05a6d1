"""Two ranks, and four with --thorough, over gloo equal each other bit for bit, and one process up to rounding.

These are whole training loops and FSDP2; test_distributed.py compares every step of a codebook and of a multi-scale
quantiser.
"""

import functools

import pytest
import torch

from tests.laws import assert_differs
from tests.reliability import ranks
from tests.test_distributed import BATCHES, make_codebook

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.thorough)])
def found(request, tmp_path_factory, thorough_profile):
    return ranks.run(request.param, tmp_path_factory.mktemp("ranks"), 200 if thorough_profile else 20)


@functools.cache
def single(world, kind):
    return ranks.single(world, kind)


# Without SyncBatchNorm, running statistics of trained BatchNorm layers are those of each rank's own images.
OWN = ("student.stages.0.1.running", "student.stages.1.1.running", "fusion.mlp.1.running")


def assert_ranks_agree(found, case, own=()):
    for other in found[1:]:
        off = ranks.differing(found[0][case], other[case])
        assert [name for name in off if not name.startswith(own)] == []


def test_ddp_ranks_stay_bit_equal(found):
    assert_ranks_agree(found, "ddp", OWN)
    assert sum(name.startswith("teacher.") for name in found[0]["ddp"]) > 10
    assert_ranks_agree(found, "ddp common")
    assert all(torch.isfinite(rank["ddp losses"]).all() for rank in found)
    # Each rank had its own batches.
    assert not torch.equal(found[0]["ddp losses"], found[1]["ddp losses"])


@pytest.mark.parametrize("kind", ["euclidean", "cosine"])
def test_ranks_equal_one_process_on_the_joined_batch(found, kind):
    """In float64: ranks only add in another order."""
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


def test_sharded_teacher_equals_whole_teacher(found):
    assert_ranks_agree(found, ("fsdp", "alone"), OWN)
    losses = found[0]["fsdp", "neither", "losses"]
    torch.testing.assert_close(found[0]["fsdp", "alone", "losses"], losses, rtol=1e-4, atol=1e-5)
    for name, tensor in found[0]["fsdp", "neither"].items():
        torch.testing.assert_close(found[0]["fsdp", "alone"][name], tensor, rtol=1e-3, atol=1e-4)


def test_sharded_teacher_with_batch_norm_moves_and_is_saved_whole(found):
    assert_ranks_agree(found, "fsdp batch")
    assert len(found[0]["fsdp moved"]) > 4
    assert all(move > 0 for move in found[0]["fsdp moved"].values())


def test_half_precision_statistics_are_averaged_without_overflow(found):
    assert found[0]["big"].tolist() == [40000.0, 40000.0]


def test_update_in_a_foreign_process_group_is_refused_before_any_change(found):
    for rank in found:
        assert "this process is not in the process_group" in rank["foreign"]
        assert rank["foreign changed"] == ([], 0)


@pytest.mark.parametrize("teacher", ["whole", "sharded"])
def test_teacher_of_a_sharded_student_equals_the_teacher_under_ddp(found, teacher):
    assert_ranks_agree(found, ("fsdp", teacher), OWN)
    for rank in found:
        torch.testing.assert_close(
            rank["fsdp", teacher, "losses"], rank["fsdp", "as ddp", "losses"], rtol=1e-4, atol=1e-5
        )
        for name, tensor in rank["fsdp", "as ddp"].items():
            torch.testing.assert_close(rank["fsdp", teacher][name], tensor, rtol=1e-3, atol=1e-4)


def test_teacher_of_a_sharded_student_must_be_built_first(found):
    assert "build MomentumTeacher(student) first, then shard" in found[0]["sharded first"]


@pytest.mark.parametrize("case", ["codebook", "early"])
def test_uneven_empty_masked_and_nonfinite_batches_equal_one_process(found, case):
    assert_ranks_agree(found, case)
    dtype = torch.float64 if case == "codebook" else torch.float32
    alone = make_codebook("k-means", str(dtype).removeprefix("torch."))
    kinds = list(BATCHES.values())
    for step in range(found[0]["steps"] if case == "codebook" else 20):
        batch_of = kinds[step // 5 % len(kinds)] if case == "codebook" else kinds[0]
        parts = [batch_of(rank, step, dtype) for rank in range(len(found))]
        masks = [torch.ones(len(x), dtype=torch.bool) if mask is None else mask for x, mask in parts]
        alone(torch.cat([x for x, _ in parts]), torch.cat(masks))
    tolerance = 1e-9 if case == "codebook" else 1e-4
    for name, tensor in ranks.everything(alone).items():
        torch.testing.assert_close(found[0][case][name], tensor, rtol=tolerance, atol=tolerance)


def test_all_scales_share_two_all_reduces(found):
    """The first sums the statistics of all scales, the second the replacement candidates of dead codes."""
    scales, codes, dim = 3, 32, 8
    statistics = scales * 4 * (codes * (dim + 1) + 2 * len(found))
    for rank in found:
        assert rank["travels", True] == [statistics, scales * 4 * codes * dim]
        assert rank["travels", False] == [statistics]


def test_counts_beyond_float32_are_exact(found):
    expected = [2**40 + 12345 + rank for rank in range(len(found))]
    assert all(rank["counts"].tolist() == expected for rank in found)
