"""Where codes start: small objects that an EMACodebook calls with its first batch of tokens."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from vqssl import kernels
from vqssl.checks import check_positive_int
from vqssl.distributed import TokenPool, all_reduce_sum
from vqssl.functional.random import random_positions

__all__ = ["Initialization", "KMeansInit", "RandomInit", "SampleInit"]


@runtime_checkable
class Initialization(Protocol):
    """What an EMACodebook asks of an initialisation.

    >>> issubclass(SampleInit, Initialization)
    True
    """

    def __call__(self, pool: TokenPool, codebook_size: int, rng: Tensor, metric: str) -> Tensor | None:
        """The first codes ``(K, D)``, alike on all ranks, or None to keep the codes of construction.

        ``pool`` holds at least one token; ``rng`` is a state for :mod:`vqssl.functional.random`.
        """
        ...


@dataclass(frozen=True)
class RandomInit:
    """Keep the standard normal codes that the codebook was built with; the data are not looked at.

    Codes far from the data are never used: have a revival, or normalise the tokens (as
    :class:`vqssl.MultiScaleQuantizer`'s projections do).

    >>> import vqssl
    >>> codebook = vqssl.EMACodebook(codebook_size=8, dim=4, initialization=vqssl.RandomInit())
    """

    def __call__(self, pool: TokenPool, codebook_size: int, rng: Tensor, metric: str) -> None:
        return None


@dataclass(frozen=True)
class SampleInit:
    """Codes are tokens of the first training batch, over all ranks, drawn without replacement while they last.

    With fewer tokens than codes some codes start equal; the lowest index wins every tie, so the others are unused
    until a revival gives them tokens of their own.

    >>> import vqssl
    >>> codebook = vqssl.EMACodebook(codebook_size=8, dim=4, initialization=vqssl.SampleInit())
    """

    def __call__(self, pool: TokenPool, codebook_size: int, rng: Tensor, metric: str) -> Tensor:
        return pool.take(random_positions(rng, codebook_size, pool.total))


@dataclass(frozen=True)
class KMeansInit:
    """Codes are the centres of k-means (Lloyd's iterations) on the first training batch, over all ranks.

    Args:
        iterations: of assigning and averaging, at least 1. A centre that no token chose stays.

    Raises:
        ValueError: when first called, where the batch has fewer tokens than there are codes.

    >>> import vqssl
    >>> codebook = vqssl.EMACodebook(codebook_size=8, dim=4, initialization=vqssl.KMeansInit(iterations=20))
    """

    iterations: int = 10

    def __post_init__(self) -> None:
        check_positive_int("iterations", self.iterations)

    def __call__(self, pool: TokenPool, codebook_size: int, rng: Tensor, metric: str) -> Tensor:
        if pool.total < codebook_size:
            raise ValueError(
                f"k-means needs at least as many tokens as codes, got {int(pool.total)} valid tokens in the first "
                f"training batch for codebook_size = {codebook_size}: use a larger batch for the first step, a smaller "
                "codebook, or SampleInit()"
            )
        centres = SampleInit()(pool, codebook_size, rng, metric)
        for _ in range(self.iterations):
            nearest = kernels.nearest_codeword(pool.x, centres, metric)
            indices = torch.where(pool.valid, nearest, -1)
            counts, sums = all_reduce_sum(kernels.code_sums(pool.x, indices, codebook_size), pool.group)
            means = sums / counts.clamp_min(1)[:, None]
            centres = torch.where(counts[:, None] > 0, means, centres)
        return centres
