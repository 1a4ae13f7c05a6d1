"""Ranks compare a module's options and state at its first call, in two processes over gloo."""

import copy
import datetime
import functools
import pickle
import time
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import vqssl
from tests.laws import assert_same_bits, correlation, state_of
from tests.rank_processes import run_ranks
from vqssl import agreement
from vqssl.agreement import Agreement, checksum, difference, option_text
from vqssl.functional import batch_mean_ema

RANKS = 2
DIM = 4
CODES = torch.arange(32.0).reshape(8, DIM)


def tokens(rank, step=0):
    return torch.randn(40, DIM, generator=torch.Generator().manual_seed(100 * rank + step))


def build(**options):
    return vqssl.EMACodebook(**{"codebook_size": 8, "dim": DIM, **options})


def with_codes(**options):
    codebook = build(**options)
    codebook.set_codes_(CODES)
    return codebook


def trained(source, steps=2):
    """Return a codebook that this rank alone has trained, with the tokens of rank `source`."""
    codebook = build(process_group=ALONE[dist.get_rank()])
    for step in range(steps):
        codebook(tokens(source, step))
    codebook.process_group = None
    return codebook


ALONE: list[dist.ProcessGroup] = []

# What each rank builds, by the words that the error has to contain.
PAIRS = {
    "codebook_size 8 (rank 0) and 9 (rank 1)": ({}, {"codebook_size": 9}),
    "seed 0 (rank 0) and 1 (rank 1)": ({}, {"seed": 1}),
    "decay 0.99 (rank 0) and 0.9 (rank 1)": ({}, {"decay": 0.9}),
    "eps 1e-05 (rank 0) and 0.001 (rank 1)": ({}, {"eps": 1e-3}),
    "metric euclidean (rank 0) and cosine (rank 1)": ({}, {"metric": "cosine"}),
    "metric cosine (rank 0) and correlation (rank 1)": ({"metric": "cosine"}, {"metric": correlation}),
    "commitment_weight 0.25 (rank 0) and 1.0 (rank 1)": ({}, {"commitment_weight": 1.0}),
    "ema count_weighted_ema (rank 0) and batch_mean_ema (rank 1)": ({}, {"ema": batch_mean_ema}),
    "initialization SampleInit() (rank 0) and KMeansInit(": ({}, {"initialization": vqssl.KMeansInit()}),
    "revival BatchRevival(threshold=0.1) (rank 0) and NoRevival() (rank 1)": ({}, {"revival": None}),
    "revival BatchRevival(threshold=0.1) (rank 0) and BatchRevival(threshold=0.2)": (
        {},
        {"revival": vqssl.BatchRevival(0.2)},
    ),
    "estimator straight_through (rank 0) and rotation": ({}, {"estimator": "rotation"}),
    "precision exact (rank 0) and tf32 (rank 1)": ({}, {"precision": "tf32"}),
    "dtype torch.float32 (rank 0) and torch.float64 (rank 1)": ({}, {"dtype": torch.float64}),
}


class Opaque:
    """An initialisation whose text holds an address."""

    def __call__(self, pool, codebook_size, rng, metric):
        return None


def refusal(module, call):
    """Return what the call raises, and whether the module has changed."""
    before = state_of(module)
    try:
        call()
    except (ValueError, RuntimeError) as error:
        after = state_of(module)
        return f"{type(error).__name__}: {error}", all(torch.equal(after[name], before[name]) for name in before)
    return "no error", True


def loaded_pair(rank):
    return trained(0) if rank == 0 else build()


STATES = {
    "initialized True (rank 0) and False (rank 1); num_updates 2 (rank 0) and 0 (rank 1)": loaded_pair,
    "num_updates 2 (rank 0) and 3 (rank 1)": lambda rank: trained(0, 2 + rank),
    "checksum of codes, counts and sums": trained,
}
CALLS = {
    "forward": lambda codebook, x: codebook(x),
    "initialize_": lambda codebook, x: codebook.eval().initialize_(x),
    "first_codes": lambda codebook, x: codebook.eval().first_codes(x),
    "update_": lambda codebook, x: codebook.eval().update_(x, torch.zeros(len(x), dtype=torch.int64)),
}


def agreeing(rank):
    """Return modules that are alike though their parts differ in address or in what ranks may differ in."""

    def scaled(x):
        return x

    yield "opaque", build(initialization=Opaque(), metric=scaled)
    yield "copied", copy.deepcopy(build())
    yield "pickled", pickle.loads(pickle.dumps(build()))
    yield "double", build().double()
    yield "pyramid", vqssl.MultiScaleQuantizer([DIM], codebook_size=8, dim=DIM, channels_last=True)


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=RANKS,
        timeout=datetime.timedelta(seconds=100),
    )
    ALONE[:] = [dist.new_group([each]) for each in range(RANKS)]
    found = {}
    for words, pair in PAIRS.items():
        codebook = build(**pair[rank])
        found[words] = refusal(codebook, lambda codebook=codebook: codebook(tokens(rank)))
    for words, make in STATES.items():
        codebook = make(rank)
        found[words] = refusal(codebook, lambda codebook=codebook: codebook(tokens(rank)))
    for name, call in CALLS.items():
        codebook = build(seed=rank)
        found[name] = refusal(codebook, lambda codebook=codebook, call=call: call(codebook, tokens(rank)))
        # The refused codebook may be mended: the next call compares anew.
        codebook.load_state_dict(build().state_dict())
        found["mended", name] = refusal(codebook, lambda codebook=codebook: codebook.train()(tokens(rank)))[0]
    for name, change in {
        "in_channels": lambda rank: {"in_channels": [DIM] * (1 + rank)},
        "shared": lambda rank: {"shared": rank == 0},
        "projection": lambda rank: {"projection": vqssl.LearnedProjection if rank else None},
    }.items():
        options = {"in_channels": [DIM, DIM], "codebook_size": 8, "dim": DIM, "channels_last": True} | change(rank)
        quantizer = vqssl.MultiScaleQuantizer(**options)
        maps = [tokens(rank)] * quantizer.num_scales
        found[name] = refusal(quantizer, lambda quantizer=quantizer, maps=maps: quantizer(maps))

    for name, module in agreeing(rank):
        for step in range(3):
            x = tokens(rank, step).to(next(module.buffers()).dtype)
            module([x] if name == "pyramid" else x)
        found["agree", name] = state_of(module)
    # A frozen codebook in training mode, and any in eval mode, may be called on some ranks alone.
    for module in (with_codes().freeze(), with_codes().eval()):
        if rank == 0:
            module(tokens(rank))
    # DDP gives all ranks the state of rank 0.
    healed = DistributedDataParallel(nn.Sequential(nn.Linear(DIM, DIM), build(seed=rank)))
    healed(tokens(rank)).commitment_loss.backward()
    found["healed"] = state_of(healed)
    # The facts are asked for once in a group.
    asked = []

    def facts():
        asked.append(len(asked))
        return {"seed": "0"}

    one = Agreement()
    for _ in range(3):
        one.reach("module", facts)
    found["asked"] = len(asked)
    one.reach("module", facts, dist.new_group(list(range(RANKS))))
    found["asked in another group"] = len(asked)
    dist.barrier()
    dist.destroy_process_group()
    find_who_is_missing(rank, folder, found)
    torch.save(found, f"{folder}/rank{rank}.pt")


def find_who_is_missing(rank, folder, found):
    """Let rank 0 wait in vain, with a short time-out: for one call more, and for a rank in eval mode."""
    agreement.PATIENCE[:] = [datetime.timedelta(seconds=0.2), datetime.timedelta(seconds=0.5)]
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/again",
        rank=rank,
        world_size=RANKS,
        timeout=datetime.timedelta(seconds=5),
    )
    codebook = with_codes()
    codebook.freeze()(tokens(rank))  # frozen for a while on both ranks
    codebook.freeze(False)(tokens(rank))
    frozen = with_codes(seed=1)
    done = Path(folder) / "done"
    if rank == 0:
        found["one call more"] = refusal(codebook, lambda: codebook(tokens(rank)))
        found["frozen"] = refusal(frozen, lambda: frozen(tokens(rank)))
        other = build(seed=2)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found["eval mode"] = refusal(other, lambda: other(tokens(rank)))
        found["warned"] = [str(each.message) for each in caught]
        done.touch()
    else:
        frozen.freeze()(tokens(rank))
        with_codes(seed=2).eval()(tokens(rank))
        while not done.exists():
            time.sleep(0.1)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("agreement")
    run_ranks(work, (str(folder),), RANKS)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(RANKS)]


@pytest.mark.parametrize("words", [*PAIRS, *STATES])
def test_difference_is_named_on_all_ranks_before_anything_changes(ranks, words):
    for found in ranks:
        message, unchanged = found[words]
        assert message.startswith("ValueError: EMACodebook must have the same options and state on all ranks"), message
        assert words in message
        assert unchanged


@pytest.mark.parametrize("call", CALLS)
def test_every_call_that_needs_all_ranks_compares_and_a_mended_codebook_trains(ranks, call):
    for found in ranks:
        message, unchanged = found[call]
        assert "got seed 0 (rank 0) and 1 (rank 1): build it alike" in message
        assert unchanged
        assert found["mended", call] == "no error"


@pytest.mark.parametrize("option", ["in_channels", "shared", "projection"])
def test_difference_between_multi_scale_quantizers_is_named(ranks, option):
    for found in ranks:
        message, unchanged = found[option]
        assert f"{option} " in message
        assert "(rank 0) and" in message
        assert unchanged


def test_modules_that_are_alike_train_and_stay_equal(ranks):
    names = [key for key in ranks[0] if key[0] == "agree"]
    assert len(names) == len(list(agreeing(0)))
    for name in [*names, "healed"]:
        assert_same_bits(ranks[1][name], ranks[0][name])


def test_ranks_compare_once_in_a_group(ranks):
    for found in ranks:
        assert found["asked"] == 1
        assert found["asked in another group"] == 2


def test_rank_that_does_not_come_is_named(ranks):
    message, unchanged = ranks[0]["eval mode"]
    assert message.startswith("RuntimeError: EMACodebook has to be called in training mode on every rank")
    assert "rank 1 of 2 has not called it within 5 s" in message
    assert "eval mode or frozen" in message
    assert unchanged
    (warned,) = ranks[0]["warned"]
    assert "rank 1 of 2 has not called it in training mode, and this rank has waited for 0.5 s" in warned


def test_rank_on_which_the_codebook_is_frozen_is_named_to_those_that_wait(ranks):
    message, unchanged = ranks[0]["frozen"]
    assert message.startswith("ValueError: EMACodebook must be frozen on all ranks")
    assert "got it frozen on rank 1 and not on rank 0" in message
    assert unchanged


def test_unequal_numbers_of_calls_are_explained_at_the_time_out(ranks):
    message, unchanged = ranks[0]["one call more"]
    assert message.startswith("RuntimeError: rank 0 of 2 could not sum statistics over its process_group")
    assert "equally often" in message
    assert unchanged


# ---- words ----


def test_difference_lists_values_and_ranks():
    same = {"seed": "0", "dim": "4"}
    assert difference([same] * 3) == ""
    assert difference([same, {**same, "dim": "5"}, same]) == "dim 4 (ranks 0, 2) and 5 (rank 1)"
    assert difference([same, {"seed": "0"}]) == "dim 4 (rank 0) and nothing (rank 1)"
    many = [{str(name): str(rank) for name in range(5)} for rank in range(2)]
    assert difference(many).endswith("; and 2 more")
    crowd = [same] * 12 + [{**same, "seed": "1"}]
    assert difference(crowd) == "seed 0 (ranks 0, 1, 2, 3, 4, 5, 6, 7 and 4 more) and 1 (rank 12)"


def test_text_of_an_option_holds_no_address():
    for value in (Opaque(), Opaque, lambda x: x, functools.partial(print), vqssl.BatchRevival(), None, 0.1, "exact"):
        assert " at 0x" not in option_text(value)
    assert option_text(vqssl.BatchRevival(0.2)) == "BatchRevival(threshold=0.2)"
    assert option_text(0.1) != option_text(0.2)


def test_checksum_depends_on_every_bit():
    x = torch.randn(5, 3)
    assert checksum([x]) == checksum([x.clone()])
    flipped = x.clone()
    flipped.view(torch.int32)[2, 1] ^= 1
    assert checksum([flipped]) != checksum([x])
    assert checksum([x.T.contiguous().T]) == checksum([x])


def test_one_process_compares_nothing():
    def fail():
        raise AssertionError

    Agreement().reach("module", fail)
