"""resized: splits and merges as loops over numbers, what stays to the bit, and training that goes on."""

import math
from typing import Any

import pytest
import torch

from tests.laws import assert_same_bits, correlation, state_of
from vqssl import BatchRevival, EMACodebook, MultiScaleQuantizer, ResidualQuantizer
from vqssl.experimental import resized


def trained(size=12, dim=3, steps=5, **options):
    codebook = EMACodebook(codebook_size=size, dim=dim, **options)
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(6, dim, generator=generator)
    for _ in range(steps):
        choice = torch.randint(6, (200,), generator=generator) ** 2 // 6  # some clusters are larger than others
        codebook(centres[choice] + 0.2 * torch.randn(200, dim, generator=generator))
    return codebook


def lists(codebook):
    return [tensor.double().tolist() for tensor in codebook.state()]


def nearest(codes, index):
    distances = [math.dist(code, codes[index]) if k != index else math.inf for k, code in enumerate(codes)]
    return distances.index(min(distances))


@pytest.mark.parametrize("new_size", [13, 20, 40])
def test_growing_splits_the_busiest_code_again_and_again(new_size):
    codebook = trained()
    codes, counts, sums = lists(codebook)
    for _ in range(new_size - 12):
        k = counts.index(max(counts))
        step = [0.1 * (b - a) for a, b in zip(codes[k], codes[nearest(codes, k)], strict=True)]
        counts[k] /= 2
        counts.append(counts[k])
        codes.append([a + s for a, s in zip(codes[k], step, strict=True)])
        codes[k] = [a - s for a, s in zip(codes[k], step, strict=True)]
        sums.append([a * counts[k] for a in codes[-1]])
        sums[k] = [a * counts[k] for a in codes[k]]
    found = resized(codebook, new_size)
    for ours, expected in zip(found.state(), (codes, counts, sums), strict=True):
        torch.testing.assert_close(ours, torch.tensor(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("new_size", [11, 6, 1])
def test_shrinking_merges_the_idlest_code_into_its_nearest(new_size):
    codebook = trained()
    codes, counts, sums = lists(codebook)
    for _ in range(12 - new_size):
        k = counts.index(min(counts))
        into = nearest(codes, k)
        counts[into] += counts[k]
        sums[into] = [a + b for a, b in zip(sums[into], sums[k], strict=True)]
        codes[into] = [a / counts[into] for a in sums[into]]
        for values in (codes, counts, sums):
            del values[k]
    found = resized(codebook, new_size)
    for ours, expected in zip(found.state(), (codes, counts, sums), strict=True):
        torch.testing.assert_close(ours, torch.tensor(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("metric", ["euclidean", "cosine", correlation])
@pytest.mark.parametrize("new_size", [5, 12, 30])
def test_counts_keep_their_sum_and_codes_their_form(new_size, metric):
    codebook = trained(dim=4, metric=metric)
    before = state_of(codebook)
    found = resized(codebook, new_size)
    assert_same_bits(state_of(codebook), before)
    torch.testing.assert_close(found.cluster_size.sum(), codebook.cluster_size.sum())
    torch.testing.assert_close(found.as_compared(found.embed), found.embed)
    assert len({tuple(code) for code in found.embed.tolist()}) == new_size
    found.check_state(found.state_dict())
    for step in range(3):
        found(torch.randn(50, 4, generator=torch.Generator().manual_seed(step)))
    assert found.embed.isfinite().all()


def test_same_size_gives_the_same_codes_and_age_is_unknown():
    codebook = trained()
    found = resized(codebook, 12)
    assert_same_bits(found.state(), codebook.state())
    assert_same_bits(found.rng, codebook.rng)
    assert_same_bits(found.births, codebook.births)
    assert found.num_updates == -1


def test_growing_keeps_the_indices_of_codes_that_are_not_split():
    codebook = trained()
    found = resized(codebook, 13)
    k = int(codebook.cluster_size.argmax())
    kept = [number for number in range(12) if number != k]
    assert_same_bits(found.embed[kept], codebook.embed[kept])
    assert_same_bits(found.births, torch.cat([codebook.births, torch.zeros(1, dtype=torch.int64)]))


def test_shrinking_moves_the_others_up():
    codebook = trained()
    places = resized(codebook, 11).quantize(codebook.embed).indices
    k = int(codebook.cluster_size.argmin())
    assert places[k + 1 :].tolist() == list(range(k, 11))


def test_options_mode_dtype_and_frozen_are_those_of_the_codebook():
    codebook = trained(decay=0.9, revival=BatchRevival(0.3), ema="batch_mean", dtype=torch.float64, seed=4)
    found = resized(codebook.freeze().eval(), 20)
    assert repr(found) == repr(codebook).replace("codebook_size=12", "codebook_size=20")
    assert (found.training, found.frozen, found.seed, found.embed.dtype) == (False, True, 4, torch.float64)
    assert resized(trained(metric=correlation), 20).metric is correlation


def test_one_code_and_equal_codes_are_split():
    codebook = EMACodebook(codebook_size=1, dim=2)
    codebook.set_codes_(torch.zeros(1, 2))
    assert len({tuple(code) for code in resized(codebook, 4).embed.tolist()}) == 4
    codebook = EMACodebook(codebook_size=3, dim=2)
    codebook.set_codes_(torch.ones(3, 2))
    assert resized(codebook, 5).embed.isfinite().all()
    codebook.cluster_size.zero_()
    codebook.embed_avg.zero_()
    assert resized(codebook, 2).embed.tolist() == [[1, 1], [1, 1]]


resize: Any = resized  # these calls are wrong on purpose


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: resize(EMACodebook(codebook_size=8, dim=4), 16), ValueError, "fresh one with codebook_size=16"),
        (lambda: resize(trained(), 0), ValueError, "new_size must be at least 1"),
        (lambda: resize(trained(), 2.0), TypeError, "new_size must be an int"),
        (
            lambda: resize(MultiScaleQuantizer([4], codebook_size=8, dim=4), 4),
            TypeError,
            "codebook must be an EMACodebook",
        ),
        (lambda: resize(type("Own", (EMACodebook,), {})(codebook_size=8, dim=4), 4), ValueError, "initialised"),
    ],
)
def test_refusals_say_what_to_write(call, error, words):
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (MultiScaleQuantizer([6], codebook_size=8, dim=4), r"got MultiScaleQuantizer: resize .*codebook\(0\)"),
        (ResidualQuantizer(codebook_size=8, dim=4, num_levels=2), r"got ResidualQuantizer: resize .*codebook\(0\)"),
        (torch.nn.Linear(2, 2), "must be an EMACodebook, got Linear: give one"),
        (EMACodebook, "got the class EMACodebook"),
    ],
)
def test_only_a_codebook_is_resized(given, words):
    with pytest.raises(TypeError, match=words):
        resized(given, 16)
