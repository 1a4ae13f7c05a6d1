"""Every recipe of docs/recipes.md runs as it stands, its losses are finite and fall, and it does what the page says."""

import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import vqssl

PAGE = Path(__file__).parent.parent / "docs" / "recipes.md"
SECTION = re.compile(r"^## (.*?)\n(.*?)(?=^## |\Z)", flags=re.DOTALL | re.MULTILINE)
SECTIONS = dict(SECTION.findall(PAGE.read_text(encoding="utf-8")))

LEFT = {
    "wav2vec 2.0": {"losses": 0.9},
    "HuBERT": {"losses": 0.15},
    "BEST-RQ": {"losses": 0.5},
    "BEiT v2": {"tokenizer_losses": 0.7, "losses": 0.7},
    "OBoW": {"losses": 0.95},
    "SwAV and CAPI": {"losses": 0.1},
    "VQ-VAE": {"losses": 0.7},
    "Residual audio codes": {"losses": 0.2},
    "Tokens for a language model": {"losses": 0.15},
}
"""The share of a list's first losses that may be left at its end: most for bags, whose loss has their entropy in it."""


def blocks(text):
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def share_left(losses):
    """Return the mean of the last five losses over that of the first five; infinite if one is not finite."""
    if len(losses) < 20 or not all(map(math.isfinite, losses)):
        return math.inf
    return sum(losses[-5:]) / sum(losses[:5])


def perplexity(indices, codebook_size):
    counts = vqssl.functional.code_counts(indices, codebook_size)
    return vqssl.functional.codebook_usage(counts).perplexity.item()


@pytest.fixture(scope="module")
def ran():
    """Return the names that a recipe leaves behind, run once."""
    results = {}

    def run(title):
        if title not in results:
            (code,) = blocks(SECTIONS[title])
            torch.manual_seed(0)
            results[title] = {}
            exec(compile(code, title, "exec"), results[title])
        return results[title]

    return run


def test_every_recipe_is_tested():
    assert SECTIONS.keys() == LEFT.keys()


@pytest.mark.parametrize("title", LEFT)
def test_losses_fall(ran, title):
    names = ran(title)
    assert {name for name in names if name.endswith("losses")} == LEFT[title].keys()
    for name, most in LEFT[title].items():
        assert share_left(names[name]) < most, (name, names[name])


@pytest.mark.parametrize("title", LEFT)
def test_every_part_is_trained(ran, title):
    names = ran(title)
    modules = {name: value for name, value in names.items() if isinstance(value, nn.Module)}
    for name, parameter in names.items():
        if isinstance(parameter, nn.Parameter):
            modules[name] = nn.ParameterList([parameter])
    trained = [(name, p) for name, module in modules.items() for p in module.parameters() if p.requires_grad]
    assert trained
    assert [name for name, p in trained if p.grad is None or not p.grad.abs().sum() > 0] == []
    codebooks = [m for module in modules.values() for m in module.modules() if isinstance(m, vqssl.EMACodebook)]
    assert all(codebook.initialized and codebook.embed.isfinite().all() for codebook in codebooks)


@pytest.mark.parametrize("title", LEFT)
def test_section_has_a_source_and_says_what_to_look_at(title):
    assert "**Look at**" in SECTIONS[title]
    assert title == "Tokens for a language model" or re.search(r"arxiv\.org/abs/\d{4}\.\d{4,5}", SECTIONS[title])


@pytest.mark.parametrize("losses", [[1.0] * 20, [*[1.0] * 15, *[0.99] * 5], [*[1.0] * 19, math.nan], [1.0, 0.1], []])
def test_losses_that_do_not_fall_are_seen(losses):
    assert share_left(losses) > max(most for of_title in LEFT.values() for most in of_title.values())


# ---- what the page says of single recipes ----


def test_both_groups_of_wav2vec_stay_in_use(ran):
    for usage in ran("wav2vec 2.0")["quantizer"].usage():
        assert usage.perplexity > 8


def test_fit_of_hubert_falls_and_training_leaves_its_codes(ran):
    names = ran("HuBERT")
    errors = names["fit"].errors
    assert len(errors) > 1
    assert errors[-1] < errors[0]
    assert names["fit"].counts.min() > 0
    again = vqssl.EMACodebook(codebook_size=20, dim=13)
    vqssl.fit_codebook(again, names["frames"].split(4))
    assert again.embed.equal(names["codebook"].embed)


def test_first_losses_of_hubert_and_best_rq_are_near_a_guess(ran):
    assert ran("HuBERT")["losses"][0] == pytest.approx(math.log(20), abs=0.5)
    assert ran("BEST-RQ")["losses"][0] == pytest.approx(math.log(64), abs=0.5)


def test_targets_of_best_rq_are_spread(ran):
    assert perplexity(ran("BEST-RQ")["targets"], 64) > 16


def test_prediction_of_obow_nears_the_entropy_of_the_bags(ran):
    names = ran("OBoW")
    entropy = names["entropy"].item()
    assert entropy == pytest.approx(torch.special.entr(names["bags"]).sum(-1).mean().item(), rel=1e-5)
    assert 0 < names["losses"][-1] - entropy < 0.75 * (names["losses"][0] - entropy)


def test_balanced_codes_of_swav_do_not_collapse(ran):
    assert perplexity(ran("SwAV and CAPI")["a"].argmax(-1), 16) > 8


def test_masked_patches_alone_count_where_balanced_codes_are_multiplied_by_a_mask():
    scores, logits, mask = torch.randn(4, 6, 8), torch.randn(4, 6, 8), torch.rand(4, 6) < 0.5
    codes = vqssl.functional.sinkhorn(scores)
    found = vqssl.functional.code_cross_entropy(logits, codes * mask[..., None])
    expected = vqssl.functional.code_cross_entropy(logits[mask], codes[mask])
    torch.testing.assert_close(found, expected)


def test_each_level_of_residual_codes_lowers_the_error(ran):
    errors = ran("Residual audio codes")["errors"]
    assert len(errors) == 4
    assert errors == sorted(errors, reverse=True)


def test_tokens_of_a_language_model_have_a_range_for_each_level(ran):
    tokens = ran("Tokens for a language model")["tokens"].unflatten(1, (12, 2))
    assert 0 <= tokens[..., 0].min() <= tokens[..., 0].max() < 16 <= tokens[..., 1].min() <= tokens[..., 1].max() < 32
