"""Reports agree with the codebook, and the verdict is right: quiet for healthy codebooks, plain for others."""

import copy
import dataclasses
import functools
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.laws import assert_same_bits, state_of, through_file
from vqssl import BatchRevival, EMACodebook, KMeansInit, MultiScaleQuantizer, NoRevival, RandomInit
from vqssl.distributed import TokenPool
from vqssl.health import CodebookHealth, effective_dimension, examine, nearest_distances, spectrum
from vqssl.health.measures import near_duplicate_distance
from vqssl.interop import codebook_from_vector_quantize_pytorch


def trained(tokens, *, steps=120, **options):
    """Return a codebook trained on `tokens(step)` for six memory lengths. Equal calls train once."""
    return copy.deepcopy(trained_once(tokens, steps, tuple(options.items())))


@functools.cache
def trained_once(tokens, steps, options):
    codebook = EMACodebook(**{"codebook_size": 64, "dim": 8, "decay": 0.95, **dict(options)})
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for step in range(steps):
            codebook(tokens(step))
    return codebook


OLD = ("embed", "cluster_size", "embed_avg")
"""Keys of a state of version 1."""


def normal(step):
    return torch.randn(512, 8)


def only(source, **options):
    (health,) = examine(source, **options).values()
    return health


def says(health, level):
    return " / ".join(finding.says for finding in health.findings if finding.level == level)


# ---- numbers ----


@given(
    seed=st.integers(0, 2**31 - 1), size=st.integers(1, 12), dim=st.integers(1, 5), steps=st.integers(0, 5),
    metric=st.sampled_from(["euclidean", "cosine"]), dtype=st.sampled_from([torch.float32, torch.float64]),
)  # fmt: skip
def test_report_equals_the_measures(seed, size, dim, steps, metric, dtype):
    torch.manual_seed(seed)
    codebook = EMACodebook(codebook_size=size, dim=dim, metric=metric, dtype=dtype, decay=0.8)
    for _ in range(steps):
        codebook(torch.randn(6, dim, dtype=dtype))
    before = state_of(codebook)
    health = only(codebook)
    assert_same_bits(state_of(codebook), before)
    usage = codebook.usage()
    assert (health.codebook_size, health.dim) == (size, dim)
    assert health.initialized == (steps > 0)
    assert health.perplexity == usage.perplexity.item()
    assert health.usage == usage.fraction.item()
    assert health.dead == usage.dead.item()
    assert health.dead + health.dying <= size
    assert health.codes.equal(codebook.embed)
    assert health.shares.mean().item() == pytest.approx(1)
    if steps:
        # Without what remains of the initial counts of 1, the sum is the number of tokens.
        assert health.updates == steps
        assert health.tokens_per_step == pytest.approx(6, rel=1e-4)
        assert health.start_share == pytest.approx(0.8**steps * size / codebook.cluster_size.sum().item())
    if size > 1 and health.effective_dimension is not None:
        distances = nearest_distances(codebook.embed) / health.spread
        assert health.nearest_min == distances.min().item()
        assert health.nearest_median == distances.median().item()
        eigenvalues = spectrum(codebook.embed, codebook.cluster_size)
        assert health.effective_dimension == effective_dimension(eigenvalues).item()
        bound = near_duplicate_distance(size, health.effective_dimension)
        assert health.near_duplicates == (distances < bound).sum().item()
    if metric == "cosine":
        assert health.norm_spread < 1e-6
    assert json.loads(json.dumps(health.as_dict(), allow_nan=False))["level"] == health.level


def test_unused_code_has_the_start_share():
    codebook = EMACodebook(codebook_size=4, dim=2, decay=0.9, revival=None)
    codebook.set_codes_(torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [900.0, 900.0]]))
    codebook.initialized.fill_(True)
    for _ in range(9):
        codebook(torch.randn(100, 2))
    health = only(codebook)
    assert health.shares[3].item() == pytest.approx(health.start_share, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_states_of_any_dtype_are_examined(dtype):
    state = {
        key: value.to(dtype) if value.is_floating_point() else value
        for key, value in trained(normal).state_dict().items()
    }
    health = only(state, decay=0.95)
    assert health.level == "ok"
    assert health.perplexity > 40


def test_module_wrapper_state_and_file_give_one_report():
    model = MultiScaleQuantizer([8, 8], codebook_size=16, dim=4, channels_last=True, decay=0.9)
    for _ in range(30):
        model([torch.randn(64, 8), torch.randn(32, 8)])
    expected = {name: health.as_dict() for name, health in examine(model).items()}
    assert [health["tokens_per_step"] for health in expected.values()] == pytest.approx([64, 32], rel=1e-4)
    for source in (nn.Sequential(model), model.state_dict(), {"model": through_file(model.state_dict())}):
        found = [health.as_dict() for health in examine(source, decay=0.9).values()]
        unsaid = {"revives": True, "metric": "euclidean", "initialization": "SampleInit"}
        parts = [{"part": f"scale {scale} of 2"} for scale in range(2)]
        said = [{**health, **unsaid, **part} for health, part in zip(found, parts, strict=True)]
        assert said == list(expected.values())


def test_report_does_not_change_with_the_codebook():
    codebook = trained(normal)
    health = only(codebook)
    kept = health.codes.clone()
    codebook(normal(0))
    assert not codebook.embed.equal(kept)
    assert health.codes.equal(kept)
    with pytest.raises(dataclasses.FrozenInstanceError):
        health.dead = 3


@pytest.mark.parametrize("dead_below", [0.0, 0.3, 1.0])
def test_dead_below_matches_usage(dead_below):
    codebook = trained(normal, revival=None)
    health = only(codebook, dead_below=dead_below)
    assert health.dead == codebook.usage(dead_below).dead.item()
    assert health.dead_below == dead_below


# ---- between two examinations ----


def test_since_accepts_reports_modules_and_states():
    codebook = trained(normal, steps=100)
    report, state, earlier = examine(codebook), state_of(codebook), copy.deepcopy(codebook)
    for step in range(20):
        codebook(normal(step))
    old, new = earlier.embed.double(), codebook.embed.double()
    expected = (new - old).square().sum(1).mean().sqrt() / (old - old.mean(0)).square().sum(1).mean().sqrt()
    for since in (
        report,
        state,
        earlier,
        {"model": state},
        nn.ModuleDict({"inner": earlier}),
        examine(nn.Sequential(earlier)),
    ):
        health = only(codebook, since=since)
        assert health.drift == pytest.approx(expected.item(), rel=1e-6)
        assert health.updates_since == 20
    assert only(codebook).drift is None
    assert only(codebook).updates_since is None


def test_since_matches_a_part_with_the_whole_model():
    model = nn.ModuleDict({"quantizer": MultiScaleQuantizer([4, 4], codebook_size=8, dim=4, channels_last=True)})
    model["quantizer"]([torch.randn(50, 4), torch.randn(50, 4)])
    for reports in (
        examine(model["quantizer"], since=model.state_dict()),
        examine(model, since=model["quantizer"].state_dict()),
    ):
        assert [health.drift for health in reports.values()] == [0, 0]


def test_no_drift_is_reported_from_random_codes():
    codebook = EMACodebook(codebook_size=8, dim=4)
    before = examine(codebook)
    codebook(torch.randn(100, 4))
    for since in (before, EMACodebook(codebook_size=8, dim=4), EMACodebook(codebook_size=8, dim=4).state_dict()):
        health = only(codebook, since=since)
        assert (health.drift, health.turnover, health.updates_since) == (None, None, None)
        assert "the earlier codebook was not trained yet" in says(health, "look")
    bad = given_counts(torch.zeros(8))
    assert "not trained yet" in says(only(bad, since=EMACodebook(codebook_size=8, dim=8)), "look")


def test_codebook_that_does_not_train_is_reported():
    codebook = trained(normal)
    before = examine(codebook)
    codebook.eval()(normal(0))
    assert says(only(codebook, since=before), "look").startswith("the same state twice: no update lies between")
    later = codebook.state_dict() | {"num_updates": torch.tensor(900)}
    assert "have not moved" in says(only(later, since=before), "look")
    codebook.train()(normal(0))
    assert only(codebook, since=before).level == "ok"
    codebook.set_codes_(codebook.embed[torch.randperm(64)])
    shuffled = only(codebook, since=before)
    assert "changed places" in says(shuffled, "look")
    assert shuffled.turnover > 0.9


# ---- the verdict ----


CENTRES = 3 * torch.randn(80, 8, generator=torch.Generator().manual_seed(0))
HEALTHY = {
    "normal": {"tokens": normal},
    "no revival": {"tokens": normal, "revival": None},
    "k-means": {"tokens": normal, "initialization": KMeansInit()},
    "cosine": {"tokens": normal, "metric": "cosine"},
    "far from the origin": {"tokens": lambda step: 5 + torch.randn(512, 8)},
    "of any scale": {"tokens": lambda step: 1e-4 * torch.randn(512, 8)},
    "clusters": {"tokens": lambda step: CENTRES[torch.randint(80, (512,))] + 0.1 * torch.randn(512, 8)},
    "few directions": {"tokens": lambda step: torch.randn(512, 8) * 0.6 ** torch.arange(8)},
    "one dimension": {"tokens": lambda step: torch.randn(512, 1), "dim": 1},
    "two codes": {"tokens": normal, "codebook_size": 2},
    "one code": {"tokens": normal, "codebook_size": 1},
    "batch mean": {"tokens": normal, "ema": "batch_mean"},
    "large": {"tokens": lambda step: torch.randn(1024, 8), "codebook_size": 512},
}


@pytest.mark.parametrize("case", HEALTHY.values(), ids=list(HEALTHY))
def test_healthy_codebooks_are_ok(case):
    case = dict(case)
    codebook = trained(case.pop("tokens"), **case)
    for source in (codebook, codebook.state_dict()):
        health = only(source, decay=0.95)
        assert health.level == "ok", health.findings
        assert len(health.findings) == 1
        assert health.findings[0].advice == ""


BROKEN = {
    "tokens all alike": ({"tokens": lambda step: torch.ones(512, 8)}, "nearly equal"),
    "tokens nearly alike": ({"tokens": lambda step: 1 + 1e-6 * torch.randn(512, 8)}, "nearly equal"),
    "codes elsewhere": (
        {"tokens": lambda step: 50 + torch.randn(512, 8), "initialization": RandomInit(), "revival": None},
        "codebook collapse",
    ),
    "too many codes": ({"tokens": lambda step: torch.eye(8)[torch.randint(5, (512,))], "revival": None}, "collapse"),
    "too many codes, revived": ({"tokens": lambda step: torch.eye(8)[torch.randint(5, (512,))]}, "near-duplicate"),
}  # fmt: skip


@pytest.mark.parametrize(("case", "word"), BROKEN.values(), ids=list(BROKEN))
def test_broken_codebooks_are_act(case, word):
    case = dict(case)
    codebook = trained(case.pop("tokens"), **case)
    for source in (codebook, codebook.state_dict()):
        health = only(source, decay=0.95)
        assert health.level == "act"
        assert health.findings[0].level == "act"
        assert word in says(health, "act")
        assert all(finding.advice for finding in health.findings)


def given_counts(counts, *, updates=10_000, codes=None, **options):
    """Return a trained codebook with these running counts."""
    counts = torch.as_tensor(counts, dtype=torch.float32)
    codebook = EMACodebook(codebook_size=len(counts), dim=8, **options)
    codebook.set_codes_(torch.randn(len(counts), 8) if codes is None else codes)
    codebook.cluster_size.copy_(counts)
    codebook.num_updates.fill_(updates)
    return codebook


@pytest.mark.parametrize(
    ("dead", "level"), [(0, "ok"), (4, "ok"), (6, "look"), (25, "look"), (27, "act"), (60, "act")]
)  # of 100
def test_levels_of_dead_codes(dead, level):
    counts = [0.01] * dead + [100.0] * (100 - dead)
    health = only(given_counts(counts))
    assert health.dead == dead
    assert health.level == level
    if dead > 5:
        assert health.findings[0].says.startswith(f"{dead}% of the codes ({dead} of 100) are dead")


def test_advice_names_what_the_module_lacks():
    counts = [0.01] * 60 + [100.0] * 40
    without = only(given_counts(counts, revival=NoRevival())).findings[0].advice
    assert "revival=BatchRevival()" in without
    assert "codebook_size to 50" in without
    assert "threshold above 0.3" in only(given_counts(counts, revival=BatchRevival(0.3))).findings[0].advice
    unknown = only(given_counts(counts).state_dict()).findings[0].advice
    assert "if there is no revival" in unknown
    assert "if there is" in unknown


def test_advised_codebook_size_is_at_least_the_perplexity():
    counts = torch.full((1024,), 0.01)
    counts[:200] = 1000.0
    assert "codebook_size to 256" in only(given_counts(counts)).findings[0].advice


def test_dying_codes_and_uneven_usage_are_look():
    dying = only(given_counts([20.0] * 30 + [150.0] * 70))
    assert dying.dying == 30
    assert "30% of the codes (30 of 100) are dying" in says(dying, "look")
    uneven = only(given_counts([40.0] * 90 + [1500.0] * 10, revival=None))
    assert uneven.dead == 0
    assert "uneven usage: perplexity" in says(uneven, "look")


def test_few_tokens_are_reported_instead_of_dead_codes():
    """Codes are dead by chance alone: 8 tokens a step for 1024 codes, evenly used."""
    counts = torch.full((1024,), 8 / 1024)
    for _ in range(1000):
        counts = 0.99 * counts + 0.01 * torch.bincount(torch.randint(1024, (8,)), minlength=1024)
    health = only(given_counts(counts, revival=None))
    assert health.dead > 50
    assert health.level == "look"
    assert "too few tokens to tell: 8 a step" in says(health, "look")
    assert "codebook_size=512 or less" in health.findings[0].advice
    # The same share of dead codes is a finding if tokens suffice, and collapse is one even if they do not.
    assert only(given_counts(counts * 100, revival=None)).level == "look"
    assert "are dead" in says(only(given_counts(counts * 100, revival=None)), "look")
    one = torch.zeros(1024)
    one[0] = 8.0
    assert "codebook collapse" in says(only(given_counts(one, revival=None)), "act")


@pytest.mark.parametrize(("remembered", "level"), [(2.1, "ok"), (100.0, "look")])
def test_codes_dead_by_chance_are_not_reported(remembered, level):
    """8 of 100 are dead, of which chance explains 5 where counts remember two tokens a code, and none where 100."""
    counts = torch.tensor([0.05] * 8 + [1.0] * 92)
    counts *= remembered / 199 / counts.mean()
    health = only(given_counts(counts, revival=None))
    assert health.dead == 8
    assert health.level == level, health.findings


def test_usage_is_not_judged_before_it_settles():
    quick = trained(lambda step: 50 + torch.randn(512, 8), steps=3, initialization=RandomInit(), revival=None)
    health = only(quick)
    assert health.level == "look"
    assert "too early to tell: after 3 updates" in says(health, "look")
    needed = int(health.findings[0].advice.split()[-2])
    while only(quick).updates < needed:
        quick(50 + torch.randn(512, 8))
    late = only(quick)
    assert "too early" not in says(late, "look")
    assert f"still settling: {needed} of about 100 updates" in says(late, "look")
    assert needed < 3 + math.log(0.01) / math.log(0.95)
    while only(quick).updates < 100:
        assert only(quick).level == "look"
        quick(50 + torch.randn(512, 8))
    assert only(quick).level == "act"


def test_before_the_first_update_it_is_too_early_to_tell():
    codebook = EMACodebook(codebook_size=64, dim=8)
    codebook.set_codes_(torch.randn(64, 8))
    for dead_below in (0.0, 0.1, 1.0):
        health = only(codebook, dead_below=dead_below)
        assert (health.updates, health.tokens_per_step) == (0, None)
        assert "too early to tell: after 0 updates" in says(health, "look")


def test_settling_usage_gives_no_advice_on_size():
    """After 200 steps of an encoder, early unevenness must not lead to the advice to halve the codebook."""
    torch.manual_seed(0)
    directions = torch.randn(8, 32)
    encoder = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16))
    decoder = nn.Linear(16, 32)
    codebook = EMACodebook(codebook_size=64, dim=16)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *decoder.parameters()], lr=1e-3)
    for _ in range(200):
        x = directions[torch.randint(8, (512,))] + 0.3 * torch.randn(512, 32)
        quantized, _, commitment = codebook(encoder(x))
        loss = (decoder(quantized) - x).square().mean() + commitment
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    health = only(codebook)
    assert health.perplexity < 32
    (finding,) = health.findings
    assert finding.says.startswith("still settling: 200 of about 500 updates")
    assert "300 more" in finding.advice
    assert "codebook_size" not in finding.advice
    # A state of unknown age may be as young.
    foreign = {key: value for key, value in codebook.state_dict().items() if key not in ("rng", "num_updates")}
    assert "if training has just begun, look again after 500 updates" in only(foreign).findings[0].advice


def test_decay_1_is_reported():
    codebook = EMACodebook(codebook_size=8, dim=4, decay=1.0)
    for _ in range(50):
        codebook(torch.randn(64, 4))
    for source in (codebook, codebook.state_dict()):
        health = only(source, decay=1.0)
        assert says(health, "look").startswith("decay is 1: counts and codes never change")
        assert health.tokens_per_step is None


# ---- age of the counts ----


@pytest.mark.parametrize("updates", [0, 1, 3, 200])
def test_age_of_the_counts_after_codes_are_set_again(updates):
    """Counts start at one each again."""
    codebook = trained(normal)
    for _ in range(2):
        codebook.set_codes_(torch.randn(64, 8))
        for step in range(updates):
            codebook(normal(step))
        health = only(codebook)
        assert health.updates == updates
        if updates == 0:
            assert health.tokens_per_step is None
            assert says(health, "look").startswith("too early to tell")
        else:
            assert health.tokens_per_step == pytest.approx(512, rel=1e-3)
        assert "no tokens" not in says(health, "act")
    if updates < 120:
        assert only(codebook, since=trained(normal)).updates_since is None


@pytest.mark.parametrize("updates", [0, 1, 2, 30])
@pytest.mark.parametrize("into", ["new", "trained"])
def test_counts_from_a_state_of_version_1_have_unknown_age(updates, into):
    old = {key: value for key, value in trained(normal, steps=200).state_dict().items() if key in OLD}
    codebook = EMACodebook(codebook_size=64, dim=8, decay=0.95) if into == "new" else trained(normal, steps=4)
    codebook.load_state_dict(dict(old))
    few = torch.randn(8, 8)
    for _ in range(updates):
        codebook(few)
    for source in (codebook, codebook.state_dict()):
        health = only(source, decay=0.95)
        assert health.updates is None
        assert health.tokens_per_step == pytest.approx(codebook.cluster_size.sum().item())
        assert "no tokens" not in says(health, "act")
        assert "too early" not in says(health, "look")


@pytest.mark.parametrize("updates", [0, 1, 2, 30])
def test_counts_from_another_library_have_unknown_age(updates):
    theirs = {"initted": torch.tensor(True), "embed": torch.randn(1, 64, 8), "cluster_size": torch.full((1, 64), 0.2)}
    theirs["embed_avg"] = theirs["embed"] * 0.2
    codebook = codebook_from_vector_quantize_pytorch(theirs, decay=0.99)
    x = torch.randn(13, 8)
    for _ in range(updates):
        codebook(x)
    health = only(codebook)
    assert health.updates is None
    assert health.tokens_per_step == pytest.approx(12.8, rel=0.1)
    assert "no tokens" not in says(health, "act")


def test_uninitialised_import_is_counted_from_its_first_codes():
    theirs = {"initted": torch.tensor(False), "embed": torch.randn(1, 8, 4), "cluster_size": torch.ones(1, 8)}
    codebook = codebook_from_vector_quantize_pytorch({**theirs, "embed_avg": theirs["embed"]})
    assert not only(codebook).initialized
    for _ in range(3):
        codebook(torch.randn(50, 4))
    assert (only(codebook).updates, only(codebook).tokens_per_step) == (3, pytest.approx(50, rel=1e-3))


def test_no_tokens_is_reported_only_for_zero_counts():
    """The default decay may be wrong for a state, and its counts then do not add up."""
    codebook = trained(lambda step: torch.randn(40, 8), steps=30, decay=0.8, revival=None)
    health = only(codebook.state_dict())  # 0.99 ** 30 * 64 is more than all its counts
    assert "no tokens" not in says(health, "act")
    assert health.tokens_per_step == pytest.approx(40, rel=0.01)


# ---- broken counts ----


@pytest.mark.parametrize("count", [math.nan, math.inf, -math.inf, -1.0])
@pytest.mark.parametrize("size", [1, 64])
def test_broken_counts_are_a_finding_of_their_own(count, size):
    codebook = given_counts(torch.full((64,), 8.0))
    codebook.cluster_size[:size] = count
    health = only(codebook)
    assert health.not_counts == size
    assert health.findings[0].says.endswith(f"running counts ({size} of 64) are NaN, infinite or negative")
    assert "no tokens" not in says(health, "act")
    assert json.dumps(health.as_dict(), allow_nan=False)


@pytest.mark.parametrize("updates", [1, 10_000])
def test_zero_counts_are_reported_as_no_tokens(updates):
    for source in (given_counts(torch.zeros(10), updates=updates), given_counts(torch.zeros(10)).state_dict()):
        assert only(source).findings[0].says == "no tokens: all running counts are 0"
    assert "no tokens" in says(only({"embed": torch.randn(10, 4), "cluster_size": torch.zeros(10)}), "act")


@pytest.mark.filterwarnings("ignore:.*random codes:UserWarning")
def test_untrained_codebook_has_exactly_one_finding():
    fed = EMACodebook(codebook_size=8, dim=4).eval()
    fed(torch.randn(64, 4))
    halves = EMACodebook(codebook_size=8, dim=4)
    halves.update_(torch.randn(64, 4), torch.arange(64) % 8)
    loaded = EMACodebook(codebook_size=8, dim=4, seed=3)
    loaded.load_state_dict(fed.state_dict())
    frozen = EMACodebook(codebook_size=8, dim=4).freeze()
    frozen(torch.randn(64, 4))
    new, single = EMACodebook(codebook_size=8, dim=4), EMACodebook(codebook_size=1, dim=1)
    constant = EMACodebook(codebook_size=8, dim=4, decay=1.0)
    in_file = {"model": through_file(fed.state_dict())}
    for source in (new, new.state_dict(), single, constant, fed, halves, loaded, frozen, in_file, nn.Sequential(fed)):
        health = only(source)
        assert [finding.says for finding in health.findings] == ["not trained yet: the codes are random"]
        assert health.level == "look"


def test_codes_that_are_not_finite_are_counted():
    codebook = trained(normal)
    codebook.embed[3, 2] = torch.nan
    codebook.embed[9] = torch.inf
    codebook.cluster_size[3] = torch.nan
    health = only(codebook)
    assert health.not_finite == 2
    assert health.findings[0].says == "3% of the codes (2 of 64) hold NaN, infinities or values beyond 1e150"
    assert json.dumps(health.as_dict(), allow_nan=False)
    assert health.nearest.isfinite().all()
    codebook.embed.fill_(torch.nan)
    assert only(codebook).level == "act"
    assert only(codebook).effective_dimension is None


@pytest.mark.parametrize("number", [1, 64])
def test_codes_whose_squares_overflow_are_counted(number):
    codes = torch.randn(64, 8, dtype=torch.float64)
    codes[:number] *= 1e200
    state = {"embed": codes, "cluster_size": torch.full((64,), 8.0)}
    health = only(state, since=state)
    assert health.not_finite == number
    assert "values beyond 1e150" in says(health, "act")
    assert json.dumps(health.as_dict(), allow_nan=False)


@pytest.mark.parametrize("scale", [1e-60, 1e140])
def test_codes_of_extreme_scale_are_measured(scale):
    codes = torch.randn(64, 8, dtype=torch.float64)
    small, plain = (only({"embed": c, "cluster_size": torch.full((64,), 8.0)}) for c in (codes * scale, codes))
    assert small.level == plain.level == "ok"
    assert small.effective_dimension == pytest.approx(plain.effective_dimension)
    assert small.spread == pytest.approx(plain.spread * scale)


def test_near_duplicates_do_not_depend_on_scale():
    codes = torch.randn(100, 8)
    codes[50:80] = codes[:30] * (1 + 1e-5)
    for scale in (1.0, 1e3):
        health = only(given_counts([100.0] * 100, codes=codes * scale))
        assert health.near_duplicates == 60
        assert "60% of the codes (60 of 100) have a near-duplicate" in says(health, "act")
    assert only(given_counts([100.0] * 100, codes=torch.randn(100, 8))).near_duplicates == 0


@pytest.mark.parametrize(("copies", "level"), [(0, "ok"), (1, "ok"), (2, "look"), (14, "act")])
def test_equal_codes_count_as_one(copies, level):
    """However alive the counts of the copies look: a revival gave them a fair share."""
    codes = torch.randn(100, 8)
    codes[50 : 50 + copies] = codes[:copies]
    codebook = given_counts([100.0] * 100, codes=codes)
    for source in (codebook, codebook.state_dict(), codebook.half().state_dict()):
        health = only(source)
        assert (health.equal, health.dead, health.dying) == (copies, copies, 0)
        assert health.usage == pytest.approx(1 - copies / 100)
        assert health.shares[:copies].tolist() == pytest.approx([2.0] * copies)
        single = torch.tensor([2.0] * copies + [1.0] * (100 - 2 * copies), dtype=torch.float64) / 100
        assert health.perplexity == pytest.approx(torch.special.entr(single).sum().exp().item())
        assert health.level == level
        if level != "ok":
            assert f"and {copies} equal an earlier one" in says(health, level)
            assert "are dead" not in says(health, level)


def test_tokens_all_alike_are_found_however_long_they_are():
    """Codes that get no tokens drift to the origin, so the spread of all codes says nothing."""
    codebook = trained(lambda step: torch.ones(512, 8), steps=300)
    health = only(codebook)
    assert health.spread > 10 * health.used_spread
    assert "all codes in use are nearly equal" in says(health, "act")


def clumps(count, size=256, radius=0.01):
    centres = torch.randn(count, 8, generator=torch.Generator().manual_seed(3))
    return centres[torch.arange(size) % count] + radius * torch.randn(size, 8)


@pytest.mark.parametrize("count", [2, 3, 8])
def test_codes_in_clumps_are_look(count):
    health = only(given_counts([100.0] * 256, codes=clumps(count)))
    assert health.near_duplicates == 0
    assert health.places == pytest.approx(count, rel=0.01)
    assert f"the 256 codes lie in about {count} clumps" in says(health, "look")


def test_two_tight_clusters_of_tokens_are_reported_as_clumps():
    centres = torch.tensor([[0.0] * 8, [40.0] * 8])
    codebook = trained(lambda step: centres[torch.randint(2, (1024,))] + 0.3 * torch.randn(1024, 8), codebook_size=256)
    for source in (codebook, codebook.state_dict()):
        assert "codes lie in about 2 clumps" in says(only(source, decay=0.95), "look")


@pytest.mark.parametrize("size", [16, 64, 256, 1024])
def test_spread_codes_are_not_clumps(size):
    outlier = torch.randn(size, 8)
    outlier[0] += 1e4
    means = torch.randn(size, 8)
    for codes in (
        *(torch.randn(size, dim) for dim in (1, 2, 8, 64)),
        *(KMeansInit()(pool(torch.randn(8 * size, dim)), size, torch.tensor([0, 1]), "euclidean") for dim in (1, 2, 8)),
        *(KMeansInit()(pool(clumps(n, 8 * size, 0.2)), size, torch.tensor([0, 1]), "euclidean") for n in (2, 8, size)),
        means + 0.001 * torch.randn(size, 8),  # as many clusters as codes
        torch.distributions.StudentT(3.0).sample((size, 1)),
        torch.distributions.Laplace(0.0, 1.0).sample((size, 1)),
        outlier,
    ):
        state = {"embed": codes, "cluster_size": torch.full((size,), 100.0)}
        assert "clumps" not in says(only(state), "look"), codes.shape


def pool(x):
    return TokenPool(x, torch.ones(len(x), dtype=torch.bool), torch.tensor([len(x)]), None)


def test_advice_leaves_out_what_the_codebook_has():
    line = torch.randn(100, 1) * torch.ones(8) + 0.01 * torch.randn(100, 8)
    ring = torch.nn.functional.normalize(torch.cat([torch.full((100, 1), 1.0), 0.3 * torch.randn(100, 1)], 1), dim=1)
    ring = torch.cat([ring, 1e-4 * torch.randn(100, 6)], 1)
    plain = given_counts([100.0] * 100, codes=line)
    cosine = given_counts([100.0] * 100, codes=ring, metric="cosine")
    assert 'metric="cosine"' in only(plain).findings[0].advice
    assert 'metric="cosine"' in only(plain.state_dict()).findings[0].advice
    for source in (cosine, cosine.state_dict(), cosine.half().state_dict()):
        health = only(source)
        assert health.metric == "cosine"
        assert "nearly on a line" in health.findings[0].says
        assert 'metric="cosine"' not in health.findings[0].advice
    assert (only(plain).metric, only(plain.state_dict()).metric) == ("euclidean", None)
    for counts in ([0.01] * 60 + [100.0] * 40, [40.0] * 90 + [1500.0] * 10, [1e5] + [1.0] * 99):
        kmeans = only(given_counts(counts, revival=None, initialization=KMeansInit())).findings[0]
        sample = only(given_counts(counts, revival=None)).findings[0]
        assert kmeans.says == sample.says
        assert "KMeansInit" not in kmeans.advice
        assert "KMeansInit" in sample.advice
    uneven = only(given_counts([40.0] * 90 + [1500.0] * 10).state_dict()).findings[0]
    assert "starts more evenly (if it was another)" in uneven.advice


def test_codes_on_a_line_are_look():
    line = torch.randn(100, 1) * torch.ones(8) + 0.01 * torch.randn(100, 8)
    assert "effective dimension 1.0 of 8" in says(only(given_counts([100.0] * 100, codes=line)), "look")


def test_findings_are_worst_first_and_level_is_the_worst():
    codes = torch.randn(100, 1) * torch.ones(8) + 0.01 * torch.randn(100, 8)
    health = only(given_counts([0.01] * 60 + [100.0] * 40, codes=codes))
    assert [finding.level for finding in health.findings] == ["act", "look"]
    assert health.level == "act"


# ---- refusals ----

STATE = EMACodebook(codebook_size=8, dim=4).state_dict()


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, "decay must be from 0 to 1", {"decay": 1.5}),
        (ValueError, "dead_below must be from 0 to 1", {"dead_below": -1}),
        (TypeError, "dead_below must be a number", {"dead_below": "few"}),
        (ValueError, r"shape of .* \(9, 4\) for \(8, 4\) in codebook", {"since": EMACodebook(codebook_size=9, dim=4)}),
        (ValueError, "same codebooks, got a, b for codebook", {"since": {"a": STATE, "b": copy.deepcopy(STATE)}}),
        (ValueError, "must hold a codebook", {"since": {}}),
        (TypeError, "module or a state dict", {"since": 3}),
    ],
)  # fmt: skip
def test_examine_refuses_wrong_arguments(error, message, options):
    with pytest.raises(error, match=message):
        examine(EMACodebook(codebook_size=8, dim=4), **options)


def test_report_is_a_codebook_health():
    assert isinstance(only(EMACodebook(codebook_size=8, dim=4)), CodebookHealth)
