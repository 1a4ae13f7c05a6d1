"""Codes that are equal, and sums over very many tokens."""

import torch

import vqssl
from benchmarks.attempts.attempt import Outcome, attempt


def _distinct(codebook: vqssl.EMACodebook) -> int:
    return len(torch.unique(codebook.embed, dim=0))


@attempt("2,048 codes, 64 tokens a step, 300 steps", right="codes are distinct, 98% of them at least")
def few_tokens_a_step() -> Outcome:
    torch.manual_seed(0)
    codebook = vqssl.EMACodebook(codebook_size=2048, dim=16)
    for _ in range(300):
        codebook(torch.randn(64, 16))
    distinct = _distinct(codebook)
    return Outcome(distinct > 0.98 * 2048, f"{distinct} of 2048 codes distinct, {int(codebook.usage().dead)} dead")


@attempt("512 codes, a first batch of 64 tokens", right="all first codes are distinct")
def first_batch_smaller_than_the_codebook() -> Outcome:
    torch.manual_seed(0)
    codebook = vqssl.EMACodebook(codebook_size=512, dim=16)
    codebook.initialize_(torch.randn(64, 16))
    return Outcome(_distinct(codebook) == 512, f"{_distinct(codebook)} of 512 codes distinct")


@attempt("256 codes, a first batch in which 90% of the tokens are equal", right="all first codes are distinct")
def first_batch_of_equal_tokens() -> Outcome:
    torch.manual_seed(0)
    x = torch.randn(1000, 16)
    x[100:] = x[0]
    codebook = vqssl.EMACodebook(codebook_size=256, dim=16)
    codebook.initialize_(x)
    return Outcome(_distinct(codebook) == 256, f"{_distinct(codebook)} of 256 codes distinct")


@attempt("codes set equal by hand, then 200 steps", right="training parts them")
def codes_set_equal() -> Outcome:
    torch.manual_seed(0)
    codebook = vqssl.EMACodebook(codebook_size=64, dim=8, decay=0.9)
    codebook.set_codes_(torch.randn(8, 8).repeat(8, 1))
    for _ in range(200):
        codebook(torch.randn(256, 8))
    return Outcome(_distinct(codebook) == 64, f"{_distinct(codebook)} of 64 codes distinct")


def _sum_of_equal_tokens(count: int) -> Outcome:
    codebook = vqssl.EMACodebook(codebook_size=1, dim=1, decay=0.0, eps=0.0)
    codebook.set_codes_(torch.ones(1, 1))
    codebook(torch.full((count, 1), 0.1))
    code = codebook.embed.item()
    return Outcome(abs(code - 0.1) < 0.1 * 2**-12, f"code {code:.6f}")


@attempt("a million equal tokens of 0.1 in one step", right="the code is 0.1, off by 2^-12 of it at most")
def million_equal_tokens() -> Outcome:
    return _sum_of_equal_tokens(10**6)


@attempt("16 million equal tokens of 0.1 in one step", right="the code is 0.1, off by 2^-12 of it at most")
def sixteen_million_equal_tokens() -> Outcome:
    return _sum_of_equal_tokens(16 * 10**6)


@attempt("cosine, k-means on tokens that cancel out", right="no code has length 0")
def cosine_code_without_direction() -> Outcome:
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]).repeat(8, 1)
    codebook = vqssl.EMACodebook(codebook_size=1, dim=2, metric="cosine", initialization=vqssl.KMeansInit())
    codebook(x)
    length = codebook.embed.norm(dim=-1).min().item()
    return Outcome(length > 0, f"shortest code {length:.2f}")
