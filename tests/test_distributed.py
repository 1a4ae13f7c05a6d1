"""Two ranks equal one process on the joined batch, over gloo: real processes, started once for all tests.

The ranks run every case and save what they saw; the tests compare. A rank that waits in a collective which the other
never enters ends in gloo's timeout, and the tests fail.
"""

import contextlib
import datetime
import functools
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from tests.laws import assert_differs, assert_same_bits, correlation, state_of
from tests.rank_processes import run_ranks
from vqssl import (
    BatchRevival,
    EMACodebook,
    KMeansInit,
    MultiScaleQuantizer,
    NoRevival,
    ProductQuantizer,
    ResidualQuantizer,
    fit_codebook,
    update_codebooks,
)
from vqssl.functional import diversity_loss, sinkhorn

RANKS = 2
STEPS = 12
DIM = 4
TIMEOUT = datetime.timedelta(seconds=60)


# ---- batches, without the global generator ----


def tokens(rank, step, count, dim=DIM, dtype=torch.float32):
    """Return clustered tokens whose clusters move on every few steps, so that codes die."""
    generator = torch.Generator().manual_seed(10_000 * rank + step)
    centres = 3 * torch.randn(6, dim, generator=torch.Generator().manual_seed(step // 4), dtype=torch.float64)
    choice = torch.randint(6, (count,), generator=generator)
    return (centres[choice] + 0.1 * torch.randn(count, dim, generator=generator, dtype=torch.float64)).to(dtype)


def equal_batches(rank, step, dtype):
    return tokens(rank, step, 48, dtype=dtype), None


def uneven_batches(rank, step, dtype):
    """Return another count on each rank and at each step: none on one rank in turn, and once none on both."""
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


def batches_with_nan_and_infinities(rank, step, dtype):
    x = tokens(rank, step, 50, dtype=dtype)
    x[rank :: 3 + rank, step % DIM] = [float("nan"), float("inf")][step % 2]
    if step % 4 == 3 and rank == 0:
        x[:] = float("nan")
    return x, None


BATCHES = {
    "equal": equal_batches,
    "uneven": uneven_batches,
    "masked": masked_batches,
    "not finite": batches_with_nan_and_infinities,
}
OPTIONS = {
    "k-means": {"initialization": KMeansInit(5)},
    "sample": {},
    "cosine k-means": {"metric": "cosine", "initialization": KMeansInit(5)},
    "batch mean": {"ema": "batch_mean"},
}
DTYPES = {"float32": torch.float32, "float64": torch.float64}
# In float64, where only a wrong sum can differ. The first codes depend on the kind of batch; metric and EMA rule do not
# see it. Float32 once, with a codebook that was built before the ranks met.
CASES = [(batches, options, "float64") for batches in BATCHES for options in ("k-means", "sample")]
CASES += [("masked", "cosine k-means", "float64"), ("not finite", "cosine k-means", "float64")]
CASES += [("uneven", "batch mean", "float64"), ("equal", "k-means", "float32")]
FUSED = ("uneven", "masked")
"""Batches for the operators of CUDA, which compute the same steps here."""
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


# ---- several codebooks in one update ----

SEVERAL: tuple[dict[str, object], ...] = (
    {},
    {"metric": "cosine", "ema": "batch_mean", "seed": 1},
    {"revival": None, "seed": 2},
    {"metric": correlation, "seed": 3},
)
"""Options of each. The third needs no replacement candidates; the last is frozen in turn."""


@contextlib.contextmanager
def counted_all_reduces():
    """Collect the number of values in every all-reduce within the block."""
    seen, original = [], dist.all_reduce

    def all_reduce(tensor, *arguments, **options):
        seen.append(tensor.numel())
        return original(tensor, *arguments, **options)

    dist.all_reduce = all_reduce
    try:
        yield seen
    finally:
        dist.all_reduce = original


def make_several(groups=(None, None, None, None)):
    return [
        make_codebook("sample", "float64", process_group=group, **options)
        for options, group in zip(SEVERAL, groups, strict=True)
    ]


def run_several(codebooks, batch_of):
    """Update all in one call a step, each with tokens of its own; return states, indices and all-reduces by step."""
    seen = []
    for step in range(STEPS):
        codebooks[-1].freeze(step % 4 == 3)
        batches = [batch_of(number, step) for number in range(len(codebooks))]
        for codebook, (x, mask) in zip(codebooks, batches, strict=True):
            codebook.initialize_(x, mask)
        indices = [codebook.quantize(*batch).indices for codebook, batch in zip(codebooks, batches, strict=True)]
        with counted_all_reduces() as sizes:
            update_codebooks(codebooks, [x for x, _ in batches], indices)
        seen.append(([state_of(codebook) for codebook in codebooks], indices, sizes))
    return seen


def batch_of_several(rank, number, step):
    """Return a batch of another kind for each codebook and step."""
    kinds = [equal_batches, uneven_batches, masked_batches]
    return with_mask(*kinds[(number + step) % len(kinds)](rank, step + 50 * number, torch.float64))


def with_mask(x, mask):
    return x, torch.ones(len(x), dtype=torch.bool) if mask is None else mask


def joined_several(number, step):
    parts = [batch_of_several(rank, number, step) for rank in range(RANKS)]
    return torch.cat([x for x, _ in parts]), torch.cat([mask for _, mask in parts])


# ---- pyramids ----

SHAPES = [(5, 3), (7,)]
FORMS = {
    "one a scale": {},
    "shared": {"shared": True},
    "shared without draws": {"shared": True, "revival": None},
}


def features(rank, step):
    """Return two maps, channels last, and masks; step and rank decide the number of images."""
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


# ---- quantisers of several codes a token ----

MULTI_CODE = {
    "residual": lambda **options: ResidualQuantizer(codebook_size=8, num_levels=3, **options),
    "product": lambda **options: ProductQuantizer(codebook_size=8, num_groups=2, **options),
    "shared product": lambda **options: ProductQuantizer(codebook_size=8, num_groups=2, shared=True, **options),
    "residual with dropout": lambda **options: ResidualQuantizer(
        **{"codebook_size": 8, "num_levels": 3, "level_dropout": 0.8, **options}
    ),
}


def make_multi_code(name, **more):
    options = {"dim": DIM, "decay": 0.6, "revival": BatchRevival(0.3), "dtype": torch.float64, **more}
    return MULTI_CODE[name](**options)


def run_multi_code(quantizer, batch_of):
    seen = []
    for step in range(STEPS):
        with counted_all_reduces() as sizes:
            out = quantizer(*batch_of(step))
        seen.append((out.quantized, out.indices, state_of(quantizer), sizes))
    return seen


# ---- functions over ranks ----


def logits(rank, step):
    """Return logits of two codebooks, and a mask: another number of tokens on each rank and at each step, also none."""
    count = [9, 4 + 7 * rank, 0 if rank else 6, 0][step % 4]
    generator = torch.Generator().manual_seed(100 * rank + step)
    # Of another size on each rank: exponentials of the scores, without care, would overflow on the second.
    x = (1 + 500 * rank) * torch.randn(count, 2, 5, generator=generator, dtype=torch.float64)
    return x, torch.rand(count, generator=generator) < 0.7


def run_functions(inputs_of):
    """Return for each step sinkhorn's codes, both forms of the diversity loss, and gradients of the logits."""
    seen = []
    for step in range(4):
        x, mask = inputs_of(step)
        x = x.requires_grad_()
        with counted_all_reduces() as sizes:
            soft = sinkhorn(x[:, 0], mask, epsilon=0.3)
        losses = [diversity_loss(x, mask), diversity_loss(x, mask, form="perplexity")]
        gradients = [torch.autograd.grad(loss, x)[0] for loss in losses]
        seen.append((soft, torch.stack(losses).detach(), gradients, sizes))
    return seen


# ---- k-means over a data set ----


def run_fits(shares_of):
    """Return states, errors and all-reduces of fits from given codes and from none."""
    seen = []
    for given in (True, False):
        codebook = EMACodebook(codebook_size=6, dim=DIM, dtype=torch.float64)
        if given:
            codebook.set_codes_(tokens(5, 0, 6, dtype=torch.float64))
        with counted_all_reduces() as sizes:
            fit = fit_codebook(codebook, shares_of(), passes=4, tolerance=0)
        seen.append((state_of(codebook), fit.errors, fit.counts, sizes))
    return seen


def share(rank):
    """Return batches of one rank, of another number and size on each."""
    return [tokens(rank, step, 20 + 15 * rank, dtype=torch.float64) for step in range(3 + rank)]


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
    """Run all cases on one rank, and save the results to `folder`."""
    torch.set_num_threads(1)
    early = make_codebook("k-means", "float32")  # before there are ranks: they are looked up at call time
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS, timeout=TIMEOUT
    )
    found = {}
    for batches, options, dtype in CASES:
        codebook = early if dtype == "float32" else make_codebook(options, dtype)
        batch_of = functools.partial(BATCHES[batches], rank, dtype=DTYPES[dtype])
        found[batches, options, dtype] = run(codebook, batch_of)
    for batches in FUSED:
        with mock.patch("vqssl.update.can_fuse", return_value=True):
            batch_of = functools.partial(BATCHES[batches], rank, dtype=torch.float64)
            found[batches, "fused"] = run(make_codebook("sample", "float64"), batch_of)
    found["several"] = run_several(make_several(), functools.partial(batch_of_several, rank))
    for form in FORMS:
        found[form] = run_pyramid(make_pyramid(form), functools.partial(features, rank))
    found["fits"] = run_fits(functools.partial(share, rank))
    found["functions"] = run_functions(functools.partial(logits, rank))
    for name in MULTI_CODE:
        batch_of = functools.partial(batch_of_several, rank, 0)
        found[name] = run_multi_code(make_multi_code(name), batch_of)

    unlike = make_multi_code("residual with dropout", level_dropout=0.2 + 0.3 * rank)
    found["dropout"] = refusal(lambda: unlike(tokens(rank, 0, 40, dtype=torch.float64)))

    # In a group of its own each rank has codes of its own.
    own = [dist.new_group([r]) for r in range(RANKS)]
    alone = make_codebook("k-means", "float32", process_group=own[rank])
    found["alone"] = run(alone, lambda step: equal_batches(rank, step, torch.float32))
    everyone = dist.new_group(list(range(RANKS)))
    together = make_codebook("k-means", "float32", process_group=everyone)
    found["together"] = run(together, lambda step: equal_batches(rank, step, torch.float32))
    grouped = make_several([None, own[rank], everyone, None])
    found["several in groups"] = run_several(grouped, functools.partial(batch_of_several, rank))
    foreign = make_codebook("k-means", "float32", process_group=own[1 - rank])
    found["foreign"] = refusal(lambda: foreign(tokens(rank, 0, 40)))

    # 8 tokens for 10 codes; 16 are enough.
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
    run_ranks(work, (str(folder),), RANKS)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(RANKS)]


def assert_ranks_agree(ranks, case):
    """Assert that all ranks have the same state, bit for bit, at every step."""
    for first, *others in zip(*(found[case] for found in ranks), strict=True):
        for other in others:
            assert_same_bits(other[2], first[2])


def assert_is_one_process(ranks, case, single, tolerance):
    """Assert that what the ranks saw are the parts, in rank order, of `single`, a run on the joined batches."""
    for step, (quantized, indices, state, *_) in enumerate(single):
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
def test_ranks_equal_one_process_on_the_joined_batch(ranks, batches, options, dtype):
    single = run(make_codebook(options, dtype), lambda step: joined(BATCHES[batches], step, DTYPES[dtype]))
    assert_ranks_agree(ranks, (batches, options, dtype))
    assert_is_one_process(ranks, (batches, options, dtype), single, TOLERANCE[dtype])
    # Some codes were revived: otherwise equality says little about revival.
    unrevived = make_codebook(options, dtype, revival=None)
    run(unrevived, lambda step: joined(BATCHES[batches], step, DTYPES[dtype]))
    assert_differs(state_of(unrevived), single[-1][2])


@pytest.mark.parametrize("batches", FUSED)
def test_fused_operators_on_ranks_equal_one_process_without_them(ranks, batches):
    single = run(make_codebook("sample", "float64"), lambda step: joined(BATCHES[batches], step, torch.float64))
    assert_ranks_agree(ranks, (batches, "fused"))
    assert_is_one_process(ranks, (batches, "fused"), single, TOLERANCE["float64"])


def test_only_the_ranks_of_the_process_group_share_statistics(ranks):
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


def test_process_group_without_this_rank_is_refused(ranks):
    for found in ranks:
        assert found["foreign"] is not None
        assert "this process is not in the process_group" in found["foreign"]


def test_refusal_is_the_same_on_all_ranks_and_training_continues(ranks):
    assert "got 8 valid tokens" in ranks[0]["few"]
    assert ranks[0]["few"] == ranks[1]["few"]
    for found in ranks:
        assert_same_bits(*found["few state"])
    assert_ranks_agree(ranks, "few after")


# ---- several codebooks in one update ----


def assert_equals_single(ranks, case, number, single):
    """Assert that codebook `number` has the state of one process, and the ranks the parts of its indices."""
    for step, (states, indices, _) in enumerate(single):
        parts = [found[case][step] for found in ranks]
        assert torch.equal(torch.cat([part[1][number] for part in parts]), indices[number]), f"step {step}"
        for part in parts[1:]:
            assert_same_bits(part[0][number], parts[0][0][number])
        for name, value in states[number].items():
            torch.testing.assert_close(parts[0][0][number][name], value, rtol=1e-11, atol=1e-11)


def test_several_codebooks_in_one_update_equal_one_process(ranks):
    single = run_several(make_several(), joined_several)
    for number in range(len(SEVERAL)):
        assert_equals_single(ranks, "several", number, single)
    assert all(sizes == [] for _, _, sizes in single)
    unrevived = make_several()
    for codebook in unrevived:
        codebook.revival = NoRevival()
    last = run_several(unrevived, joined_several)[-1][0]
    for number in (0, 1, 3):
        assert_differs(last[number], single[-1][0][number])


def test_several_codebooks_share_two_all_reduces(ranks):
    """One of statistics and counts of valid tokens, one of replacement candidates."""
    statistics, candidates = 10 * (DIM + 1) + 2 * RANKS, 10 * DIM
    for found in ranks:
        for step, (_, _, sizes) in enumerate(found["several"]):
            frozen = step % 4 == 3
            assert sizes == [(3 if frozen else 4) * statistics, (2 if frozen else 3) * candidates]


def test_codebooks_of_several_process_groups_in_one_update(ranks):
    """Each equals one process on the joined batch of its group; each group shares two all-reduces."""
    single = run_several(make_several(), joined_several)
    for number in (0, 2, 3):
        assert_equals_single(ranks, "several in groups", number, single)
    for rank, found in enumerate(ranks):
        lone = run_several(make_several(), functools.partial(batch_of_several, rank))
        for (states, _, sizes), (expected, _, _) in zip(found["several in groups"], lone, strict=True):
            assert_same_bits(states[1], expected[1])
            # Two of the default group's (0 and 3); one of the second's, whose codebook needs no candidates.
            assert len(sizes) == 3


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
def test_ranks_have_equal_pyramids(ranks, form):
    assert_ranks_agree(ranks, form)
    assert_differs(ranks[0][form][-1][2], ranks[0][form][0][2])


@pytest.mark.parametrize("form", ["one a scale", "shared without draws"])
def test_pyramid_over_ranks_equals_one_process(ranks, form):
    assert_pyramids_equal(ranks, form, run_pyramid(make_pyramid(form), joined_features))


def test_shared_pyramid_draws_in_the_order_of_ranks_then_scales(ranks):
    """Tokens are numbered rank by rank, within a rank scale by scale: one process draws alike if given that order."""
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


# ---- quantisers of several codes a token ----


@pytest.mark.parametrize("name", MULTI_CODE)
def test_quantiser_of_several_codes_over_ranks_equals_one_process(ranks, name):
    single = run_multi_code(make_multi_code(name), functools.partial(joined_several, 0))
    assert_ranks_agree(ranks, name)
    assert_is_one_process(ranks, name, single, 1e-11)
    unrevived = run_multi_code(make_multi_code(name, revival=None), functools.partial(joined_several, 0))
    assert_differs(unrevived[-1][2], single[-1][2])


def test_ranks_with_another_dropout_are_refused(ranks):
    for found in ranks:
        assert "level_dropout 0.2 (rank 0) and 0.5 (rank 1)" in found["dropout"]


@pytest.mark.parametrize("name", MULTI_CODE)
def test_all_codebooks_of_a_quantiser_share_two_all_reduces(ranks, name):
    codebooks = make_multi_code(name).codebooks
    statistics = sum(codebook.embed.numel() + codebook.codebook_size + 2 * RANKS for codebook in codebooks)
    candidates = sum(codebook.embed.numel() for codebook in codebooks)
    for found in ranks:
        assert all(sizes == [statistics, candidates] for *_, sizes in found[name][1:])


# ---- functions over ranks ----


def test_sinkhorn_and_diversity_over_ranks_equal_one_process(ranks):
    def joined_logits(step):
        parts = [logits(rank, step) for rank in range(RANKS)]
        return torch.cat([x for x, _ in parts]), torch.cat([mask for _, mask in parts])

    close = functools.partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12)
    for step, (soft, losses, gradients, sizes) in enumerate(run_functions(joined_logits)):
        parts = [found["functions"][step] for found in ranks]
        close(torch.cat([part[0] for part in parts]), soft)
        assert sizes == []
        for part in parts:
            close(part[1], losses)
            assert part[3] == [2 * 5 * RANKS] * 3
        for number, gradient in enumerate(gradients):
            # As DDP averages them over ranks.
            close(torch.cat([part[2][number] for part in parts]) / RANKS, gradient)
        assert step == 3 or any(gradient.abs().sum() > 0 for gradient in gradients)


# ---- k-means over a data set ----


def test_fit_over_ranks_equals_one_process(ranks):
    single = run_fits(lambda: [batch for rank in range(RANKS) for batch in share(rank)])
    for number, (state, errors, counts, sizes) in enumerate(single):
        parts = [found["fits"][number] for found in ranks]
        assert sizes == []
        for part in parts:
            assert_same_bits(part[0], parts[0][0])
            assert part[1] == parts[0][1]
        assert int(parts[0][2].sum()) == int(counts.sum())
        if number == 0:  # without given codes the sample is another
            torch.testing.assert_close(parts[0][0], state, rtol=1e-11, atol=1e-11)
            assert list(parts[0][1]) == pytest.approx(list(errors), rel=1e-11)
            assert [size for size in parts[0][3] if size > 1] == [6 * (DIM + 1) + 2] * 4
