"""Two ranks against one process on the joined batch, over gloo: real processes, started once for all checks.

The ranks run every case and hand back what they saw; the tests compare. A rank that hangs in a collective that the
other never enters ends in gloo's timeout, and the tests fail.
"""

import datetime
import functools

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.laws import assert_differs, assert_same_bits, state_of
from vqssl import BatchRevival, EMACodebook, KMeansInit, MultiScaleQuantizer

RANKS = 2
STEPS = 20
DIM = 4
TIMEOUT = datetime.timedelta(seconds=60)


# ---- material: the same on every rank, without the global generator ----


def tokens(rank, step, count, dim=DIM, dtype=torch.float32):
    """Clusters that move on every few steps, so that codes die."""
    generator = torch.Generator().manual_seed(10_000 * rank + step)
    centres = 3 * torch.randn(6, dim, generator=torch.Generator().manual_seed(step // 4), dtype=torch.float64)
    choice = torch.randint(6, (count,), generator=generator)
    return (centres[choice] + 0.1 * torch.randn(count, dim, generator=generator, dtype=torch.float64)).to(dtype)


def equal_batches(rank, step, dtype):
    return tokens(rank, step, 48, dtype=dtype), None


def uneven_batches(rank, step, dtype):
    """Other counts on each rank and at each step; a rank with nothing, by turns; once neither has anything."""
    count = [30 + 7 * rank, 11 + 40 * rank, 0 if rank else 64, 64 if rank else 0, 0][step % 5]
    return tokens(rank, step, count, dtype=dtype), None


def masked_batches(rank, step, dtype):
    x = tokens(rank, step, 60, dtype=dtype)
    mask = torch.rand(60, generator=torch.Generator().manual_seed(7 * step + rank)) < 0.5
    if step % 3 == 0:
        mask[:] = step % 2 != rank  # one rank fully masked, the other not at all
    if step == 10:
        mask[:] = False
    x[~mask] = float("nan")
    return x, mask


def junk_batches(rank, step, dtype):
    x = tokens(rank, step, 50, dtype=dtype)
    x[rank :: 3 + rank, step % DIM] = [float("nan"), float("inf")][step % 2]
    if step % 4 == 3 and rank == 0:
        x[:] = float("nan")
    return x, None


BATCHES = {
    "equal": equal_batches,
    "uneven": uneven_batches,
    "masked": masked_batches,
    "junk": junk_batches,
}
OPTIONS = {
    "k-means": {"initialization": KMeansInit(5)},
    "sample": {},
    "cosine k-means": {"metric": "cosine", "initialization": KMeansInit(5)},
    "batch mean": {"ema": "batch_mean"},
}
DTYPES = {"float32": torch.float32, "float64": torch.float64}
# Every kind of batch with every option in float64, where only a wrong sum can differ; float32 with the default.
CASES = [(batches, options, "float64") for batches in BATCHES for options in OPTIONS]
CASES += [(batches, "k-means", "float32") for batches in BATCHES]
TOLERANCE = {"float32": 2e-5, "float64": 1e-11}  # sums are added in another order


def make_codebook(options, dtype, **more):
    return EMACodebook(
        codebook_size=10,
        dim=DIM,
        **{"decay": 0.6, "revival": BatchRevival(0.3), "dtype": DTYPES[dtype], **OPTIONS[options], **more},
    )


def run(codebook, batch_of, steps=STEPS):
    seen = []
    for step in range(steps):
        out = codebook(*batch_of(step))
        seen.append((out.quantized, out.indices, state_of(codebook)))
    return seen


# ---- pyramids ----

SHAPES = [(5, 3), (7,)]
FORMS = {"apart": {}, "shared": {"shared": True}, "shared without draws": {"shared": True, "revival": None}}


def features(rank, step):
    """Two maps with as many images as the step and the rank say, channels last; the second scale has a mask."""
    images = [2, 3, 1 + 2 * rank, 0 if rank else 4][step % 4]
    maps = [
        tokens(rank + 20 * (scale + 1), step, images * torch.Size(shape).numel(), dtype=torch.float64).reshape(
            images, *shape, DIM
        )
        for scale, shape in enumerate(SHAPES)
    ]
    mask = torch.rand(images, *SHAPES[1], generator=torch.Generator().manual_seed(step + 99 * rank)) < 0.7
    return maps, [None, mask]


def make_pyramid(form):
    torch.manual_seed(5)  # of the projections
    options = {"decay": 0.6, "revival": BatchRevival(0.3), "dtype": torch.float64, **FORMS[form]}
    quantizer = MultiScaleQuantizer([DIM] * len(SHAPES), codebook_size=10, dim=DIM, channels_last=True, **options)
    if form == "shared without draws":
        quantizer.codebook(0).set_codes_(tokens(77, 0, 10, dtype=torch.float64))
    return quantizer


def run_pyramid(quantizer, batch_of):
    seen = []
    for step in range(STEPS):
        out = quantizer(*batch_of(step))
        seen.append((list(out.quantized), list(out.indices), state_of(quantizer)))
    return seen


# ---- the ranks ----


def refusal(function):
    try:
        function()
    except ValueError as error:
        return str(error)
    return None


def too_few(rank, step):
    return tokens(rank, step, 4), None


def work(rank, folder):
    """What one rank does; saved for the tests to compare."""
    torch.set_num_threads(1)
    # Built before there are ranks: they must be found at call time.
    early = make_codebook("k-means", "float32")
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS, timeout=TIMEOUT
    )
    found = {"early": run(early, lambda step: equal_batches(rank, step, torch.float32))}
    for batches, options, dtype in CASES:
        batch_of = functools.partial(BATCHES[batches], rank, dtype=DTYPES[dtype])
        found[batches, options, dtype] = run(make_codebook(options, dtype), batch_of)
    for form in FORMS:
        found[form] = run_pyramid(make_pyramid(form), functools.partial(features, rank))

    # Alone in a group of its own, each rank goes its own way.
    own = [dist.new_group([r]) for r in range(RANKS)]
    alone = make_codebook("k-means", "float32", process_group=own[rank])
    found["alone"] = run(alone, lambda step: equal_batches(rank, step, torch.float32))
    # In a group of all, they go together.
    together = make_codebook("k-means", "float32", process_group=dist.new_group(list(range(RANKS))))
    found["together"] = run(together, lambda step: equal_batches(rank, step, torch.float32))
    foreign = make_codebook("k-means", "float32", process_group=own[1 - rank])
    found["foreign"] = refusal(lambda: foreign(tokens(rank, 0, 40)))

    # A refusal is the same on all ranks, and leaves them able to go on: 8 tokens for 10 codes; 16 are enough.
    few = make_codebook("k-means", "float32")
    before = state_of(few)
    found["few"] = refusal(lambda: few(*too_few(rank, 0)))
    found["few state"] = before, state_of(few)
    found["few after"] = run(few, lambda step: (tokens(rank, step, 8), None), steps=3)

    torch.save(found, f"{folder}/rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    context = mp.start_processes(work, args=(str(folder),), nprocs=RANKS, join=False, start_method="spawn")
    try:
        deadline = datetime.datetime.now() + datetime.timedelta(seconds=240)
        while not context.join(timeout=5):
            assert datetime.datetime.now() < deadline, "the ranks hang"
    finally:
        for process in context.processes:
            process.kill()
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(RANKS)]


def assert_ranks_agree(ranks, case):
    """Bit for bit, at every step."""
    for (_, _, first), *others in zip(*(found[case] for found in ranks), strict=True):
        for _, _, state in others:
            assert_same_bits(state, first)


def assert_is_one_process(ranks, case, single, tolerance):
    """`single` is a run on the joined batches; what the ranks saw are its parts, one after the other."""
    for step, (quantized, indices, state) in enumerate(single):
        parts = [found[case][step] for found in ranks]
        assert torch.equal(torch.cat([part[1] for part in parts]), indices), f"step {step}"
        torch.testing.assert_close(
            torch.cat([part[0] for part in parts]), quantized, rtol=tolerance, atol=tolerance, equal_nan=True
        )
        for name, value in state.items():
            torch.testing.assert_close(parts[0][2][name], value, rtol=tolerance, atol=tolerance)


def joined(batches, step, dtype):
    parts = [batches(rank, step, dtype) for rank in range(RANKS)]
    masks = [mask for _, mask in parts if mask is not None]
    return torch.cat([x for x, _ in parts]), torch.cat(masks) if masks else None


@pytest.mark.parametrize(("batches", "options", "dtype"), CASES)
def test_ranks_are_one_process(ranks, batches, options, dtype):
    single = run(make_codebook(options, dtype), lambda step: joined(BATCHES[batches], step, DTYPES[dtype]))
    assert_ranks_agree(ranks, (batches, options, dtype))
    assert_is_one_process(ranks, (batches, options, dtype), single, TOLERANCE[dtype])
    # Revival had work to do, or the equality above says little about it.
    unrevived = make_codebook(options, dtype, revival=None)
    run(unrevived, lambda step: joined(BATCHES[batches], step, DTYPES[dtype]))
    assert_differs(state_of(unrevived), single[-1][2])


def test_a_module_built_before_the_ranks_met(ranks):
    assert_ranks_agree(ranks, "early")
    single = run(make_codebook("k-means", "float32"), lambda step: joined(equal_batches, step, torch.float32))
    assert_is_one_process(ranks, "early", single, TOLERANCE["float32"])


def test_the_process_group_is_honoured(ranks):
    for rank, found in enumerate(ranks):
        lone = run(
            make_codebook("k-means", "float32"),
            lambda step, rank=rank: equal_batches(rank, step, torch.float32),
        )
        for (_, k, state), (_, expected_k, expected) in zip(found["alone"], lone, strict=True):
            assert_same_bits(k, expected_k)
            assert_same_bits(state, expected)
    assert_differs(ranks[0]["alone"][-1][2], ranks[1]["alone"][-1][2])
    for a, b in zip(ranks[0]["together"], ranks[0]["equal", "k-means", "float32"], strict=True):
        assert_same_bits(a[2], b[2])
    assert_ranks_agree(ranks, "together")


def test_a_group_without_this_rank_is_refused(ranks):
    for found in ranks:
        assert found["foreign"] is not None
        assert "this process is not in the process_group" in found["foreign"]


def test_a_refusal_is_the_same_on_all_ranks(ranks):
    assert "got 8 valid tokens" in ranks[0]["few"]
    assert ranks[0]["few"] == ranks[1]["few"]
    for found in ranks:
        assert_same_bits(*found["few state"])
    assert_ranks_agree(ranks, "few after")


# ---- pyramids ----


def joined_features(step):
    parts = [features(rank, step) for rank in range(RANKS)]
    maps = [torch.cat(maps) for maps in zip(*(part[0] for part in parts), strict=True)]
    return maps, [None, torch.cat([part[1][1] for part in parts])]


def assert_pyramids_equal(ranks, form, single):
    for step, (quantized, indices, state) in enumerate(single):
        parts = [found[form][step] for found in ranks]
        for scale in range(len(SHAPES)):
            assert torch.equal(torch.cat([part[1][scale] for part in parts]), indices[scale])
            torch.testing.assert_close(
                torch.cat([part[0][scale] for part in parts]), quantized[scale], rtol=1e-11, atol=1e-11
            )
        for name, value in state.items():
            torch.testing.assert_close(parts[0][2][name], value, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("form", FORMS)
def test_ranks_agree_on_a_pyramid(ranks, form):
    assert_ranks_agree(ranks, form)
    assert_differs(ranks[0][form][-1][2], ranks[0][form][0][2])


@pytest.mark.parametrize("form", ["apart", "shared without draws"])
def test_a_pyramid_over_ranks_is_one_process(ranks, form):
    assert_pyramids_equal(ranks, form, run_pyramid(make_pyramid(form), joined_features))


def test_a_shared_pyramid_draws_in_rank_order(ranks):
    """Tokens are numbered rank by rank and, within a rank, scale by scale; one process has no ranks to go by.

    So the draws of a shared codebook are those of one process that is given the tokens in that order.
    """
    quantizer = make_pyramid("shared")
    codebook = quantizer.codebook(0)
    single = []
    for step in range(STEPS):
        rows, keep = [], []
        for rank in range(RANKS):
            maps, (_, mask) = features(rank, step)
            rows += [project(z).reshape(-1, DIM) for project, z in zip(quantizer.projections, maps, strict=True)]
            keep += [torch.ones(maps[0].shape[:-1], dtype=torch.bool).reshape(-1), mask.reshape(-1)]
        x, mask = torch.cat(rows), torch.cat(keep)
        codebook.initialize_(x, mask)
        out = codebook(x, mask)
        sizes = [len(part) for part in rows]
        pieces = list(zip(out.quantized.split(sizes), out.indices.split(sizes), strict=True))
        quantized, indices = [], []
        for scale, shape in enumerate(SHAPES):
            own = [pieces[rank * len(SHAPES) + scale] for rank in range(RANKS)]
            quantized.append(torch.cat([q for q, _ in own]).reshape(-1, *shape, DIM))
            indices.append(torch.cat([k for _, k in own]).reshape(-1, *shape))
        single.append((quantized, indices, state_of(quantizer)))
    assert_pyramids_equal(ranks, "shared", single)
